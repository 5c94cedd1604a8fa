"""Starting a kernel in Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VALUES_PER_WARP = 256
"""Eight for each of 32 threads: in 16 bits as many as one load brings, and few enough for registers."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | float | None, **constants: Any) -> None:
    """Run `kernel` in `grid` programs on the device of its first argument; nothing if there is nothing to do."""
    if 0 in grid:
        return
    first = arguments[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device_of(first):  # Triton starts kernels on the current device
        kernel[grid](*arguments, **constants)


def next_power_of_two(count: int) -> int:
    """The least power of two that is not below `count`; blocks of values have such sizes."""
    return 1 << (count - 1).bit_length()


def warps(values: int) -> int:
    """Warps of a program that works on so many values at once."""
    return min(max(values // VALUES_PER_WARP, 1), 16)


def dense(x: Tensor) -> Tensor:
    """`x` with its last axis without gaps, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()
