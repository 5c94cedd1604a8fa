"""Edit a given video, with functions over velocities: FlowEdit, and inversion with rectified flows (RF inversion).

Neither needs training. They preserve the video by following the model's own velocities for it, so the prompts must describe what
stays as well as what changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..autoencoder.latents import latents_problem
from ..transformer.attention import choose_attention
from ..transformer.model import AsymmDiT
from .guidance import Velocity, guided
from .sample import EncodedPrompts, OnStep, prepared_velocities
from .schedule import check_falling, check_guidance, check_schedule

TRENDS = ("constant", "linear_decrease", "linear_increase")
"""How the pull of `rf_edit` changes over its window; named as in MochiEdit (logtd/ComfyUI-MochiEdit)."""
ROUNDING = 1e-5
"""How far above 1 the last level of a schedule may be: shifting in float32 gives 1 + 1e-7 to 1 + 1e-6."""


def flow_edit(
    source: Velocity,
    target: Velocity,
    clean: Tensor,
    sigmas: Tensor,
    noise: Callable[[], Tensor],
    on_step: OnStep | None = None,
) -> Tensor:
    """FlowEdit (arXiv 2412.08629): the video moves by the difference of two velocities, without ever becoming noise.

    Args:
        source, target: velocities under the prompts of the original and of the edited video.
        clean: (B, C, T, H, W), the video in DiT space.
        sigmas: (steps + 1,) falling noise levels; the first determines how much may change.
        noise: returns fresh noise of the shape of `clean` at every step.
        on_step: called as on_step(step, edited latents) after each step; returning True stops.

    Returns:
        float32 (B, C, T, H, W); bit for bit `clean` if `source` and `target` are the same function.
    """
    clean = clean.float()
    moved = torch.zeros_like(clean)  # separate from `clean`, so that rounding cannot make equal velocities differ
    for step, (now, following) in enumerate(pairwise(sigmas.tolist())):
        noised = (1 - now) * clean + now * noise().to(clean)
        moved = moved + (now - following) * (target(noised + moved, step) - source(noised, step)).float()
        if on_step is not None and on_step(step, clean + moved):
            break
    return clean + moved


def invert(
    velocity: Velocity,
    clean: Tensor,
    sigmas: Tensor,
    gamma: float = 0.0,
    noise: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The noise that a video comes from: Euler steps along rising noise levels, Algorithm 1 of arXiv 2410.10792.

    Args:
        velocity: under the prompt of the video or an empty one; without guidance, which cannot be inverted.
        clean: (B, C, T, H, W) in DiT space, at noise level sigmas[0].
        sigmas: (steps + 1,) rising noise levels; only the last may be 1.
        gamma: 0 follows the velocity, 1 goes straight to `noise`, without which it is ignored.
        noise: (B, C, T, H, W), standard normal.
        on_step: called as on_step(step, latents) after each step; returning True stops.

    Returns:
        float32 (B, C, T, H, W) at noise level sigmas[-1].

    Raises:
        ValueError: the noise levels do not rise.
    """
    check_rising(sigmas)
    latents = clean.float()
    for step, (now, following) in enumerate(pairwise(sigmas.tolist())):
        upwards = -velocity(latents, step).float()
        if gamma and noise is not None:
            upwards = torch.lerp(upwards, (noise.to(latents) - latents) / (1 - now), gamma)
        latents = latents + (following - now) * upwards
        if on_step is not None and on_step(step, latents):
            break
    return latents


def check_rising(sigmas: Tensor) -> None:
    """Raise a ValueError unless noise levels rise from step to step and only the last reaches 1, up to `ROUNDING`."""
    check_schedule(sigmas)
    if not (sigmas[1:] > sigmas[:-1]).all():
        raise ValueError(
            "Inversion goes from a video to noise, so its noise levels must rise; reverse the schedule (FlipSigmas)."
        )
    before, last = sigmas[-2:].tolist()
    if last > 1 + ROUNDING or before >= 1:
        raise ValueError(f"sigmas continue from {before:.7g} to {last:.7g}, but pure noise is level 1; end there.")


def rf_edit(
    velocity: Velocity,
    latents: Tensor,
    clean: Tensor,
    sigmas: Tensor,
    etas: Sequence[float],
    on_step: OnStep | None = None,
) -> Tensor:
    """From noise to a video that is pulled towards a given one, Algorithm 2 of arXiv 2410.10792.

    Args:
        velocity: under the prompt of the edited video.
        latents: (B, C, T, H, W) at noise level sigmas[0], such as the result of `invert`.
        clean: (B, C, T, H, W), the given video in DiT space.
        sigmas: (steps + 1,) falling noise levels.
        etas: the pull in each step, see `pulls`: 0 is none, 1 goes straight to `clean`, and reaches it if kept to the end.
        on_step: called as on_step(step, latents) after each step; returning True stops.

    Returns:
        float32 (B, C, T, H, W) at noise level sigmas[-1].

    Raises:
        ValueError: noise levels rise.
    """
    check_falling(sigmas)
    latents, clean = latents.float(), clean.to(latents.device, torch.float32)
    for step, (now, following) in enumerate(pairwise(sigmas.tolist())):
        downwards = velocity(latents, step).float()
        if etas[step] and now > following:
            downwards = torch.lerp(downwards, (clean - latents) / now, etas[step])
        latents = latents + (now - following) * downwards
        if on_step is not None and on_step(step, latents):
            break
    return latents


