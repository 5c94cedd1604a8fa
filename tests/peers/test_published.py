"""Published constants against other projects' copies, also where only inputs of a certain size reveal a difference."""

import inspect

import gguf
import pytest
import torch

from mochi_core import AsymmDiTConfig, AsymmVAEConfig, linear_quadratic_schedule
from mochi_core.autoencoder.latents import LATENTS_MEAN, LATENTS_STD
from mochi_core.autoencoder.model import Posterior
from mochi_core.config import MAX_TEXT_TOKENS, T5EncoderConfig
from mochi_core.quantization.ggml import BLOCK_TYPES
from mochi_core.transformer.layers import TimestepEmbedder
from mochi_core.transformer.rope import axis_positions
from tests.harness.numbers import relative_error
from tests.harness.peers import diffusers_dit, diffusers_vae
from tests.harness.tiny_models import DIT, random_dit, random_vae


def test_mean_and_std_of_the_latents_are_comfyuis(comfyui):  # noqa: ARG001
    from comfy.latent_formats import Mochi

    theirs = Mochi()
    assert theirs.latents_mean.flatten().equal(torch.tensor(LATENTS_MEAN))
    assert theirs.latents_std.flatten().equal(torch.tensor(LATENTS_STD))


def defaults(function):
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_mean_and_std_of_the_latents_are_diffusers():
    from diffusers import AutoencoderKLMochi

    theirs = defaults(AutoencoderKLMochi.__init__)
    assert tuple(theirs["latents_mean"]) == LATENTS_MEAN
    assert tuple(theirs["latents_std"]) == LATENTS_STD


def test_the_released_sizes_are_diffusers():
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    vae, theirs = AsymmVAEConfig(), defaults(AutoencoderKLMochi.__init__)
    ours = (vae.encoder_channels, vae.decoder_channels[::-1], vae.encoder_blocks, vae.decoder_blocks[::-1])
    channels = theirs["encoder_block_out_channels"], theirs["decoder_block_out_channels"]
    assert ours == (*channels, theirs["layers_per_block"], theirs["layers_per_block"])
    assert (vae.latent_channels, vae.temporal_reductions) == (theirs["latent_channels"], theirs["temporal_expansions"])
    assert vae.temporal_expansions == theirs["temporal_expansions"][::-1]
    assert vae.spatial_reductions == vae.spatial_expansions == theirs["spatial_expansions"]
    assert vae.encoder_attention == theirs["add_attention_block"]

    dit, theirs = AsymmDiTConfig(), defaults(MochiTransformer3DModel.__init__)
    ours = {
        "patch_size": dit.patch_size,
        "num_attention_heads": dit.num_heads,
        "attention_head_dim": dit.head_dim,
        "num_layers": dit.depth,
        "pooled_projection_dim": dit.hidden_size_y,
        "in_channels": dit.in_channels,
        "text_embed_dim": dit.text_width,
        "time_embed_dim": dit.timestep_features,
        "max_sequence_length": MAX_TEXT_TOKENS,
    }
    assert ours == {name: theirs[name] for name in ours}
    feed_forwards = (4 * dit.hidden_size_x * 2) // 3, (4 * dit.hidden_size_y * 2) // 3
    assert (dit.mlp_size_x, dit.mlp_size_y) == feed_forwards

    theirs = defaults(MochiPipeline.__call__)
    assert (theirs["num_inference_steps"], theirs["guidance_scale"], theirs["max_sequence_length"]) == (64, 4.5, 256)


def test_t5_is_comfyuis(comfy_path):
    import json

    theirs = json.loads((comfy_path / "comfy" / "text_encoders" / "t5_config_xxl.json").read_text(encoding="utf-8"))
    ours = T5EncoderConfig()
    assert (ours.depth, ours.width, ours.num_heads) == (theirs["num_layers"], theirs["d_model"], theirs["num_heads"])
    assert (ours.head_dim, ours.mlp_size, ours.vocabulary) == (theirs["d_kv"], theirs["d_ff"], theirs["vocab_size"])


@pytest.mark.parametrize("steps", [2, 8, 64, 100])
def test_schedule_is_diffusers(steps):
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule as theirs

    expected = torch.tensor([*theirs(steps, 0.025), 0.0])
    torch.testing.assert_close(linear_quadratic_schedule(steps), expected, rtol=0, atol=1e-6)


