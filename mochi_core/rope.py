"""Rotary positions with learned frequencies.

A visual token at frame t, row h and column w turns feature pair f of head k by the angle
t * pos_frequencies[0, k, f] + h * pos_frequencies[1, k, f] + w * pos_frequencies[2, k, f].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REFERENCE_AREA = 192 * 192
"""The area, in position units, that every frame is scaled to, whatever its size."""

Rope = tuple[Tensor, Tensor]
"""cos and sin of every token's angles, each (N, heads, head_dim / 2), float32."""


def axis_positions(num_latents: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions along time, height and width, float64; rows and columns are counted in patches.

    Frames count 0, 1, 2 ...; rows and columns are the centres of equal bins around zero, so scaled that every frame has
    the same area.
    """
    scale = math.sqrt(REFERENCE_AREA / (rows * columns))

    def centred(count: int) -> Tensor:
        return (torch.arange(count, dtype=torch.float64) + 0.5 - count / 2) * scale

    return torch.arange(num_latents, dtype=torch.float64), centred(rows), centred(columns)


def rope_table(pos_frequencies: Tensor, num_latents: int, rows: int, columns: int) -> Rope:
    """cos and sin for tokens ordered frame, row, column, on the device of `pos_frequencies` (3, heads, head_dim / 2).

    The turns of the three axes are small tables, made in float64 on the CPU and then multiplied as unit complex numbers:
    the result is exact to float32 however large the angles are, and only one pass over all tokens is needed.
    """
    frequencies = pos_frequencies.to("cpu", torch.float64)
    turns = [
        torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(pos_frequencies.device)
        for positions, frequency in zip(axis_positions(num_latents, rows, columns), frequencies, strict=True)
        for angles in [positions[:, None, None] * frequency]
    ]
    t, h, w = turns  # (positions, heads, head_dim / 2)
    table = (t[:, None, None] * h[:, None] * w).flatten(0, 2)  # (N, heads, head_dim / 2)
    return table.real.contiguous(), table.imag.contiguous()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn neighbouring pairs of the last axis of `x` (B, N, heads, head_dim)."""
    cos, sin = rope
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
