"""A noise level for each latent frame: the formulas of Pusa (arXiv 2507.16116); equal levels change nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from mochi_core import BlockCache, sample
from mochi_core.sampling.given import Given, frame_levels
from mochi_core.sampling.sample import prepared_velocities
from mochi_core.transformer.layers import NORM_EPS
from tests.harness.random_inputs import SIGMAS, inputs, prompt
from tests.harness.tiny_models import DIT, random_dit

LEVELS = torch.tensor([0.0, 1.0, 0.4, 1.0])
SIZE = (len(LEVELS), 4, 6)
HEADS, DIM = DIT.num_heads, DIT.hidden_size_x // DIT.num_heads


@pytest.fixture(scope="module")
def dit():
    return random_dit()


def published_velocity(dit, latents, sigma, embeds):
    """One video (1, C, T, H, W) with noise levels (T,) and prompt (L, W), every token modulated by its own row."""
    state = dit.double().state_dict()
    frames, rows, columns = latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2
    frame_of = torch.arange(frames).repeat_interleave(rows * columns)  # (N,)

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, eps=NORM_EPS):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    half = dit.config.timestep_features // 2
    angles = 1000 * (1 - sigma[:, None]) * torch.exp(-math.log(10000) * torch.arange(half, dtype=sigma.dtype) / half)
    waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
    level = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))  # (T, Dx)
    pooled = dit.t5_y_embedder(embeds[None], torch.ones(1, len(embeds), dtype=torch.bool))[0]
    visual = F.silu(level + pooled)[frame_of]  # (N, Dx)
    text = F.silu((level + pooled).mean(dim=0))  # (Dx,)
    rotation = torch.view_as_complex(dit.rope(latents.shape, latents.device).table().double())  # (N, K, D / 2)

    patches = latents[0].unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 0, 4, 5)  # (T, rows, columns, C, 2, 2)
    weight = state["x_embedder.proj.weight"]
    x = patches.flatten(0, 2).flatten(1) @ weight.flatten(1).T + state["x_embedder.proj.bias"]  # (N, Dx)
    y = linear("t5_yproj", embeds)  # (L, Dy)

    def heads(block, stream, x):
        q, k, v = linear(f"{block}.attn.qkv_{stream}", x).unflatten(-1, (3, HEADS, DIM)).unbind(1)  # (tokens, K, D)
        q, k = (norm(part, 1e-5) * state[f"{block}.attn.{n}_norm_{stream}.weight"] for n, part in (("q", q), ("k", k)))
        return q, k, v

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * rotation).flatten(-2)

    def feed_forward(name, x):
        gate, value = linear(f"{name}.w1", x).chunk(2, dim=-1)
        return linear(f"{name}.w2", F.silu(gate) * value)

    for i in range(dit.config.depth):
        block = f"blocks.{i}"
        scale_x, gate_x, scale_mlp_x, gate_mlp_x = linear(f"{block}.mod_x", visual).chunk(4, dim=-1)
        of_text = linear(f"{block}.mod_y", text).unflatten(-1, (-1, y.shape[-1]))  # (4, Dy), in the last block (1, Dy)
        q, k, v = heads(block, "x", norm(x) * (1 + scale_x))
        q_y, k_y, v_y = heads(block, "y", norm(y) * (1 + of_text[0]))
        q, k, v = torch.cat((rotated(q), q_y)), torch.cat((rotated(k), k_y)), torch.cat((v, v_y))  # (N + L, K, D)
        weights = torch.einsum("ikd,jkd->kij", q, k).div(math.sqrt(DIM)).softmax(-1)
        out = torch.einsum("kij,jkd->ikd", weights, v).flatten(1)  # (N + L, Dx)
        x = x + norm(linear(f"{block}.attn.proj_x", out[: len(x)])) * gate_x.tanh()
        x = x + norm(feed_forward(f"{block}.mlp_x", norm(x) * (1 + scale_mlp_x))) * gate_mlp_x.tanh()
        if i < dit.config.depth - 1:
            _, gate_y, scale_mlp_y, gate_mlp_y = of_text
            y = y + norm(linear(f"{block}.attn.proj_y", out[len(visual) :])) * gate_y.tanh()
            y = y + norm(feed_forward(f"{block}.mlp_y", norm(y) * (1 + scale_mlp_y))) * gate_mlp_y.tanh()
    shift, scale = linear("final_layer.mod", visual).chunk(2, dim=-1)
    tokens = linear("final_layer.linear", F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift)
    return (
        tokens.unflatten(1, (2, 2, -1))
        .unflatten(0, (frames, rows, columns))
        .permute(5, 0, 1, 3, 2, 4)
        .reshape(latents.shape)
    )


def video(batch=1, seed=3):
    return torch.randn(batch, 12, *SIZE, generator=torch.Generator().manual_seed(seed))


def test_a_forward_is_the_published_one(dit):
    (latents, _, embeds, mask), sigma = inputs([9], SIZE), 0.7 * LEVELS
    expected = published_velocity(random_dit(), latents.double(), sigma.double(), embeds[0, :9].double())
    result = dit(latents, sigma[None], embeds, mask)
    assert (result - expected).norm() / expected.norm() < 1e-5
    scalar = dit(latents, torch.tensor([0.7]), embeds, mask)
    assert (scalar - expected).norm() / expected.norm() > 0.05, "the levels make no difference"


def test_a_run_is_the_published_one(dit):
    """The start, the levels of each step and Euler's differences, per frame, with guidance."""
    noise, clean, (cond, mask), scale = video(), video(seed=4), prompt(6), 3.0
    given = sample(dit, noise, SIGMAS, (cond, mask), prompt(2, seed=5), scale, given=Given(clean, LEVELS))
    negative, independent = prompt(2, seed=5)[0][0, :2].double(), random_dit()
    multiplier = LEVELS.double().view(-1, 1, 1)
    x = (1 - SIGMAS[0] * multiplier) * clean.double() + SIGMAS[0] * multiplier * noise.double()
    for now, following in zip(SIGMAS[:-1].double(), SIGMAS[1:].double(), strict=True):
        positive = published_velocity(independent, x, now * LEVELS.double(), cond[0, :6].double())
        unconditional = published_velocity(independent, x, now * LEVELS.double(), negative)
        x = x + (now - following) * multiplier * (unconditional + scale * (positive - unconditional))
    assert (given - x).norm() / x.norm() < 1e-5
    assert torch.equal(given[:, :, 0], clean[:, :, 0]), "a frame without noise is kept as it is"


