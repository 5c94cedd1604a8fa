"""Block formats of tools other than llama.cpp: 4-bit and 8-bit floating-point values with a scale per block.

Files store values and scales separately; here, a block holds its values followed by its scale, so that rows of a weight can be
sliced, merged and moved as in any other block format. Sources: NF4, Dettmers et al. 2023, arXiv:2305.14314, appendix E; FP4,
the table `quant_map` in bitsandbytes' files; E2M1, E4M3 and E8M0, Open Compute Project, Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_type import BlockType, numbers_at, power_of_two
from .fp8 import FP8
from .ggml import looked_up

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_VALUES = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)  # fmt: skip
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _high_first(data: Tensor) -> Tensor:
    """Unpack bytes (N, B) to 4-bit values (N, 2 * B): the upper four bits of each byte, then the lower."""
    return torch.stack((data >> 4, data & 0x0F), dim=-1).flatten(1)


def _nf4(blocks: Tensor) -> Tensor:
    """Bytes 0-31 indices into `NF4_VALUES`; 32-35 float32 scale."""
    return looked_up(_high_first(blocks[:, :32]), NF4_VALUES) * numbers_at(blocks, 32, torch.float32)


def _fp4(blocks: Tensor) -> Tensor:
    """Bytes 0-31 indices into `FP4_VALUES`; 32-35 float32 scale."""
    return looked_up(_high_first(blocks[:, :32]), FP4_VALUES) * numbers_at(blocks, 32, torch.float32)


def _nvfp4(blocks: Tensor) -> Tensor:
    """Bytes 0-7 E2M1 values; 8 E4M3 scale. The weight as a whole has a further scale."""
    return looked_up(_high_first(blocks[:, :8]), E2M1_VALUES) * numbers_at(blocks, 8, FP8).float()


def _mxfp8(blocks: Tensor) -> Tensor:
    """Bytes 0-31 E4M3 values; 32 E8M0 scale."""
    return numbers_at(blocks, 0, FP8, 32).float() * power_of_two(blocks[:, 32:])


BLOCK_FLOATS = {
    "NF4": BlockType(64, 36, _nf4, ((32, torch.float32, 1),)),
    "FP4": BlockType(64, 36, _fp4, ((32, torch.float32, 1),)),
    "NVFP4": BlockType(16, 9, _nvfp4, ((8, FP8, 1),)),
    "MXFP8": BlockType(32, 33, _mxfp8, ((0, FP8, 32), (32, torch.uint8, 1))),
}
