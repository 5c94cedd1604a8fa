"""What members of a group do in tests; the same with None for a group is what one device does."""

from __future__ import annotations

import functools

import torch

from mochi_core import AsymmDiTConfig, BlockCache, sample
from mochi_core.parallel.plan import Members, Plan
from mochi_core.sampling.block_cache import CachedBlocks
from tests.harness.random_inputs import SIGMAS, inputs, prompt
from tests.harness.tiny_models import TEXT_WIDTH, random_dit

# As many heads as Mochi has, which Ulysses shares out.
HEADS_24 = AsymmDiTConfig(
    depth=3, hidden_size_x=192, hidden_size_y=96, num_heads=24, text_width=TEXT_WIDTH, mlp_size_x=256, mlp_size_y=128
)


@functools.cache
def model():
    return random_dit(HEADS_24)


@torch.no_grad()
def denoise(group, plan, lengths, size, tokens=16, levels=None):
    """A velocity for prompts of these lengths, and the bytes that this member sent meanwhile."""
    dit = model()
    latents, sigma, embeds, mask = inputs(lengths, size, tokens=tokens)
    if levels is not None:
        sigma = sigma[:, None] * torch.tensor(levels)
    text = dit.prepare_text(embeds, mask)
    members = group and Members.of(group, Plan.parse(plan))
    velocity = dit.denoise(
        latents,
        text,
        dit.modulation(sigma, text.pooled),
        dit.rope(latents.shape, latents.device),
        group=members and members.tokens,
    )
    return velocity, sent(members)


def sent(members):
    return members and members.guidance.sent + members.tokens.ulysses.sent + members.tokens.ring.sent


def run(group, plan, *, scales=4.5, cache=None, stop=None, **options):
    """A whole run, and hits of the cache; it is stopped by member 0 after step `stop`."""
    members = group and Members.of(group, Plan.parse(plan))
    cache = cache and BlockCache(*cache)
    steps = []

    def on_step(step, _):
        steps.append(step)
        return step == stop and (group is None or group.rank == 0)

    noise = torch.randn(1, 12, 3, 6, 10, generator=torch.Generator().manual_seed(7))
    video = sample(
        model(),
        noise,
        SIGMAS,
        prompt(6),
        prompt(3, seed=1),
        scales,
        on_step if stop is not None else None,
        cache=cache,
        members=members,
        **options,
    )
    return video, cache and (cache.forwards, cache.hits), steps


def run_with_a_bent_decision(group, plan):
    """Member 1 takes every change for a large one."""
    skips = CachedBlocks._skips
    if group.rank == 1:
        CachedBlocks._skips = lambda self, state, signal: skips(self, state, signal) and False
    try:
        return run(group, plan, cache=("teacache", 0.3))
    finally:
        CachedBlocks._skips = skips


def run_with_own_scales(group, plan):
    return run(group, plan, scales=4.5 + group.rank)
