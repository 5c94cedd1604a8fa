"""Sampling: Euler steps along a velocity, and the network as velocities.

The state is x = sigma * noise + (1 - sigma) * data, so its derivative along falling sigma is velocity = data - noise, and
an Euler step is x + (sigma_i - sigma_{i+1}) * velocity. State and guidance are float32 whatever dtype the network computes in.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ..autoencoder.latents import latents_problem
from ..parallel.group import Alone
from ..parallel.team import Members, agree
from ..transformer.attention import Attention, choose_attention, sdpa
from ..transformer.block import RunBlock, run_block
from ..transformer.conditioning import ScheduleModulation, TextConditioning
from ..transformer.model import AsymmDiT
from .block_cache import BlockCache
from .given import Given, frame_levels
from .guidance import (
    PLAIN,
    Guidance,
    PairModulation,
    Velocities,
    Velocity,
    guided,
    with_nag,
    without_blocks,
)
from .schedule import check_falling, check_guidance
from .together import OnStep, counted_together, exchanged, facts, stopping_all

EncodedPrompts = tuple[Tensor, Tensor]
"""One side of guidance for all videos: text_embeds (B or 1, L, text_width) and text_mask (B or 1, L) bool."""
Prepared = tuple[TextConditioning, ScheduleModulation | PairModulation]
"""A condition prepared for the denoiser, for a whole schedule."""


def euler(velocity: Velocity, latents: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Move latents (B, C, T, H, W) from sigmas[0] to sigmas[-1], in float32, with one call of `velocity` per step.

    `sigmas` is (steps + 1,), or (steps + 1, T) for per-frame noise levels.
    """
    latents = latents.float()
    for step, fall in enumerate(_falls(sigmas, latents.device)):
        latents = latents + fall * velocity(latents, step).float()
        if on_step is not None and on_step(step, latents):
            break
    return latents


def _falls(sigmas: Tensor, device: torch.device) -> Sequence[float] | Tensor:
    """How far the noise falls in each step: numbers, or (steps, T, 1, 1) for per-frame levels."""
    if sigmas.ndim == 1:
        return [now - following for now, following in pairwise(sigmas.tolist())]
    by_frame = [[*map(operator.sub, *levels)] for levels in pairwise(sigmas.tolist())]
    return torch.tensor(by_frame, device=device)[..., None, None]


def holding(velocity: Velocity, given: Given, start: Tensor, sigmas: Tensor) -> Velocity:
    """`velocity`, except that held frames go straight from `start` (B, C, T, H, W), at sigmas[0], to the given ones."""
    straight = (given.latents.to(start) - start) / sigmas[0]
    levels = sigmas.tolist()
    return lambda latents, step: given.hold(velocity(latents, step), straight, levels[step])


def scale_per_step(guidance_scale: float | Sequence[float], num_steps: int) -> list[float]:
    """One guidance scale per step.

    Raises:
        ValueError: the length of a sequence differs from the number of steps, or a scale is not finite.
    """
    if isinstance(guidance_scale, int | float):
        guidance_scale = [guidance_scale] * num_steps
    scales = [float(scale) for scale in guidance_scale]
    if len(scales) != num_steps:
        raise ValueError(
            f"guidance_scale has {len(scales)} entries; {num_steps} steps need one each, or a single number."
        )
    for scale in scales:
        check_guidance("guidance_scale", scale)
    return scales


def prepared_velocities(
    dit: AsymmDiT,
    noise: Tensor,
    sigmas: Tensor,
    conditions: Sequence[EncodedPrompts],
    attend: Attention = sdpa,
    cache: BlockCache | None = None,
    guidance: Guidance = PLAIN,
    members: Members | None = None,
) -> Velocities:
    """The network's velocities, with everything that does not depend on the latents computed once for all steps.

    `noise` (B, C, T, H, W) gives the shape and device of the latents, `sigmas` the schedule (steps + 1,), or (steps + 1, T) for
    per-frame noise levels. Conditions, the prompt and then the negative one, share a pass over the weights, see
    `AsymmDiT.denoise_each`, or are divided among `members`, which exchange their velocities.
    """
    if members is not None and members.guidance.size > 1:
        halves, alone = members.guidance, replace(members, guidance=Alone())
        prompts = [conditions if guidance.uses_nag else conditions[:1], conditions[1:]][halves.rank]
        ours = guidance if halves.rank == 0 else PLAIN
        own = prepared_velocities(dit, noise, sigmas, prompts, attend, cache, ours, alone)
        return exchanged(own, 1 + bool(guidance.skip_blocks), halves, dit.dtype)
    each = [prepare_prompts(dit, noise, sigmas, encoded) for encoded in conditions]
    prepared: list[Prepared] = [*each]
    runs: list[RunBlock] = [run_block for _ in each]
    if guidance.uses_nag:
        prepared[0], runs[0] = with_nag(guidance, *each[0], *each[1])
    if guidance.skip_blocks:
        prepared[:1] = prepared[:1] * 2
        runs[:1] = without_blocks(guidance.skip_blocks, runs[0], shared=cache is None)
    rope, group = dit.rope(noise.shape, noise.device), members and members.tokens
    num_steps, depth = len(sigmas) - 1, dit.config.depth
    blocks_at = [lambda _, run=run: run for run in runs]
    if cache is not None:
        total = group.total if group is not None and group.size > 1 else None
        blocks_at = [cache.for_condition(len(noise), num_steps, depth, run, total) for run in runs]

    def velocities(latents: Tensor, step: int, count: int) -> list[Tensor]:
        at_step = [(text, modulation.at(step)) for text, modulation in prepared[:count]]
        run_blocks = [at(step) for at in blocks_at[:count]]
        latents = latents.to(dit.dtype)
        return dit.denoise_each(latents, at_step, rope, attend=attend, run_blocks=run_blocks, group=group)

    return velocities