def pulls(sigmas: Tensor, eta: float, start: float, end: float, trend: str = "constant") -> list[float]:
    """The pull of `rf_edit` in each step of `sigmas` (steps + 1,): `eta` at noise levels from `start` down to `end`, else 0.

    Depending on `trend`, it is constant over those steps, falls to 0 or rises from 0. A level above 1 counts as 1.

    Raises:
        ValueError: the trend is unknown, a number is outside [0, 1], or `start` is below `end`.
    """
    if trend not in TRENDS:
        raise ValueError(f"The trend is {trend!r}; use one of {', '.join(TRENDS)}.")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta:g}, but must be from 0 (no pull) to 1 (straight to the given video).")
    for name, level in (("from", start), ("down to", end)):
        if not 0 <= level <= 1:
            raise ValueError(f"The pull is {name} noise level {level:g}; use a level from 0 to 1.")
    if start < end:
        raise ValueError(f"start is {start:g}, below the end {end:g}, but noise falls from start to end; swap the two.")
    within = [step for step, sigma in enumerate(sigmas[:-1].tolist()) if end <= min(sigma, 1.0) <= start]
    values = [0.0] * (len(sigmas) - 1)
    for i, step in enumerate(within):
        passed = i / max(1, len(within) - 1)
        values[step] = eta * {"constant": 1, "linear_decrease": 1 - passed, "linear_increase": passed}[trend]
    return values


@torch.no_grad()
def edit(
    dit: AsymmDiT,
    clean: Tensor,
    sigmas: Tensor,
    source: EncodedPrompts,
    target: EncodedPrompts,
    negative: EncodedPrompts,
    source_scale: float = 1.5,
    scale: float = 5.5,
    seed: int = 0,
    attention: str = "auto",
    on_step: OnStep | None = None,
) -> Tensor:
    """FlowEdit of `clean` (B, C, T, H, W), in DiT space, with two guided velocities of `dit`: four forward passes per step.

    Args:
        sigmas: (steps + 1,) falling noise levels, e.g. from `schedule.schedule_below`.
        source, target, negative: prompts of the original video, of the edited one, and for what neither shows; see
            `sample.EncodedPrompts`.
        source_scale, scale: guidance scales of both; the defaults are FlowEdit's for FLUX.
        seed: of the noise, which is generated on the CPU.
        attention: one of `attention.ATTENTIONS`.
        on_step: called as on_step(step, edited latents) after each step; returning True stops.

    Returns:
        DiT-space latents, float32, on the device of `clean`.

    Raises:
        ValueError: `clean` are not Mochi latents, prompts do not fit them, there is no step, noise levels rise, or a number is
            not finite.
    """
    check_falling(sigmas)
    check_guidance("source_scale", source_scale)
    check_guidance("scale", scale)
    if problem := latents_problem(clean, dit.config.in_channels):
        raise ValueError(problem)
    state = clean.to(dit.pos_frequencies.device, torch.float32)
    attend = choose_attention(attention, state.device, dit.dtype, dit.config.head_dim).run
    steps = len(sigmas) - 1
    from_source, to_target = (
        guided(prepared_velocities(dit, state, sigmas, [prompt, negative], attend), [each] * steps)
        for prompt, each in ((source, source_scale), (target, scale))
    )
    return flow_edit(from_source, to_target, state, sigmas, fresh_noise(state, seed), on_step).to(clean.device)


@torch.no_grad()
def edit_by_inversion(
    dit: AsymmDiT,
    clean: Tensor,
    sigmas: Tensor,
    source: EncodedPrompts,
    target: EncodedPrompts,
    negative: EncodedPrompts,
    scale: float = 4.5,
    eta: float = 0.8,
    start: float = 1.0,
    end: float = 0.8,
    attention: str = "auto",
    on_step: OnStep | None = None,
) -> Tensor:
    """RF inversion of `clean` (B, C, T, H, W), in DiT space, then `rf_edit` of the result: three forward passes per step.

    Args:
        sigmas: (steps + 1,) noise levels from 1 down to 0, which inversion follows in reverse.
        source, target, negative: see `edit`; inversion follows `source` without guidance.
        scale: guidance on the way back.
        eta, start, end: see `pulls`.
        attention: one of `attention.ATTENTIONS`.
        on_step: called as on_step(step, latents) after each of the 2 * steps steps; returning True stops the run.

    Returns:
        DiT-space latents, float32, on the device of `clean`; those of the last step if the run was stopped.

    Raises:
        ValueError: see `edit` and `pulls`.
    """
    check_guidance("scale", scale)
    etas = pulls(sigmas, eta, start, end)
    rising, steps = sigmas.flip(0), len(sigmas) - 1
    check_rising(rising)
    if problem := latents_problem(clean, dit.config.in_channels):
        raise ValueError(problem)
    state = clean.to(dit.pos_frequencies.device, torch.float32)
    attend = choose_attention(attention, state.device, dit.dtype, dit.config.head_dim).run
    up = guided(prepared_velocities(dit, state, rising, [source], attend), [1.0] * steps)
    down = guided(prepared_velocities(dit, state, sigmas, [target, negative], attend), [scale] * steps)

    stopped = False

    def counted_from(first: int) -> OnStep:
        def counted(step: int, latents: Tensor) -> bool:
            nonlocal stopped
            stopped = on_step is not None and bool(on_step(first + step, latents))
            return stopped

        return counted

    found = invert(up, state, rising, on_step=counted_from(0))
    if not stopped:
        found = rf_edit(down, found, state, sigmas, etas, counted_from(steps))
    return found.to(clean.device)


def fresh_noise(latents: Tensor, seed: int) -> Callable[[], Tensor]:
    """A function that returns standard normal float32 noise of the shape of `latents`, different at every call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(latents.shape, generator=generator)
