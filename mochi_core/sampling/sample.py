"""Sampling: guidance and Euler steps as plain functions over a velocity.

The state is x = sigma * noise + (1 - sigma) * data, so its derivative along falling sigma is velocity = data - noise, and
an Euler step is x + (sigma_i - sigma_{i+1}) * velocity. State and guidance are float32 whatever the network computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..transformer.attention import Attention, choose_attention, sdpa
from ..transformer.model import AsymmDiT, Modulation, TextConditioning
from .block_cache import BlockCache

Velocity = Callable[[Tensor, int], Tensor]
"""(latents, step) -> velocity at the noise level of that step."""
Velocities = Callable[[Tensor, int, int], list[Tensor]]
"""(latents, step, count) -> velocities at the noise level of that step under the first `count` conditions."""
OnStep = Callable[[int, Tensor], bool | None]
"""(step, latents after that step) -> True to stop the run."""
Condition = tuple[Tensor, Tensor]
"""text_embeds (B or 1, L, text_width) and text_mask (B or 1, L) bool."""


def euler(velocity: Velocity, latents: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Latents (B, C, T, H, W) moved from sigmas[0] to sigmas[-1], in float32, with one call of `velocity` per step."""
    levels = sigmas.tolist()
    latents = latents.float()
    for step in range(len(levels) - 1):
        latents = latents + (levels[step] - levels[step + 1]) * velocity(latents, step).float()
        if on_step is not None and on_step(step, latents):
            break
    return latents


def guided(velocities: Velocities, scales: Sequence[float]) -> Velocity:
    """Classifier-free guidance: uncond + scale * (cond - uncond), with one scale per step.

    The conditions of `velocities` are the positive prompt and then the negative one; scale 1 asks for the first only.
    """

    def velocity(latents: Tensor, step: int) -> Tensor:
        if scales[step] == 1:
            return velocities(latents, step, 1)[0].float()
        cond, uncond = (each.float() for each in velocities(latents, step, 2))
        return uncond + scales[step] * (cond - uncond)

    return velocity


def scale_per_step(guidance_scale: float | Sequence[float], num_steps: int) -> list[float]:
    """One guidance scale per step.

    Raises:
        ValueError: a sequence of another length than the number of steps.
    """
    if isinstance(guidance_scale, int | float):
        return [float(guidance_scale)] * num_steps
    scales = [float(scale) for scale in guidance_scale]
    if len(scales) != num_steps:
        raise ValueError(
            f"guidance_scale has {len(scales)} entries; {num_steps} steps need one each, or a single number."
        )
    return scales


def prepared_velocities(
    dit: AsymmDiT,
    noise: Tensor,
    sigmas: Tensor,
    conditions: Sequence[Condition],
    attention: Attention = sdpa,
    cache: BlockCache | None = None,
) -> Velocities:
    """The network's velocities, with everything that does not depend on the latents computed once for all steps.

    `noise` (B, C, T, H, W) gives the shape and device of the latents, `sigmas` (steps + 1,) the schedule. Conditions share a
    pass over the weights, see `AsymmDiT.denoise_each`.
    """
    prepared = [prepare_condition(dit, noise, sigmas, condition) for condition in conditions]
    rope = dit.rope(noise.shape, noise.device)
    num_steps, depth = len(sigmas) - 1, dit.config.depth
    cached = [] if cache is None else [cache.for_condition(len(noise), num_steps, depth) for _ in conditions]

    def velocities(latents: Tensor, step: int, count: int) -> list[Tensor]:
        at_step = [(text, modulation.at(step)) for text, modulation in prepared[:count]]
        run_blocks = [blocks_at(step) for blocks_at in cached[:count]] or None
        return dit.denoise_each(latents.to(dit.dtype), at_step, rope, attention=attention, run_blocks=run_blocks)

    return velocities


def prepare_condition(
    dit: AsymmDiT, noise: Tensor, sigmas: Tensor, condition: Condition
) -> tuple[TextConditioning, Modulation]:
    """Text for the batch of `noise` (B, C, T, H, W), and the modulation of all steps with leading axes (steps, B or 1).

    Raises:
        ValueError: neither one prompt nor one for each video.
    """
    embeds, mask = condition
    batch = noise.shape[0]
    if len(embeds) not in (1, batch):
        raise ValueError(
            f"There are prompts for {len(embeds)} videos but noise for {batch}; give one prompt each, or one."
        )
    text = dit.prepare_text(embeds.to(noise.device, dit.dtype), mask.to(noise.device))
    modulation = dit.modulation(sigmas[:-1, None].to(noise.device), text.pooled)
    if len(embeds) < batch:
        text = TextConditioning(text.tokens.expand(batch, -1, -1), text.lengths * batch, text.pooled)
    return text, modulation


@torch.no_grad()
def sample(
    dit: AsymmDiT,
    noise: Tensor,
    sigmas: Tensor,
    cond: Condition,
    uncond: Condition | None = None,
    guidance_scale: float | Sequence[float] = 4.5,
    on_step: OnStep | None = None,
    attention: str = "auto",
    cache: BlockCache | None = None,
) -> Tensor:
    """Denoise with Euler steps and classifier-free guidance, on the device of `dit`.

    Args:
        noise: (B, C, T, H, W) latents in DiT space at noise level sigmas[0]; pure noise for text to video.
        sigmas: (steps + 1,) falling noise levels.
        cond, uncond: see `Condition`; `uncond` may be None when every guidance scale is 1.
        guidance_scale: one number, or one per step. Steps with 1 cost a single forward.
        on_step: called as on_step(step, latents) after each step; returning True stops the run.
        attention: one of `attention.ATTENTIONS`; "auto" is the fastest exact one for the device.
        cache: skips blocks where little changes; after the run it keeps nothing but its counters.

    Returns:
        DiT-space latents, float32, on the device of `noise`.

    Raises:
        ValueError: guidance without `uncond`, lengths that do not fit, or an attention that cannot be used here.
    """
    scales = scale_per_step(guidance_scale, len(sigmas) - 1)
    # The working device: offloaded weights lie elsewhere, positions never do.
    state = noise.to(dit.pos_frequencies.device, torch.float32)
    conditions = [cond]
    if any(scale != 1 for scale in scales):
        if uncond is None:
            raise ValueError("guidance_scale is not 1, so `uncond` is needed; pass the encoded negative prompt.")
        conditions.append(uncond)
    attend = choose_attention(attention, state.device, dit.dtype, dit.config.head_dim).run
    velocities = prepared_velocities(dit, state, sigmas, conditions, attend, cache)
    return euler(guided(velocities, scales), state, sigmas, on_step).to(noise.device)
