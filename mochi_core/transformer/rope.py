"""Rotary position embedding with learned frequencies.

For a visual token at latent frame t, row h and column w, feature pair f of head k is rotated by the angle
t * pos_frequencies[0, k, f] + h * pos_frequencies[1, k, f] + w * pos_frequencies[2, k, f].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

REFERENCE_AREA = 192 * 192
"""Area of every frame in position units: `target_area` = 36864 of `create_position_matrix`, Genmo's rope_mixed.py."""


@dataclass(frozen=True)
class Rope:
    """Rotary table in factored form, as (cos, sin) pairs.

    The rotation of the token at latent frame t and patch p is the complex product frames[t] * spatial[p]. The full table for
    163 frames of 848x480 would take 547 MB.
    """

    frames: Tensor
    """(T, heads, head_dim / 2, 2) float32."""
    spatial: Tensor
    """(rows * columns, heads, head_dim / 2, 2) float32."""
    skipped: int = 0
    """Leading tokens of the first frame that are left out."""
    dropped: int = 0
    """Trailing tokens of the last frame that are left out."""

    def to(self, device: torch.device | str | int) -> Rope:
        return replace(self, frames=self.frames.to(device), spatial=self.spatial.to(device))

    @property
    def num_tokens(self) -> int:
        return len(self.frames) * len(self.spatial) - self.skipped - self.dropped

    def part(self, tokens: slice) -> Rope:
        """The table of the tokens from `tokens.start` to `tokens.stop`."""
        per_frame = len(self.spatial)
        start, stop = self.skipped + tokens.start, self.skipped + tokens.stop
        first, end = start // per_frame, -(-stop // per_frame)
        return Rope(self.frames[first:end], self.spatial, start - first * per_frame, end * per_frame - stop)

    def chunks(self, tokens: int) -> Iterator[tuple[slice, Rope]]:
        """Yield tokens and their part of the table in chunks of whole frames.

        A chunk has at most `tokens` tokens, but at least one frame or the part of it that exists.
        """
        step = max(1, tokens // len(self.spatial)) * len(self.spatial)
        for start in range(-self.skipped, self.num_tokens, step):
            some = slice(max(start, 0), min(start + step, self.num_tokens))
            yield some, self.part(some)

    def table(self) -> Tensor:
        """The rotations of all tokens, (N, heads, head_dim / 2, 2)."""
        frames = complex_mul(self.frames[:, None], self.spatial).flatten(0, 1)
        return frames[self.skipped : self.skipped + self.num_tokens]


def axis_positions(num_latents: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (T,), (rows,) and (columns,) along time, height and width, float64; rows and columns are in patches.

    Frames are numbered 0, 1, 2 ...; rows and columns are the centres of equal bins around zero, scaled so that every frame has
    the area `REFERENCE_AREA`.
    """
    scale = math.sqrt(REFERENCE_AREA / (rows * columns))

    def centred(count: int) -> Tensor:
        return (torch.arange(count, dtype=torch.float64) + 0.5 - count / 2) * scale

    return torch.arange(num_latents, dtype=torch.float64), centred(rows), centred(columns)


def rope_table(pos_frequencies: Tensor, num_latents: int, rows: int, columns: int) -> Rope:
    """Rotary table for tokens ordered by frame, row, column, on the device of `pos_frequencies` (3, heads, head_dim / 2).

    The rotations of the three axes are computed in float64 on the CPU and then multiplied as unit complex numbers: the result
    is exact to float32 however large the angles are.
    """
    frequencies = pos_frequencies.to("cpu", torch.float64)
    t, h, w = (
        torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(pos_frequencies.device)
        for positions, frequency in zip(axis_positions(num_latents, rows, columns), frequencies, strict=True)
        for angles in [positions[:, None, None] * frequency]
    )  # (positions, heads, head_dim / 2) each
    return Rope(torch.view_as_real(t), torch.view_as_real(h[:, None] * w).flatten(0, 1))


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last axis of `x` (B, N, heads, head_dim) by `freqs` (N, heads, head_dim / 2, 2).

    `x` is overwritten, except under torch.compile.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        return complex_mul(pairs, freqs).flatten(-2)
    torch.view_as_complex(pairs).mul_(torch.view_as_complex(freqs))
    return x


def complex_mul(a: Tensor, b: Tensor) -> Tensor:
    """Product of `a` and `b`, (..., 2) float32 each, as complex numbers (real, imaginary) or (cos, sin).

    One complex product is several times faster than four real ones, but a compiler can fuse only the latter.
    """
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(a) * torch.view_as_complex(b))
    (real, imaginary), (cos, sin) = a.unbind(-1), b.unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
