"""What a block format is: so many weights in so many bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    """The layout of one block format."""

    weights: int
    """Number of weights in a block."""
    bytes: int
    """Size of a block in bytes."""
    dequantize: Callable[[Tensor], Tensor]
    """Blocks (N, bytes) uint8 to weights (N, weights) float32."""
    floats: tuple[tuple[int, torch.dtype, int], ...]
    """Where in a block are numbers that can be NaN or infinite: first byte, dtype and count; uint8 stands for the exponents of
    `power_of_two`, of which 255 is NaN."""


def numbers_at(blocks: Tensor, start: int, dtype: torch.dtype, count: int = 1) -> Tensor:
    """The numbers from byte `start` of every block (N, bytes) uint8 on: (N, count) `dtype`."""
    return blocks[:, start : start + count * dtype.itemsize].contiguous().view(dtype)


def power_of_two(exponent: Tensor, bias: int = 127) -> Tensor:
    """2 ** (exponent - bias) in float32 for exponents of one byte, uint8 of any shape: the format E8M0 with its bias of 127.

    Source: Open Compute Project, Microscaling Formats (MX) 1.0.
    """
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int() - bias)