def prepare_prompts(
    dit: AsymmDiT, noise: Tensor, sigmas: Tensor, encoded: EncodedPrompts
) -> tuple[TextConditioning, ScheduleModulation]:
    """Text for the batch of `noise` (B, C, T, H, W), and modulation for all steps of `sigmas` (steps + 1,) or (steps + 1, T).

    Raises:
        ValueError: there is neither a single prompt nor one per video.
    """
    embeds, mask = encoded
    batch = noise.shape[0]
    if len(embeds) not in (1, batch):
        raise ValueError(
            f"There are prompts for {len(embeds)} videos, but noise for {batch}; give one prompt each, or one for all."
        )
    text = dit.prepare_text(embeds.to(noise.device, dit.dtype), mask.to(noise.device))
    modulation = dit.schedule_modulation(sigmas[:-1], text.pooled)
    if len(embeds) < batch:
        text = TextConditioning(text.tokens.expand(batch, -1, -1), text.lengths * batch, text.pooled)
    return text, modulation


@torch.no_grad()
def sample(
    dit: AsymmDiT,
    noise: Tensor,
    sigmas: Tensor,
    cond: EncodedPrompts,
    uncond: EncodedPrompts | None = None,
    guidance_scale: float | Sequence[float] = 4.5,
    on_step: OnStep | None = None,
    attention: str = "auto",
    cache: BlockCache | None = None,
    given: Given | None = None,
    guidance: Guidance = PLAIN,
    members: Members | None = None,
) -> Tensor:
    """Denoise with Euler steps and classifier-free guidance, on the device of `dit`.

    Args:
        noise: (B, C, T, H, W) latents in DiT space at noise level sigmas[0]; pure noise for text to video.
        sigmas: (steps + 1,) falling noise levels.
        cond, uncond: see `EncodedPrompts`; `uncond` may be None when every guidance scale is 1 and there is no NAG.
        guidance_scale: one number, or one per step. Steps with 1 cost a single forward pass.
        on_step: called as on_step(step, latents) after each step; returning True stops the run.
        attention: one of `attention.ATTENTIONS`; "auto" is the fastest exact one for the device.
        cache: skips blocks when little changes; after the run it keeps only its counters.
        given: frames that the video is made from, see `given`. Without `held`, they are for weights trained with per-frame
            noise levels.
        guidance: additions to classifier-free guidance.
        members: devices to share the work with, which call this with the same arguments, except for `on_step`; each gets the
            whole result, and if one stops the run, it stops for all after the same step.

    Returns:
        DiT-space latents, float32, on the device of `noise`.

    Raises:
        ValueError: guidance without `uncond`, mismatched lengths or shapes, no step, rising noise levels, non-finite numbers, or
            an attention that cannot be used here.
    """
    check_falling(sigmas)
    if problem := latents_problem(noise, dit.config.in_channels):
        raise ValueError(problem)
    guidance.check_depth(dit.config.depth)
    scales = scale_per_step(guidance_scale, len(sigmas) - 1)
    # The working device: weights may be offloaded elsewhere, but position frequencies never are.
    state = noise.to(dit.pos_frequencies.device, torch.float32)
    schedule = sigmas
    if given is not None:
        given.check(state)
    if given is not None and not given.held:
        state, schedule = given.start(state), frame_levels(sigmas, given.levels)
    conditions = _conditions_used(cond, uncond, scales, guidance)
    if members is not None:
        members.plan.check(members.world.size, dit.config.num_heads, guided=any(scale != 1 for scale in scales))
        agree(members.world, facts(dit, state, schedule, conditions, (scales, guidance), cache, given))
        on_step = stopping_all(on_step, members)
    attend = choose_attention(attention, state.device, dit.dtype, dit.config.head_dim).run
    velocities = prepared_velocities(dit, state, schedule, conditions, attend, cache, guidance, members)
    velocity = guided(velocities, scales, guidance)
    if given is not None and given.held:
        velocity = holding(velocity, given, state, sigmas)
    with counted_together(cache, members):
        return euler(velocity, state, schedule, on_step).to(noise.device)


def _conditions_used(
    cond: EncodedPrompts, uncond: EncodedPrompts | None, scales: Sequence[float], guidance: Guidance
) -> list[EncodedPrompts]:
    """The prompt, and the negative one if guidance needs it; ValueError if it is then None."""
    if not guidance.uses_nag and all(scale == 1 for scale in scales):
        return [cond]
    if uncond is None:
        asking = "nag_scale" if guidance.uses_nag else "guidance_scale"
        raise ValueError(f"{asking} is not 1, so `uncond` is needed; pass the encoded negative prompt.")
    return [cond, uncond]