@pytest.mark.parametrize("batch", [1, 2])
def test_equal_levels_change_nothing(dit, batch):
    latents, _, embeds, mask = inputs([9, 0][:batch], SIZE)
    sigma = torch.tensor([0.8, 0.3][:batch])
    by_frame = dit(latents, sigma[:, None].expand(-1, SIZE[0]), embeds, mask)
    expected = dit(latents, sigma, embeds, mask)
    assert (by_frame - expected).norm() / expected.norm() < 1e-6
    noise, conditions = video(batch), (prompt(6), prompt(3, seed=1))
    new = Given(torch.full_like(noise, torch.nan), torch.ones(SIZE[0]))
    run, expected = (sample(dit, noise, SIGMAS, *conditions, given=given) for given in (new, None))
    torch.testing.assert_close(run, expected, rtol=1e-5, atol=1e-5)


def test_a_schedule_has_each_level_once_and_gives_every_step(dit):
    pooled = dit.prepare_text(*prompt(6, batch=2)).pooled
    sigmas = frame_levels(SIGMAS[:-1], LEVELS)
    schedule = dit.schedule_modulation(sigmas, pooled)
    assert len(schedule.levels.final) == len({*sigmas.flatten().tolist()}) < sigmas.numel()
    for step, sigma in enumerate(sigmas):
        ours, expected = schedule.at(step), dit.modulation(sigma.expand(2, -1), pooled)
        assert ours.final.shape == (2, *SIZE[:1], 2 * DIT.hidden_size_x)
        torch.testing.assert_close(ours.final, expected.final, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.blocks, expected.blocks, rtol=1e-5, atol=1e-5)


def test_a_batch_and_a_cache_give_each_video_what_it_would_be_alone(dit):
    noise, clean = video(2), video(2, seed=4)
    conditions = prompt(6), prompt(3, seed=1)

    def run(videos):
        cache = BlockCache("teacache", 0.3)
        return sample(dit, noise[videos], SIGMAS, *conditions, given=Given(clean[videos], LEVELS), cache=cache), cache

    together, cache = run(slice(2))
    assert cache.hits > 0
    for i in range(2):
        alone, _ = run(slice(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_a_guided_pair_by_frame_equals_two_passes(dit):
    noise, sigmas = video(), frame_levels(SIGMAS, LEVELS)
    conditions = [prompt(6), prompt(0, seed=1)]
    pair = prepared_velocities(dit, noise, sigmas, conditions)(noise, 2, 2)
    for velocity, condition in zip(pair, conditions, strict=True):
        assert torch.equal(velocity, prepared_velocities(dit, noise, sigmas, [condition])(noise, 2, 1)[0])


@pytest.mark.parametrize(
    ("latents", "levels", "message"),
    [
        ((1, 12, 3, 4, 6), torch.ones(4), "do not fit"),
        ((1, 12, *SIZE), torch.ones(3), "a level for each of 4 frames"),
        ((1, 12, *SIZE), torch.tensor([0, 1, 1.5, 1]), r"use 0 \(kept\) to 1 \(new\)"),
        ((1, 12, *SIZE), torch.tensor([0, 1, torch.nan, 1]), r"use 0 \(kept\) to 1 \(new\)"),
    ],
)
def test_what_does_not_fit_is_refused(dit, latents, levels, message):
    with pytest.raises(ValueError, match=message):
        sample(dit, video(), SIGMAS, prompt(6), guidance_scale=1, given=Given(torch.zeros(latents), levels))
