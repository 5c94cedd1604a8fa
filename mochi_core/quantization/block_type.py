"""Description of a block format: a fixed number of weights in a fixed number of bytes."""

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
    """Numbers in a block that can be NaN or infinite, as first byte, dtype and count; uint8 stands for the exponents of
    `power_of_two`, where 255 is NaN."""


def numbers_at(blocks: Tensor, start: int, dtype: torch.dtype, count: int = 1) -> Tensor:
    """The `count` numbers that start at byte `start` of every block (N, bytes) uint8, as (N, count) of `dtype`."""
    return blocks[:, start : start + count * dtype.itemsize].contiguous().view(dtype)


def power_of_two(exponent: Tensor, bias: int = 127) -> Tensor:
    """2 ** (exponent - bias) in float32 for one-byte exponents, uint8 of any shape; E8M0 has a bias of 127.

    Source: Open Compute Project, Microscaling Formats (MX) 1.0.
    """
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int() - bias)
