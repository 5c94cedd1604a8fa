"""Independent implementations of the model with our weights, and inputs for them and ours."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import MochiPipeline as DiffusersPipeline

from mochi_core import AsymmDiT, AsymmDiTConfig, AsymmVAE
from mochi_core.checkpoints import autoencoder_rules, from_state_dict, to_diffusers, transformer_rules
from tests.harness.numbers import relative_error


def diffusers_dit(dit: AsymmDiT):
    from diffusers import MochiTransformer3DModel

    config = dit.config
    with torch.device("meta"):
        peer = MochiTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            num_layers=config.depth,
            pooled_projection_dim=config.hidden_size_y,
            in_channels=config.in_channels,
            text_embed_dim=config.text_width,
            time_embed_dim=config.timestep_features,
            max_sequence_length=256,
        )
    return _load(peer, dit, transformer_rules(config.depth))


def diffusers_vae(vae: AsymmVAE):
    from diffusers import AutoencoderKLMochi

    config = vae.config
    with torch.device("meta"):
        peer = AutoencoderKLMochi(
            encoder_block_out_channels=config.encoder_channels,
            decoder_block_out_channels=tuple(reversed(config.decoder_channels)),
            layers_per_block=config.encoder_blocks,
        )
    return _load(peer, vae, autoencoder_rules(config.encoder_blocks, config.decoder_blocks))


def _load(peer, ours, rules):
    tensors = to_diffusers(from_state_dict(ours.state_dict()), rules)
    peer.load_state_dict({name: tensor.read() for name, tensor in tensors.items()}, strict=True, assign=True)
    return peer.eval()


def comfy_dit(dit: AsymmDiT):
    import comfy.ops

    peer = comfy_class(dit.config, comfy.ops.disable_weight_init, dit.dtype)
    peer.load_state_dict(dit.state_dict(), strict=True)
    return peer.eval()


def comfy_class(config: AsymmDiTConfig, operations, dtype: torch.dtype):
    from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint

    return AsymmDiTJoint(
        depth=config.depth, patch_size=2, num_heads=config.num_heads, hidden_size_x=config.hidden_size_x,
        hidden_size_y=config.hidden_size_y, mlp_ratio_x=4.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12,
        qk_norm=True, qkv_bias=False, out_bias=True, patch_embed_bias=True, timestep_mlp_bias=True, timestep_scale=1000.0,
        use_t5=True, t5_feat_dim=config.text_width, t5_token_length=256, attend_to_padding=False, rope_theta=10000.0,
        device="cpu", dtype=dtype, operations=operations,
    )  # fmt: skip


def comfy_vae(vae: AsymmVAE):
    from comfy.ldm.genmo.vae.model import VideoVAE

    peer = VideoVAE()
    peer.load_state_dict(vae.state_dict(), strict=True)
    return peer.eval()


def inputs(width, latent=(2, 16, 20), batch=1):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, 12, *latent, generator=generator)
    embeds = torch.randn(batch, 256, width, generator=generator)
    return latents, torch.full((batch,), 0.7375), embeds


def prefix_mask(*lengths):
    return torch.arange(256) < torch.tensor(lengths)[:, None]


def from_diffusers(peer, latents, sigma, embeds, mask):
    dtype = next(peer.parameters()).dtype
    timestep = (1 - sigma) * 1000
    return peer(latents.to(dtype), embeds.to(dtype), timestep, mask, return_dict=False)[0]


def from_comfyui(peer, latents, sigma, embeds, mask):
    dtype = next(peer.parameters()).dtype
    return -peer(latents.to(dtype), sigma, embeds.to(dtype), mask, max(1, int(mask.sum())))


def pipeline(transformer):
    """diffusers' pipeline with only the part that LoRAs are loaded into."""
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    return DiffusersPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)


def assert_agree(dit, peer):
    latents, sigma, embeds = inputs(dit.config.text_width)
    mask = prefix_mask(20)
    expected = from_diffusers(peer, latents, sigma, embeds, mask)
    assert relative_error(dit(latents, sigma, embeds, mask), expected) <= 1e-5


def assert_differ(dit, peer):
    with pytest.raises(AssertionError):
        assert_agree(dit, peer)
