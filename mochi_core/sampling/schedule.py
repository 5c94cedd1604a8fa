"""Noise levels and guidance, step by step."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_quadratic_schedule(
    num_steps: int, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> Tensor:
    """Genmo's schedule, `linear_quadratic_schedule` of its pipelines.py: sigma falls slowly and linearly, then quadratically.

    The first `linear_steps` steps (half of them by default) remove `threshold_noise` of the noise at constant speed; a
    parabola that continues with the same slope removes the rest.

    Returns:
        float32 (num_steps + 1,), from 1.0 down to 0.0.

    Raises:
        ValueError: num_steps < 1, threshold_noise outside (0, 1), linear_steps outside 1 ... num_steps, or a
            combination for which sigma would not fall all the way.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, but sampling needs at least 1 step.")
    if not 0.0 < threshold_noise < 1.0:
        raise ValueError(
            f"threshold_noise is {threshold_noise}, but it is a share of the noise; use a value in (0, 1)."
        )
    if linear_steps is None:
        linear_steps = max(1, num_steps // 2)
    if not 1 <= linear_steps <= num_steps:
        raise ValueError(f"linear_steps is {linear_steps}, but must lie between 1 and num_steps = {num_steps}.")

    removed = torch.empty(num_steps + 1, dtype=torch.float64)
    linear = torch.arange(linear_steps + 1, dtype=torch.float64) / linear_steps
    quadratic_steps = num_steps - linear_steps
    if quadratic_steps == 0:
        # Nothing is left for a parabola: the whole way is linear, and must end at zero noise.
        return (1.0 - linear).float()
    removed[: linear_steps + 1] = threshold_noise * linear
    slope = threshold_noise / linear_steps
    # u(s) = threshold + slope * s + curvature * s^2, s steps after the linear part, with u(quadratic_steps) = 1.
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


def guidance_schedule(
    num_steps: int, scale: float, end_scale: float | None = None, start: float = 0.0, end: float = 1.0
) -> list[float]:
    """One guidance scale per step: `scale` in the steps from the fraction `start` to the fraction `end`, else 1, which is none.

    With `end_scale`, the scale moves by equal differences from `scale` in the first of those steps to `end_scale` in the last.
    """
    within = [step for step in range(num_steps) if in_step_range(step, num_steps, start, end)]
    difference = 0.0 if end_scale is None else (end_scale - scale) / max(1, len(within) - 1)
    return [scale + difference * (step - within[0]) if step in within else 1.0 for step in range(num_steps)]


def in_step_range(step: int, num_steps: int, start: float, end: float) -> bool:
    """Whether a step lies in the range from `start` to `end`, fractions of the number of steps; 0 to 1 is all of them."""
    return start <= step / num_steps < end
