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

Turn = tuple[Tensor, Tensor]
"""cos and sin of angles, each (tokens, heads, head_dim / 2), float32."""


@dataclass(frozen=True)
class Rope:
    """The angle of a token is that of its frame plus that of its place there; all tokens' table would be large."""

    frames: Turn
    places: Turn

    def pieces(self, tokens: int) -> Iterator[tuple[slice, Turn]]:
        """Turns of whole frames, at most `tokens` tokens at a time but at least one frame, and which tokens they are."""
        (cos_t, sin_t), (cos, sin) = self.frames, self.places
        step = max(1, tokens // len(cos))
        for first in range(0, len(cos_t), step):
            c, s = cos_t[first : first + step, None], sin_t[first : first + step, None]
            turn = (c * cos - s * sin).flatten(0, 1), (s * cos + c * sin).flatten(0, 1)
            start = first * len(cos)
            yield slice(start, start + len(turn[0])), turn


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
    places = (h[:, None] * w).flatten(0, 1)
    return Rope(*((turns.real.contiguous(), turns.imag.contiguous()) for turns in (t, places)))


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Turn neighbouring pairs of the last axis of `x` (B, N, heads, head_dim)."""
    cos, sin = turn
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
