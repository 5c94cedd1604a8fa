"""Rows of weights in blocks of any known format, as bytes, and back to float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_floats import BLOCK_FLOATS
from .block_type import numbers_at
from .ggml import BLOCK_TYPES as GGML_BLOCK_TYPES

BLOCK_TYPES = {**GGML_BLOCK_TYPES, **BLOCK_FLOATS}
"""The supported block formats by name."""


def dequantize(rows: Tensor, name: str) -> Tensor:
    """Rows of blocks (..., bytes per row) uint8 in the format `name` to (..., weights per row) float32."""
    block = BLOCK_TYPES[name]
    return block.dequantize(rows.reshape(-1, block.bytes)).reshape(*rows.shape[:-1], -1)


def block_floats(rows: Tensor, name: str) -> list[Tensor]:
    """All numbers in the blocks of `rows` (..., bytes per row) uint8 that can be NaN or infinite."""
    block = BLOCK_TYPES[name]
    blocks = rows.reshape(-1, block.bytes)
    found = [numbers_at(blocks, *place) for place in block.floats]
    return [torch.where(n == 255, torch.nan, 0.0) if n.dtype == torch.uint8 else n for n in found]


def columns(row_bytes: int, name: str) -> int:
    """Number of weights in a row of `row_bytes` bytes.

    Raises:
        ValueError: the row is not a whole number of blocks.
    """
    block = BLOCK_TYPES[name]
    if row_bytes % block.bytes:
        raise ValueError(
            f"A row of {row_bytes} bytes is not a whole number of {name} blocks ({block.bytes} bytes each)."
        )
    return row_bytes // block.bytes * block.weights
