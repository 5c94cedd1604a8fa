"""Editing a given video, as functions over velocities: FlowEdit, and inversion with rectified flows (RF inversion).

Both need no training. What they keep of the video they keep by following the model's own velocities for it, so the prompts have
to say what stays as well as what changes.
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
"""How the pull of `rf_edit` changes over its window; names of MochiEdit (logtd/ComfyUI-MochiEdit)."""
ROUNDING = 1e-5
"""How far above 1 the last level of a schedule may be: a shift in float32 gives 1 + 1e-7 to 1 + 1e-6."""


def flow_edit(
    source: Velocity,
    target: Velocity,
    clean: Tensor,
    sigmas: Tensor,
    noise: Callable[[], Tensor],
    on_step: OnStep | None = None,
) -> Tensor:
    """FlowEdit (arXiv 2412.08629): the video moves by the difference of two velocities, without ever being noise itself.

    Args:
        source, target: velocities under the prompt of the video, and under that of the edited one.
        clean: (B, C, T, H, W), the video in DiT space.
        sigmas: (steps + 1,) falling noise levels; the first says how much may change.
        noise: gives new noise of the shape of `clean` at every step.
        on_step: called as on_step(step, edited latents) after each step; returning True stops.

    Returns:
        float32 (B, C, T, H, W); bit for bit `clean` where `source` and `target` are the same function.
    """
    clean = clean.float()
    moved = torch.zeros_like(clean)  # apart from `clean`, so that no rounding makes a difference of equal velocities
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
        velocity: under the prompt of the video, or none; without guidance, which cannot be gone back through.
        clean: (B, C, T, H, W) in DiT space, at noise level sigmas[0].
        sigmas: (steps + 1,) rising noise levels; only the last may be 1.
        gamma: 0 follows the velocity, 1 goes straight to `noise`, which it needs.
        noise: (B, C, T, H, W), standard normal.
        on_step: called as on_step(step, latents) after each step; returning True stops.

    Returns:
        float32 (B, C, T, H, W) at noise level sigmas[-1].

    Raises:
        ValueError: levels that do not rise.
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
    """Raise a ValueError unless noise levels rise from step to step, and only the last is 1, but for `ROUNDING`."""
    check_schedule(sigmas)
    if not (sigmas[1:] > sigmas[:-1]).all():
        raise ValueError(
            "Inversion goes from a video to noise, so its noise levels have to rise; turn the schedule round (FlipSigmas)."
        )
    before, last = sigmas[-2:].tolist()
    if last > 1 + ROUNDING or before >= 1:
        raise ValueError(f"sigmas go on from {before:.7g} to {last:.7g}, but noise alone is level 1; end there.")


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
        latents: (B, C, T, H, W) at noise level sigmas[0], such as `invert` gives.
        clean: (B, C, T, H, W), the given video in DiT space.
        sigmas: (steps + 1,) falling noise levels.
        etas: the pull in each step, see `pulls`: 0 is none, 1 goes straight to `clean`, and to the end reaches it.
        on_step: called as on_step(step, latents) after each step; returning True stops.

    Returns:
        float32 (B, C, T, H, W) at noise level sigmas[-1].

    Raises:
        ValueError: levels that rise.
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

    By its trend it falls to 0 over those steps, or rises from 0. A level above 1 counts as 1.

    Raises:
        ValueError: another trend, a number outside [0, 1], or a start below the end.
    """
    if trend not in TRENDS:
        raise ValueError(f"The trend is {trend!r}; use one of {', '.join(TRENDS)}.")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta:g}, but the pull goes from 0 (none) to 1 (straight to the given video).")
    for name, level in (("from", start), ("down to", end)):
        if not 0 <= level <= 1:
            raise ValueError(f"The pull is {name} noise level {level:g}; use a level from 0 to 1.")
    if start < end:
        raise ValueError(
            f"start is {start:g}, below the end {end:g}, but noise falls from start to end; exchange the two."
        )
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
    """FlowEdit of `clean` (B, C, T, H, W), in DiT space, with two guided velocities of `dit`: four forwards a step.

    Args:
        sigmas: (steps + 1,) falling noise levels; `schedule.schedule_below` makes them.
        source, target, negative: prompts, see `sample.EncodedPrompts`: of the video, of the edited one, and what neither shows.
        source_scale, scale: guidance of both; the defaults are FlowEdit's for FLUX.
        seed: of the noise, which is made on the CPU.
        attention: one of `attention.ATTENTIONS`.
        on_step: called as on_step(step, edited latents) after each step; returning True stops.

    Returns:
        DiT-space latents, float32, on the device of `clean`.

    Raises:
        ValueError: latents that are none of Mochi's, prompts that do not fit them, no step, levels that rise, or numbers that
            are not finite.
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
    """RF inversion of `clean` (B, C, T, H, W), in DiT space, and `rf_edit` of what it gives: three forwards a step.

    Args:
        sigmas: (steps + 1,) noise levels from 1 down to 0, which inversion goes up.
        source, target, negative: see `edit`; inversion follows `source` without guidance.
        scale: guidance on the way back.
        eta, start, end: see `pulls`.
        attention: one of `attention.ATTENTIONS`.
        on_step: called as on_step(step, latents) after each of the 2 * steps steps; returning True stops the run.

    Returns:
        DiT-space latents, float32, on the device of `clean`; those of the last step where a run is stopped.

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
    """A function that gives standard normal float32 noise of the shape of `latents`, other noise at every call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(latents.shape, generator=generator)
