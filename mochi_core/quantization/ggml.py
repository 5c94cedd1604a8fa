"""GGML's block formats: rows of weights as bytes, and back to float32.

A row is cut into blocks of 32 or 256 weights; every block is a fixed number of bytes with its own scales and, in some
formats, minima. Names are those of GGUF files (Q4_0, Q6_K ...). Results equal llama.cpp's to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    weights: int
    """Weights in a block."""
    bytes: int
    """Bytes of a block."""
    dequantize: Callable[[Tensor], Tensor]
    """(N, bytes) uint8 to (N, weights) float32."""
    halves: tuple[int, ...]
    """Where its float16 numbers begin: a scale and, in some formats, a minimum."""


def dequantize(rows: Tensor, name: str) -> Tensor:
    """(..., bytes of a row) uint8 in the format `name` to (..., weights of a row) float32."""
    block = BLOCK_TYPES[name]
    return block.dequantize(rows.reshape(-1, block.bytes)).reshape(*rows.shape[:-1], -1)


def halves(rows: Tensor, name: str) -> Tensor:
    """(..., bytes of a row) uint8 to the (N, H) float16 numbers of its blocks, all that can be NaN or infinite in them."""
    block = BLOCK_TYPES[name]
    blocks = rows.reshape(-1, block.bytes)
    return torch.cat([blocks[:, start : start + 2] for start in block.halves], dim=1).view(torch.float16)


def columns(row_bytes: int, name: str) -> int:
    """How many weights a row of so many bytes holds.

    Raises:
        ValueError: it is no whole number of blocks.
    """
    block = BLOCK_TYPES[name]
    if row_bytes % block.bytes:
        raise ValueError(f"A row of {row_bytes} bytes is no whole number of {name} blocks ({block.bytes} bytes each).")
    return row_bytes // block.bytes * block.weights


def quantize_q4_0(weight: Tensor) -> Tensor:
    """(rows, columns) to uint8 blocks (rows, bytes); in every block the weight of the largest magnitude becomes -8.

    Raises:
        ValueError: the rows are no multiple of 32 long.
    """
    size = BLOCK_TYPES["Q4_0"].weights
    if weight.shape[1] % size:
        raise ValueError(
            f"Rows of {weight.shape[1]} weights are no whole number of Q4_0 blocks of {size}; use fp8 or int8."
        )
    blocks = weight.float().reshape(-1, size)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    inverse = torch.where(scale == 0, 0, 1 / scale)
    low, high = (blocks * inverse + 8.5).clamp(0, 15).to(torch.uint8).chunk(2, dim=-1)
    halves = scale.to(torch.float16).view(torch.uint8)
    return torch.cat((halves, low | high << 4), dim=-1).reshape(len(weight), -1)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block, as (N, 1) float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _bits(data: Tensor, shifts: range, mask: int) -> Tensor:
    """(N, G, B) bytes to (N, G, len(shifts), B): the masked value at each shift."""
    shift = torch.arange(shifts.start, shifts.stop, shifts.step, dtype=torch.uint8, device=data.device)[:, None]
    return data[:, :, None] >> shift & mask


def _nibbles(data: Tensor) -> Tensor:
    """(N, 16) bytes to (N, 32): all low nibbles, then all high ones."""
    return _bits(data[:, None], range(0, 8, 4), 0x0F).flatten(1)


def _fifth_bits(data: Tensor) -> Tensor:
    """(N, 4) bytes to (N, 32) values 0 or 16: bit j of this little-endian number belongs to weight j."""
    return (_bits(data[:, :, None], range(8), 1) << 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    levels = (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])).float()
    return _half(blocks, 0) * levels + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, levels = blocks[:, :16], _bits(blocks[:, 16:80].unflatten(1, (2, 32)), range(0, 8, 2), 3)
    scale = (_half(blocks, 80) * (scales & 0x0F).float())[..., None]
    minimum = (_half(blocks, 82) * (scales >> 4).float())[..., None]
    return (scale * levels.reshape(-1, 16, 16).float() - minimum).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    """The third bit is stored inverted; scales are six bits: four of them in bytes 96-103, two in bytes 104-107."""
    low = _bits(blocks[:, None, 96:104], range(0, 8, 4), 0x0F).flatten(1)
    high = _bits(blocks[:, None, 104:108], range(0, 8, 2), 3).flatten(1)
    scale = (_half(blocks, 108) * ((low | high << 4).float() - 32))[..., None]
    levels = _bits(blocks[:, 32:96].unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 16, 16).float()
    missing = 4 - 4 * _bits(blocks[:, None, :32], range(8), 1).reshape(-1, 16, 16).float()
    return (scale * (levels - missing)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    levels = _bits(blocks[:, 16:].unflatten(1, (4, 32)), range(0, 8, 4), 0x0F)
    return _scale_and_shift(blocks, levels.reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, 48:].unflatten(1, (4, 32)), range(0, 8, 4), 0x0F).reshape(-1, 8, 32)
    high = _bits(blocks[:, None, 16:48], range(8), 1).reshape(-1, 8, 32)
    return _scale_and_shift(blocks, low | high << 4)


def _scale_and_shift(blocks: Tensor, levels: Tensor) -> Tensor:
    """Levels (N, 8, 32) with the six-bit scales and minima that Q4_K and Q5_K keep in bytes 4 to 15."""
    first, second, rest = blocks[:, 4:16].split(4, dim=1)
    scales = torch.cat((first & 0x3F, rest & 0x0F | first >> 2 & 0x30), dim=1)
    minima = torch.cat((second & 0x3F, rest >> 4 | second >> 2 & 0x30), dim=1)
    scale = (_half(blocks, 0) * scales.float())[..., None]
    minimum = (_half(blocks, 2) * minima.float())[..., None]
    return (scale * levels.float() - minimum).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, :128].unflatten(1, (2, 64)), range(0, 8, 4), 0x0F).reshape(-1, 16, 16)
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 16, 16)
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[..., None] * ((low | high << 4).float() - 32)).flatten(1)


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, _q4_0, (0,)),
    "Q4_1": BlockType(32, 20, _q4_1, (0, 2)),
    "Q5_0": BlockType(32, 22, _q5_0, (0,)),
    "Q5_1": BlockType(32, 24, _q5_1, (0, 2)),
    "Q8_0": BlockType(32, 34, _q8_0, (0,)),
    "Q2_K": BlockType(256, 84, _q2_k, (80, 82)),
    "Q3_K": BlockType(256, 110, _q3_k, (108,)),
    "Q4_K": BlockType(256, 144, _q4_k, (0, 2)),
    "Q5_K": BlockType(256, 176, _q5_k, (0, 2)),
    "Q6_K": BlockType(256, 210, _q6_k, (208,)),
}
