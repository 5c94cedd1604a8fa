"""Launch Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VALUES_PER_WARP = 256
"""Eight for each of 32 threads: in 16 bits, as many as one load fetches, and few enough for the registers."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | float | None, **constants: Any) -> None:
    """Run `kernel` in `grid` programs on the device of its first argument; an empty grid does nothing."""
    if 0 in grid:
        return
    first = arguments[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device_of(first):  # Triton launches kernels on the current device
        kernel[grid](*arguments, **constants)


def next_power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`; Triton's block sizes must be powers of two."""
    return 1 << (count - 1).bit_length()


def warps(values: int) -> int:
    """Warps for a program that works on `values` values at once."""
    return min(max(values // VALUES_PER_WARP, 1), 16)


def dense(x: Tensor) -> Tensor:
    """`x` with a contiguous last axis, as the kernels need it."""
    return x if x.stride(-1) == 1 else x.contiguous()
