"""GGML's block formats: rows of weights as bytes, and back to float32.

Every block of 32 or 256 weights takes a fixed number of bytes, with its own scales and, in some formats, minima. Names are those
of GGUF files (Q4_0, Q6_K ...). The layouts are those of ggml-org/llama.cpp: structs block_q4_0 ... block_mxfp4 in
ggml/src/ggml-common.h, with the tables kvalues_iq4nl and kvalues_mxfp4; the arithmetic is that of dequantize_row_* in
ggml/src/ggml-quants.c and of gguf-py/gguf/quants.py, with which a test compares it bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_type import BlockType, numbers_at, power_of_two

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Values of the 4-bit codes of IQ4_NL and IQ4_XS."""
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Values of the 4-bit codes of MXFP4, times two."""


def quantize_q4_0(weight: Tensor) -> Tensor:
    """Quantise a matrix (rows, columns) to Q4_0 blocks (rows, bytes per row) uint8.

    A block's scale maps its weight of largest magnitude to -8, as in llama.cpp's quantize_row_q4_0_ref.

    Raises:
        ValueError: the number of columns is not a multiple of 32.
    """
    size = BLOCK_TYPES["Q4_0"].weights
    if weight.shape[1] % size:
        raise ValueError(
            f"Rows of {weight.shape[1]} weights are not a whole number of Q4_0 blocks of {size}; use fp8 or int8."
        )
    blocks = weight.float().reshape(-1, size)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    inverse = torch.where(scale == 0, 0, 1 / scale)
    low, high = (blocks * inverse + 8.5).clamp(0, 15).to(torch.uint8).chunk(2, dim=-1)
    scale_bytes = scale.to(torch.float16).view(torch.uint8)
    return torch.cat((scale_bytes, low | high << 4), dim=-1).reshape(len(weight), -1)


def _float16_at(blocks: Tensor, start: int) -> Tensor:
    """The float16 number at byte `start` of every block (N, bytes), as (N, 1) float32."""
    return numbers_at(blocks, start, torch.float16).float()


def _halves(*places: int) -> tuple[tuple[int, torch.dtype, int], ...]:
    return tuple((place, torch.float16, 1) for place in places)


def _bits(data: Tensor, shifts: range, mask: int) -> Tensor:
    """Bit fields of bytes: (N, G, B) uint8 to (N, G, len(shifts), B), each byte shifted right and masked."""
    shift = torch.arange(shifts.start, shifts.stop, shifts.step, dtype=torch.uint8, device=data.device)[:, None]
    return data[:, :, None] >> shift & mask


def _nibbles(data: Tensor) -> Tensor:
    """Unpack bytes (N, 16) to 4-bit values (N, 32): all low nibbles, then all high ones."""
    return _bits(data[:, None], range(0, 8, 4), 0x0F).flatten(1)


def _fifth_bits(data: Tensor) -> Tensor:
    """Bytes (N, 4) to values (N, 32), each 0 or 16: bit j of the little-endian 32-bit number is the fifth bit of weight j."""
    return (_bits(data[:, :, None], range(8), 1) << 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    """Bytes 0-1 float16 scale; 2-17 four-bit values, stored plus 8."""
    return _float16_at(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    """Bytes 0-1 float16 scale; 2-3 float16 minimum; 4-19 four-bit values."""
    return _float16_at(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _float16_at(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    """Bytes 0-1 float16 scale; 2-5 fifth bits; 6-21 lower four bits of values stored plus 16."""
    return _float16_at(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    """Bytes 0-1 float16 scale; 2-3 float16 minimum; 4-7 fifth bits; 8-23 lower four bits."""
    levels = (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])).float()
    return _float16_at(blocks, 0) * levels + _float16_at(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    """Bytes 0-1 float16 scale; 2-33 int8 values."""
    return blocks[:, 2:].view(torch.int8).float() * _float16_at(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    """Bytes 0-15 scale (low nibble) and minimum (high) per 16 weights; 16-79 two-bit values; 80-83 float16 scales of both."""
    scales, levels = blocks[:, :16], _bits(blocks[:, 16:80].unflatten(1, (2, 32)), range(0, 8, 2), 3)
    scale = (_float16_at(blocks, 80) * (scales & 0x0F).float())[..., None]
    minimum = (_float16_at(blocks, 82) * (scales >> 4).float())[..., None]
    return (scale * levels.reshape(-1, 16, 16).float() - minimum).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    """Bytes 0-31 third bits, inverted; 32-95 lower two bits; 96-107 six-bit scale per 16 weights; 108-109 float16 scale.

    The lower four bits of the six-bit scales are in bytes 96-103, the upper two in bytes 104-107.
    """
    low = _bits(blocks[:, None, 96:104], range(0, 8, 4), 0x0F).flatten(1)
    high = _bits(blocks[:, None, 104:108], range(0, 8, 2), 3).flatten(1)
    scale = (_float16_at(blocks, 108) * ((low | high << 4).float() - 32))[..., None]
    levels = _bits(blocks[:, 32:96].unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 16, 16).float()
    missing = 4 - 4 * _bits(blocks[:, None, :32], range(8), 1).reshape(-1, 16, 16).float()
    return (scale * (levels - missing)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    """Bytes 0-15 scales and minima, see `_scale_and_shift`; 16-143 four-bit values."""
    levels = _bits(blocks[:, 16:].unflatten(1, (4, 32)), range(0, 8, 4), 0x0F)
    return _scale_and_shift(blocks, levels.reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    """Bytes 0-15 scales and minima, see `_scale_and_shift`; 16-47 fifth bits; 48-175 lower four bits."""
    low = _bits(blocks[:, 48:].unflatten(1, (4, 32)), range(0, 8, 4), 0x0F).reshape(-1, 8, 32)
    high = _bits(blocks[:, None, 16:48], range(8), 1).reshape(-1, 8, 32)
    return _scale_and_shift(blocks, low | high << 4)


def _scale_and_shift(blocks: Tensor, levels: Tensor) -> Tensor:
    """Levels (N, 8, 32) of Q4_K or Q5_K to weights (N, 256): scale * level - minimum, with one of each per 32 weights.

    Bytes 0-1 and 2-3 are the float16 scales of the scales and of the minima; bytes 4-15 hold eight six-bit scales and minima.
    """
    first, second, rest = blocks[:, 4:16].split(4, dim=1)
    scales = torch.cat((first & 0x3F, rest & 0x0F | first >> 2 & 0x30), dim=1)
    minima = torch.cat((second & 0x3F, rest >> 4 | second >> 2 & 0x30), dim=1)
    scale = (_float16_at(blocks, 0) * scales.float())[..., None]
    minimum = (_float16_at(blocks, 2) * minima.float())[..., None]
    return (scale * levels.float() - minimum).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    """Bytes 0-127 lower four bits; 128-191 upper two bits; 192-207 int8 scale per 16 weights; 208-209 float16 scale."""
    low = _bits(blocks[:, :128].unflatten(1, (2, 64)), range(0, 8, 4), 0x0F).reshape(-1, 16, 16)
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 16, 16)
    scale = _float16_at(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[..., None] * ((low | high << 4).float() - 32)).flatten(1)


def _iq4_nl(blocks: Tensor) -> Tensor:
    """Bytes 0-1 float16 scale; 2-17 four-bit indices into `IQ4_VALUES`."""
    return _float16_at(blocks, 0) * looked_up(_nibbles(blocks[:, 2:]), IQ4_VALUES)


def _iq4_xs(blocks: Tensor) -> Tensor:
    """Bytes 0-1 float16 scale; 2-3 upper two and 4-7 lower four bits of a six-bit scale per 32 weights; 8-135 indices."""
    low = _bits(blocks[:, 4:8, None], range(0, 8, 4), 0x0F).flatten(1)
    high = _bits(blocks[:, 2:4, None], range(0, 8, 2), 3).flatten(1)
    scale = (_float16_at(blocks, 0) * ((low | high << 4).float() - 32))[..., None]
    places = _bits(blocks[:, 8:].unflatten(1, (8, 16)), range(0, 8, 4), 0x0F).reshape(-1, 8, 32)
    return (scale * looked_up(places, IQ4_VALUES)).flatten(1)


def _mxfp4(blocks: Tensor) -> Tensor:
    """Byte 0 exponent of a power of two, plus 127; 1-16 four-bit indices into `MXFP4_VALUES`, which are doubled."""
    return looked_up(_nibbles(blocks[:, 1:]), MXFP4_VALUES) * power_of_two(blocks[:, :1], bias=128)


def looked_up(places: Tensor, values: tuple[float, ...]) -> Tensor:
    """`values` at the indices `places` (any shape, uint8), float32."""
    return torch.tensor(values, dtype=torch.float32, device=places.device)[places.int()]


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, _q4_0, _halves(0)),
    "Q4_1": BlockType(32, 20, _q4_1, _halves(0, 2)),
    "Q5_0": BlockType(32, 22, _q5_0, _halves(0)),
    "Q5_1": BlockType(32, 24, _q5_1, _halves(0, 2)),
    "Q8_0": BlockType(32, 34, _q8_0, _halves(0)),
    "Q2_K": BlockType(256, 84, _q2_k, _halves(80, 82)),
    "Q3_K": BlockType(256, 110, _q3_k, _halves(108)),
    "Q4_K": BlockType(256, 144, _q4_k, _halves(0, 2)),
    "Q5_K": BlockType(256, 176, _q5_k, _halves(0, 2)),
    "Q6_K": BlockType(256, 210, _q6_k, _halves(208)),
    "IQ4_NL": BlockType(32, 18, _iq4_nl, _halves(0)),
    "IQ4_XS": BlockType(256, 136, _iq4_xs, _halves(0)),
    "MXFP4": BlockType(32, 17, _mxfp4, ((0, torch.uint8, 1),)),
}
"""The supported block formats of GGUF files, by their names there."""
