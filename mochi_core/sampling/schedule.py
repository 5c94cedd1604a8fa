"""Noise levels and guidance scales, step by step."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

HIGHEST_LEVEL = 2.0
"""Pure noise is level 1, which some users scale up a little; levels of other kinds of models go up to 14 or 80."""
MAX_STEPS = 1_000_000
"""Most steps of a schedule; Genmo uses 64."""


def linear_quadratic_schedule(
    num_steps: int, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> Tensor:
    """Genmo's schedule, `linear_quadratic_schedule` in its pipelines.py: sigma falls slowly and linearly, then quadratically.

    The first `linear_steps` steps (half of all by default) remove `threshold_noise` of the noise at a constant rate; a
    parabola that continues with the same slope removes the rest.

    Returns:
        float32 (num_steps + 1,), from 1.0 down to 0.0.

    Raises:
        ValueError: num_steps outside 1 ... `MAX_STEPS`, threshold_noise outside (0, 1), linear_steps outside 1 ... num_steps,
            or a combination for which sigma would not fall all the way.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, but sampling needs at least 1 step.")
    if num_steps > MAX_STEPS:
        raise ValueError(f"num_steps is {num_steps}, but must be at most {MAX_STEPS:,}; Genmo uses 64.")
    if not 0.0 < threshold_noise < 1.0:
        raise ValueError(
            f"threshold_noise is {threshold_noise}, but it is a fraction of the noise; use a value in (0, 1)."
        )
    if linear_steps is None:
        linear_steps = max(1, num_steps // 2)
    if not 1 <= linear_steps <= num_steps:
        raise ValueError(f"linear_steps is {linear_steps}, but must be from 1 to num_steps = {num_steps}.")

    removed = torch.empty(num_steps + 1, dtype=torch.float64)
    linear = torch.arange(linear_steps + 1, dtype=torch.float64) / linear_steps
    quadratic_steps = num_steps - linear_steps
    if quadratic_steps == 0:
        # No steps are left for the parabola: the schedule is linear throughout, and must end at zero noise.
        return (1.0 - linear).float()
    removed[: linear_steps + 1] = threshold_noise * linear
    slope = threshold_noise / linear_steps
    # u(s) = threshold + slope * s + curvature * s^2, s steps after the linear part, where u(quadratic_steps) = 1.
    curvature = (1.0 - threshold_noise - slope * quadratic_steps) / quadratic_steps**2
    if slope + 2 * curvature * quadratic_steps < 0:
        raise ValueError(
            f"threshold_noise {threshold_noise} over {linear_steps} linear steps leaves too little noise for the other "
            f"{quadratic_steps} steps, so sigma would rise again; lower threshold_noise or raise linear_steps."
        )
    s = torch.arange(1, quadratic_steps + 1, dtype=torch.float64)
    removed[linear_steps + 1 :] = threshold_noise + slope * s + curvature * s**2
    removed[-1] = 1.0
    return (1.0 - removed).float()


def schedule_below(start: float, num_steps: int) -> Tensor:
    """`num_steps` steps from noise level `start` to 0: the last ones of the shortest linear-quadratic schedule that has them.

    Returns:
        float32 (num_steps + 1,), from `start` down to 0.0.

    Raises:
        ValueError: num_steps < 1, or `start` is outside (0, 1] or so low that the schedule would have more than `MAX_STEPS`.
    """
    if not 0 < start <= 1:
        raise ValueError(f"The starting noise level is {start}; use a level above 0 and up to 1, such as 0.9.")
    too_few, enough = num_steps - 1, num_steps
    while len(_levels_below(start, enough)) < num_steps:
        too_few, enough = enough, 2 * enough
        if enough > MAX_STEPS:
            raise ValueError(
                f"{num_steps} steps from noise level {start} are too many; start from a higher level, or use fewer steps."
            )
    while enough - too_few > 1:
        total = (too_few + enough) // 2
        too_few, enough = (too_few, total) if len(_levels_below(start, total)) >= num_steps else (total, enough)
    return torch.cat((torch.tensor([start]), _levels_below(start, enough)[-num_steps:]))


def _levels_below(start: float, num_steps: int) -> Tensor:
    levels = linear_quadratic_schedule(num_steps)
    return levels[levels < start]


def check_schedule(sigmas: Tensor) -> None:
    """Raise a ValueError unless `sigmas` is one-dimensional, with at least one step and levels from 0 to `HIGHEST_LEVEL`."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        shape = tuple(sigmas.shape)
        raise ValueError(
            f"sigmas have shape {shape}, but must be one-dimensional; give steps + 1 noise levels, at least two."
        )
    for index, sigma in enumerate(sigmas.tolist()):
        if not 0 <= sigma <= HIGHEST_LEVEL:
            raise ValueError(
                f"sigmas[{index}] is {sigma:g}, but noise levels go from 1 down to 0; those of other kinds of models do not "
                "fit."
            )


def check_falling(sigmas: Tensor) -> None:
    """Raise a ValueError unless `sigmas` are valid noise levels for a run from noise to a video."""
    check_schedule(sigmas)
    for index, (now, following) in enumerate(pairwise(sigmas.tolist()), 1):
        if following > now:
            raise ValueError(
                f"sigmas[{index}] is {following:.4g} after {now:.4g}, but from noise to a video, levels must fall; reverse the "
                "schedule."
            )


def check_guidance(name: str, scale: float) -> None:
    """Raise a ValueError if `scale` is infinite or NaN."""
    if not math.isfinite(scale):
        raise ValueError(f"{name} is {scale}, but must be finite; use 1 (off) or more, such as 4.5.")


def check_share(name: str, share: float) -> None:
    """Raise a ValueError if `share` is not in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {share}, but it is a fraction of the steps; use a number from 0 to 1.")


def guidance_schedule(
    num_steps: int, scale: float, end_scale: float | None = None, start: float = 0.0, end: float = 1.0
) -> list[float]:
    """One guidance scale per step: `scale` in the steps from the fraction `start` to the fraction `end`, else 1 (no guidance).

    With `end_scale`, the scale changes linearly from `scale` in the first of those steps to `end_scale` in the last.

    Raises:
        ValueError: a scale is not finite, or a fraction is outside [0, 1].
    """
    check_guidance("cfg", scale)
    check_guidance("cfg_end", scale if end_scale is None else end_scale)
    check_share("start", start)
    check_share("end", end)
    within = [step for step in range(num_steps) if in_step_range(step, num_steps, start, end)]
    difference = 0.0 if end_scale is None else (end_scale - scale) / max(1, len(within) - 1)
    return [scale + difference * (step - within[0]) if step in within else 1.0 for step in range(num_steps)]


def in_step_range(step: int, num_steps: int, start: float, end: float) -> bool:
    """Whether a step is in the range from `start` to `end`, as fractions of the number of steps; 0 to 1 is all of them."""
    return start <= step / num_steps < end
