"""Plain quantisers for two of GGML's K types, which the gguf package reads but does not write.

Scales come from the extremes of each group; llama.cpp searches for better ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-7


def quantize_q6_k(weight: Tensor) -> Tensor:
    """(rows, columns) to (rows, bytes) uint8: 16 groups of 16 weights, each with a signed 8-bit scale."""
    groups = weight.float().reshape(-1, 16, 16)
    scale = groups.abs().amax(2) / 31
    step, multiples = _in_steps(scale, 127)
    values = (groups / (step[:, None] * multiples)[..., None]).round().clamp(-32, 31).to(torch.int16) + 32
    quarters = values.reshape(-1, 2, 4, 32)  # (blocks, halves, quarters of a half, 32)
    low, high = quarters & 15, quarters >> 4
    nibbles = low[:, :, :2] | low[:, :, 2:] << 4
    pairs = sum(high[:, :, i] << 2 * i for i in range(4))
    parts = nibbles.flatten(1), pairs.flatten(1), multiples.to(torch.int16)
    return _packed(weight, *(part.to(torch.uint8) for part in parts), _half_bytes(step))


def quantize_q4_k(weight: Tensor) -> Tensor:
    """(rows, columns) to (rows, bytes) uint8: 8 groups of 32 weights, each with a 6-bit scale and a 6-bit minimum."""
    groups = weight.float().reshape(-1, 8, 32)
    low = groups.amin(2).clamp(max=0)
    (step, scales), (low_step, lows) = _in_steps((groups.amax(2) - low) / 15, 63), _in_steps(-low, 63)
    shifted = groups + (low_step[:, None] * lows)[..., None]
    values = (shifted / (step[:, None] * scales)[..., None]).round().clamp(0, 15).to(torch.uint8)
    pairs = values.reshape(-1, 4, 2, 32)
    nibbles = pairs[:, :, 0] | pairs[:, :, 1] << 4
    scales, lows = scales.to(torch.uint8), lows.to(torch.uint8)
    # The last four scales and minimums are split: four bits in bytes of their own, two in the top bits of the first four.
    first = torch.cat((scales[:, :4] | scales[:, 4:] >> 4 << 6, lows[:, :4] | lows[:, 4:] >> 4 << 6), 1)
    last = scales[:, 4:] & 15 | (lows[:, 4:] & 15) << 4
    return _packed(weight, _half_bytes(step), _half_bytes(low_step), first, last, nibbles.flatten(1))


def _in_steps(scale: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """`scale` (N, groups) as integer multiples, 1 to `largest`, of one float16 step per block."""
    step = (scale.amax(1) / largest).clamp(min=TINY).half().float()
    return step, (scale / step[:, None]).round().clamp(1, largest)


def _half_bytes(numbers: Tensor) -> Tensor:
    return numbers.half()[:, None].view(torch.uint8)


def _packed(weight: Tensor, *parts: Tensor) -> Tensor:
    return torch.cat(parts, 1).reshape(len(weight), -1)


K_QUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {"Q4_K": quantize_q4_k, "Q6_K": quantize_q6_k}