def test_timesteps_are_those_of_diffusers():
    from diffusers import MochiTransformer3DModel
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    with torch.device("meta"):
        time_proj = MochiTransformer3DModel(num_layers=1, num_attention_heads=1).time_embed.time_proj
    scale = FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config.num_train_timesteps
    ours = TimestepEmbedder(time_proj.num_channels, 8, ops=torch.nn)
    ours.mlp = torch.nn.Identity()
    sigma = torch.tensor([1.0, 0.7375, 0.02, 0.0])
    torch.testing.assert_close(ours(sigma, torch.float32), time_proj((1 - sigma) * scale), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("rows", "columns"), [(30, 53), (4, 6)])
def test_positions_are_diffusers_and_comfyuis(comfyui, rows, columns):  # noqa: ARG001
    from comfy.ldm.genmo.joint_model.rope_mixed import create_position_matrix
    from diffusers.models.transformers.transformer_mochi import MochiRoPE

    grid = torch.meshgrid(*axis_positions(3, rows, columns), indexing="ij")
    ours = torch.stack(grid, dim=-1).view(-1, 3)
    theirs = MochiRoPE()._get_positions(3, rows, columns, dtype=torch.float64)
    torch.testing.assert_close(ours, theirs)
    comfyuis = create_position_matrix(3, rows, columns, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(ours.float(), comfyuis)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_sizes_of_ggml_blocks_are_the_gguf_packages(name):
    block = BLOCK_TYPES[name]
    assert (block.weights, block.bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("logvar", [-40.0, -2.0, 0.0, 3.0, 40.0])
def test_a_posterior_is_drawn_as_diffusers_draws_it(logvar):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.cat((torch.full((1, 12, 2, 3, 4), 1.5), torch.full((1, 12, 2, 3, 4), logvar)), dim=1)
    theirs = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(0))
    ours = Posterior(*moments.chunk(2, dim=1)).sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, theirs)


def scaled(module, factor):
    for parameter in module.parameters():
        parameter.mul_(factor)


@pytest.fixture(scope="module")
def small_inside():
    """A denoiser with streams, queries and keys so small that the eps of every norm matters."""
    model = random_dit(DIT)
    with torch.no_grad():
        for module in (model.x_embedder, model.t5_yproj):
            scaled(module, 1e-3)
        for block in model.blocks:
            scaled(block.attn.qkv_x, 3e-3)
            scaled(block.attn.qkv_y, 3e-3)
            for projection in (block.attn.proj_x, block.attn.proj_y, block.mlp_x.w2, getattr(block.mlp_y, "w2", None)):
                if projection is not None:
                    scaled(projection, 3e-3)
    return model


# Names in a block of diffusers'.
NORMS = {
    "q and k": lambda block: [
        block.attn1.norm_q,
        block.attn1.norm_k,
        block.attn1.norm_added_q,
        block.attn1.norm_added_k,
    ],
    "before attention": lambda block: [block.norm1.norm, block.norm1_context.norm],
    "after attention": lambda block: [block.norm2.norm],
    "before feed-forward": lambda block: [block.norm3.norm],
    "after feed-forward": lambda block: [block.norm4.norm],
}


def both(model, peer):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 12, 2, 8, 12, generator=generator)
    embeds, sigma = torch.randn(1, 256, model.config.text_width, generator=generator), torch.tensor([0.7375])
    mask = torch.arange(256)[None] < 20
    theirs = peer(latents, embeds, (1 - sigma) * 1000, mask, return_dict=False)[0]
    return model(latents, sigma, embeds, mask), theirs


def test_eps_of_the_denoisers_norms_is_diffusers(small_inside):
    assert relative_error(*both(small_inside, diffusers_dit(small_inside))) <= 1e-5


@pytest.mark.parametrize("kind", NORMS)
def test_that_comparison_sees_the_eps_of_each_norm(small_inside, kind):
    peer = diffusers_dit(small_inside)
    for block in peer.transformer_blocks:
        for norm in NORMS[kind](block):
            norm = getattr(norm, "norm", norm)  # the last block's context norm wraps another one
            assert norm.eps == (1e-5 if kind == "q and k" else 1e-6)
            norm.eps = 1.1e-5 - norm.eps
    assert relative_error(*both(small_inside, peer)) > 1e-4


def test_eps_of_the_autoencoders_norms_is_diffusers():
    vae = random_vae()
    with torch.no_grad():
        scaled(vae.encoder.layers[0], 1e-3)
        peer = diffusers_vae(vae)
        video = torch.rand(1, 3, 7, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        ours = vae.encode(video).mean
        assert relative_error(ours, peer.encode(video).latent_dist.mean) <= 1e-4
        for norm in (module for module in peer.encoder.modules() if isinstance(module, torch.nn.GroupNorm)):
            assert norm.eps == 1e-5
            norm.eps = 1e-6
        assert relative_error(ours, peer.encode(video).latent_dist.mean) > 1e-3
