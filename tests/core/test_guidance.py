"""Skip-layer guidance, CFG-Zero* and normalised attention guidance: their formulas, cost, and combinations."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mochi_core import BlockCache, Guidance, guided, load_lora, sample
from mochi_core.__main__ import main
from mochi_core.sampling.given import Given
from mochi_core.sampling.guidance import nag
from mochi_core.transformer.layers import NORM_EPS
from mochi_core.transformer.offload import stream_blocks
from tests.harness import trained
from tests.harness.lora_files import random_adapter, write_adapter
from tests.harness.random_inputs import NOISE, SIGMAS, prompt
from tests.harness.tiny_models import DIT, random_dit

HEADS, DIM = DIT.num_heads, DIT.hidden_size_x // DIT.num_heads
SKIP = Guidance(skip_blocks=(1,), skip_scale=0.7)
NAG = Guidance(nag_scale=5.0)
ALL = Guidance(skip_blocks=(1,), cfg_zero=True, nag_scale=4.0)
WAYS = {"skip": SKIP, "cfg zero": Guidance(cfg_zero=True), "nag": NAG, "all": ALL}
ways = pytest.mark.parametrize("guidance", WAYS.values(), ids=WAYS.keys())
BATCH = torch.cat((NOISE, NOISE.flip(-1)))


@pytest.fixture
def dit():
    return random_dit()


@pytest.fixture
def visits(dit):
    """Blocks in the order of their calls."""
    calls = []
    for i, block in enumerate(dit.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    return calls


def close(found, expected, tolerance=1e-5):
    return ((found - expected).norm() / expected.norm()).item() < tolerance


def test_formulas_and_what_is_asked_for():
    counts = []

    def velocities(x, _, count):
        counts.append(count)
        return ([x * 2, x * 7, x * 5] if count != 2 or skipping else [x * 2, x * 5])[:count]

    skipping = True
    velocity = guided(velocities, [3.0, 1.0], SKIP)
    torch.testing.assert_close(velocity(NOISE, 0), NOISE * (5 + 3 * (2 - 5) + 0.7 * (2 - 7)))
    torch.testing.assert_close(velocity(NOISE, 1), NOISE * (2 + 0.7 * (2 - 7)))
    assert counts == [3, 2]
    skipping = False
    counts.clear()
    scales = [3.0] * 30
    velocity = guided(velocities, scales, Guidance(cfg_zero=True))
    assert not any(velocity(NOISE, step).any() for step in range(2)), "4 % of 30 steps"
    torch.testing.assert_close(velocity(NOISE, 2), NOISE * 2)  # uncond is parallel to cond, so its projection is cond
    assert counts == [2]


def test_the_projection_is_of_each_video():
    cond, uncond = BATCH, torch.cat((NOISE + 0.3, NOISE.flip(3)))
    velocity = guided(lambda *_: [cond, uncond], [1.0, 4.0], Guidance(cfg_zero=True))(BATCH, 1)
    for b in range(2):
        c, u = cond[b], uncond[b]
        u = u * (c * u).sum() / (u * u).sum()
        torch.testing.assert_close(velocity[b], u + 4 * (c - u))


def test_without_blocks_is_the_model_without_them(dit, visits):
    """The blocks before them are computed once."""
    found = sample(dit, NOISE, SIGMAS, prompt(6), prompt(2, seed=1), 3.0, guidance=SKIP)
    assert visits == [0, 0, 1, 1, 2, 2, 2] * 5
    shorter = random_dit()
    shorter.blocks[1].forward = lambda x, y, *_: (x, y)
    x = NOISE
    for here, after in pairwise(SIGMAS):
        cond, uncond = (dit(x, here.view(1), *text) for text in (prompt(6), prompt(2, seed=1)))
        perturbed = shorter(x, here.view(1), *prompt(6))
        x = x + (here - after) * (uncond + 3.0 * (cond - uncond) + 0.7 * (cond - perturbed))
    assert close(found, x)


@pytest.mark.parametrize("blocks", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_any_blocks_may_be_left_out(dit, visits, blocks):
    guidance = Guidance(skip_blocks=blocks)
    found = sample(dit, NOISE, SIGMAS[:2], prompt(6), guidance_scale=1, guidance=guidance)
    assert len(visits) == 3 + len(set(range(min(blocks), 3)) - set(blocks))
    cached = sample(
        dit, NOISE, SIGMAS[:2], prompt(6), guidance_scale=1, guidance=guidance, cache=BlockCache("teacache", 0)
    )
    assert torch.equal(cached, found), "shared and not"


def nag_velocity(dit, latents, sigma, prompts, guidance):
    """One video (1, C, T, H, W) in float64: visual tokens attend to each of two prompts (L, W), and texts to their own."""
    state = {name: tensor.double() for name, tensor in dit.state_dict().items()}
    frames, rows, columns = latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, eps=NORM_EPS):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    network = random_dit(dtype=torch.float64)
    level = network.t_embedder(torch.tensor([sigma]).double(), torch.float64)
    pooled = [network.t5_y_embedder(text[None], torch.ones(1, len(text), dtype=torch.bool)) for text in prompts]
    visual, *modulations = (F.silu(level + p)[0] for p in (pooled[0], *pooled))  # (Dx,)
    rotation = torch.view_as_complex(network.rope(latents.shape, latents.device).table().double())  # (N, K, D / 2)
    x = network.x_embedder(latents)[0]  # (N, Dx)
    texts = [linear("t5_yproj", text) for text in prompts]

    def heads(name, stream, x, rotation=None):
        q, k, v = linear(f"{name}.attn.qkv_{stream}", x).unflatten(-1, (3, HEADS, DIM)).unbind(1)
        q, k = (norm(part, 1e-5) * state[f"{name}.attn.{n}_norm_{stream}.weight"] for n, part in (("q", q), ("k", k)))
        if rotation is not None:
            q, k = (
                torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous()) * rotation).flatten(
                    -2
                )
                for part in (q, k)
            )
        return q, k, v

    def feed_forward(name, x):
        gate, value = linear(f"{name}.w1", x).chunk(2, dim=-1)
        return linear(f"{name}.w2", F.silu(gate) * value)

    for i in range(dit.config.depth):
        name = f"blocks.{i}"
        scale, gate, scale_mlp, gate_mlp = linear(f"{name}.mod_x", visual).chunk(4)
        seen = heads(name, "x", norm(x) * (1 + scale), rotation)
        outs, news = [], []
        for y, modulation in zip(texts, modulations, strict=True):
            of_text = linear(f"{name}.mod_y", modulation).unflatten(-1, (-1, y.shape[-1]))  # (4, Dy), last (1, Dy)
            parts = heads(name, "y", norm(y) * (1 + of_text[0]))
            q, k, v = (torch.cat(both) for both in zip(seen, parts, strict=True))
            weights = torch.einsum("ikd,jkd->kij", q, k).div(math.sqrt(DIM)).softmax(-1)
            out = torch.einsum("kij,jkd->ikd", weights, v).flatten(1)  # (N + L, Dx)
            outs.append(out[: len(x)])
            if i < dit.config.depth - 1:
                y = y + norm(linear(f"{name}.attn.proj_y", out[len(x) :])) * of_text[1].tanh()
                y = y + norm(feed_forward(f"{name}.mlp_y", norm(y) * (1 + of_text[2]))) * of_text[3].tanh()
            news.append(y)
        texts = news
        near, far = outs
        away = near * guidance.nag_scale - far * (guidance.nag_scale - 1)
        ratio = away.abs().sum(-1, keepdim=True) / near.abs().sum(-1, keepdim=True)
        away = away * torch.minimum(ratio, torch.full_like(ratio, guidance.nag_tau)) / ratio
        out = guidance.nag_alpha * away + (1 - guidance.nag_alpha) * near
        x = x + norm(linear(f"{name}.attn.proj_x", out)) * gate.tanh()
        x = x + norm(feed_forward(f"{name}.mlp_x", norm(x) * (1 + scale_mlp))) * gate_mlp.tanh()
    shift, scale = linear("final_layer.mod", visual).chunk(2)
    tokens = linear("final_layer.linear", F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift)
    patches = tokens.unflatten(1, (2, 2, -1)).unflatten(0, (frames, rows, columns))
    return patches.permute(5, 0, 1, 3, 2, 4).reshape(latents.shape)


@pytest.mark.parametrize(
    ("lengths", "tau"), [((6, 3), 2.5), ((2, 9), 0.8), ((6, 0), 2.5), ((0, 4), 2.5), ((0, 0), 2.5)]
)
def test_a_step_with_nag_is_the_published_one(dit, visits, lengths, tau):
    """Blocks run once; scale 1 needs nothing else."""
    guidance = Guidance(nag_scale=5.0, nag_tau=tau)
    near, far = (prompt(length, seed) for seed, length in enumerate(lengths))
    found = sample(dit, NOISE, torch.tensor([0.7, 0.0]), near, far, 1, guidance=guidance)
    assert visits == [0, 1, 2]
    texts = [embeds[0, mask[0]].double() for embeds, mask in (near, far)]
    velocity = nag_velocity(dit, NOISE.double(), 0.7, texts, guidance)
    assert close(found, NOISE + 0.7 * velocity)
    plain = sample(dit, NOISE, torch.tensor([0.7, 0.0]), near, None, 1)
    assert close(found, plain, 1e-5) == (lengths == (0, 0)), "away from the same prompt there is nowhere to go"


def test_nag_is_held_to_tau_times_the_norm():
    near, far = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    out = nag(near, far, Guidance(nag_scale=100.0, nag_tau=1.5, nag_alpha=1.0))
    torch.testing.assert_close(out.abs().sum(-1), 1.5 * near.abs().sum(-1))
    assert nag(torch.zeros_like(near), torch.zeros_like(far), NAG).isfinite().all()


@ways
@pytest.mark.parametrize("threshold", [0, 0.3])
def test_with_a_cache_and_in_a_batch_every_video_is_what_it_would_be_alone(dit, guidance, threshold):
    lengths = (6, 3), (2, 9)
    cond, uncond = (
        (torch.cat([prompt(n, seed)[0] for n in of_all]), torch.cat([prompt(n)[1] for n in of_all]))
        for seed, of_all in enumerate(lengths)
    )

    def run(videos, **options):
        texts = [(embeds[videos], mask[videos]) for embeds, mask in (cond, uncond)]
        return sample(dit, BATCH[videos], SIGMAS, *texts, 3.0, guidance=guidance, **options)

    cache = BlockCache("teacache", threshold)
    together = run(slice(2), cache=cache)
    assert (cache.hits > 0) == (threshold > 0)
    for i in range(2):
        alone = run(slice(i, i + 1), cache=BlockCache("teacache", threshold))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)
    if not threshold:
        torch.testing.assert_close(together, run(slice(2)), rtol=1e-5, atol=1e-5)


@ways
def test_with_levels_by_frame_loras_and_streamed_blocks(dit, tmp_path, guidance):
    def run(**options):
        return sample(dit, NOISE, SIGMAS, prompt(6), prompt(3, seed=1), 3.0, guidance=guidance, **options)

    plain = run()
    new = Given(torch.zeros_like(NOISE), torch.ones(NOISE.shape[2]))
    assert close(run(given=new), plain)
    first = Given(NOISE.flip(-1), torch.tensor([0.0, 1.0]))
    kept = run(given=first)
    assert torch.equal(kept[:, :, 0], NOISE.flip(-1)[:, :, 0])
    assert kept.isfinite().all()
    adapter = random_adapter(dit.state_dict(), "qkv_x", "mlp_y.w2")
    load_lora(dit, write_adapter(tmp_path / "a.safetensors", adapter, "comfyui"))
    with_lora = run()
    assert not close(with_lora, plain, 1e-3)
    with stream_blocks(dit, "cpu"):
        assert torch.equal(run(), with_lora)


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
@ways
def test_compiled(dit, guidance):
    compiled = random_dit()
    compiled.compile_blocks(backend="eager")
    arguments = NOISE, SIGMAS, prompt(6), prompt(3, seed=1)
    assert close(sample(compiled, *arguments, guidance=guidance), sample(dit, *arguments, guidance=guidance))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"skip_blocks": (34,)}, "lists block 34, but this denoiser has blocks 0 to 2"),
        ({"skip_blocks": (-1,)}, "lists block -1"),
        ({"skip_blocks": (1,), "skip_scale": math.nan}, "skip_scale is nan"),
        ({"nag_scale": math.inf}, "nag_scale is inf"),
        ({"nag_scale": 5, "nag_tau": 0}, "nag_tau is 0"),
        ({"nag_scale": 5, "nag_alpha": 1.5}, "nag_alpha 1.5; use a ratio"),
        ({"nag_scale": 5}, "nag_scale is not 1, so `uncond` is needed"),
    ],
)
def test_what_makes_no_sense_is_refused(dit, wrong, message):
    with pytest.raises(ValueError, match=message):
        sample(dit, NOISE, SIGMAS, prompt(6), guidance_scale=1, guidance=Guidance(**wrong))


def test_shell(tmp_path, capsys):
    arguments = [
        "generate", "--transformer", trained.TRANSFORMER, "--t5", trained.T5, "--vae", trained.VAE,
        "--prompt", "a red star", "--height", 64, "--width", 64, "--frames", 7, "--steps", 2, "--dtype", "fp32",
        "--device", "cpu",
    ]  # fmt: skip
    videos = []
    for i, options in enumerate(([], ["--skip-block", "2"], ["--cfg-zero"], ["--nag"], ["--nag", "1"])):
        output = tmp_path / f"{i}.latent"
        assert main([*map(str, arguments), *options, "-o", str(output)]) == 0
        videos.append(output.read_bytes())
    assert len(set(videos)) == 4
    assert videos[0] == videos[4]
    assert main([*map(str, arguments), "--skip-block", "34", "-o", str(tmp_path / "x.latent")]) == 2
    assert "lists block 34, but this denoiser has blocks 0 to" in capsys.readouterr().err
