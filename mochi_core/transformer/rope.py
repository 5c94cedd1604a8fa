"""Rotary positions with learned frequencies.

A visual token at frame t, row h and column w turns feature pair f of head k by the angle
t * pos_frequencies[0, k, f] + h * pos_frequencies[1, k, f] + w * pos_frequencies[2, k, f].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

REFERENCE_AREA = 192 * 192
"""The area, in position units, that every frame is scaled to, whatever its size."""


@dataclass(frozen=True)
class Rope:
    """Turns as pairs (cos, sin): a token's is that of its frame, turned by that of its place there.

    The table of all tokens would be large.
    """

    frames: Tensor
    """(T, heads, head_dim / 2, 2) float32."""
    places: Tensor
    """(rows * columns, heads, head_dim / 2, 2) float32."""

    def pieces(self, tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """Turns of whole frames, at most `tokens` tokens at a time but at least one frame, and which tokens they are."""
        step = max(1, tokens // len(self.places))
        for first in range(0, len(self.frames), step):
            turns = turned(self.frames[first : first + step, None], self.places).flatten(0, 1)
            start = first * len(self.places)
            yield slice(start, start + len(turns)), turns


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
    """For tokens ordered frame, row, column, on the device of `pos_frequencies` (3, heads, head_dim / 2).

    The turns of the three axes are made in float64 on the CPU and then multiplied as unit complex numbers: the result is
    exact to float32 however large the angles are.
    """
    frequencies = pos_frequencies.to("cpu", torch.float64)
    t, h, w = (
        torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(pos_frequencies.device)
        for positions, frequency in zip(axis_positions(num_latents, rows, columns), frequencies, strict=True)
        for angles in [positions[:, None, None] * frequency]
    )  # (positions, heads, head_dim / 2) each
    return Rope(torch.view_as_real(t), torch.view_as_real(h[:, None] * w).flatten(0, 1))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring pairs of the last axis of `x` (B, N, heads, head_dim) by `turns` (N, heads, head_dim / 2, 2)."""
    return turned(x.unflatten(-1, (-1, 2)), turns).flatten(-2)


def turned(pairs: Tensor, turns: Tensor) -> Tensor:
    """The product of `pairs` and `turns`, (..., 2) float32 each, as complex numbers.

    One complex product is several times as fast as its four real ones; but only those can be fused by a compiler.
    """
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    (real, imaginary), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
