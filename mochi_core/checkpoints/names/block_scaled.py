"""nvfp4 and mxfp8 weights as ComfyUI saves them: values, and block scales in the order that GPU matrix products expect.

nvfp4: `X.weight` uint8, two values per byte, a float8_e4m3fn scale per 16 values in `X.weight_scale` and one for the whole
weight in `X.weight_scale_2`. mxfp8: `X.weight` float8_e4m3fn, a float8_e8m0fnu scale per 32 values in `X.weight_scale`. Scales
are padded to tiles of 128 rows and 4 columns; in a tile, row r, column c is at 16 * (r % 32) + 4 * (r // 32) + c. Source:
NVIDIA, cuBLAS documentation, "1D Block Scaling Factors Layout".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import LazyStateDict, LazyTensor, block_weight

TILE_ROWS, TILE_COLUMNS = 128, 4
VALUE_BYTES = {"nvfp4": 8, "mxfp8": 32}
VALUE_DTYPES = {"nvfp4": torch.uint8, "mxfp8": torch.float8_e4m3fn}


def gather_block_scaled(tensors: LazyStateDict, layer: str, format: str) -> bool:
    """Merge a layer's parts into one weight in blocks; returns False and changes nothing if they do not fit together."""
    values, scales = tensors[layer + "weight"], tensors.get(layer + "weight_scale")
    factor = tensors.get(layer + "weight_scale_2")
    if scales is None or not _fit(values, scales, format) or layer + "pre_quant_scale" in tensors:
        return False
    if (format == "nvfp4") != (factor is not None) or (factor is not None and factor.numel != 1):
        return False
    rows, size = values.shape[0], VALUE_BYTES[format]
    row_blocks = values.shape[1] // size

    def read() -> Tensor:
        blocks = values.read().contiguous().view(torch.uint8).reshape(rows, row_blocks, size)
        scale_bytes = untiled(scales.read().contiguous().view(torch.uint8), rows, row_blocks)
        return torch.cat((blocks, scale_bytes[..., None]), dim=2).reshape(rows, -1)

    for leaf in ("weight_scale", "weight_scale_2", "input_scale"):
        tensors.pop(layer + leaf, None)
    stored = LazyTensor((rows, row_blocks * (size + 1)), torch.uint8, read)
    tensors[layer + "weight"] = block_weight(stored, format.upper(), factor)
    return True


def _fit(values: LazyTensor, scales: LazyTensor, format: str) -> bool:
    if len(values.shape) != 2 or values.shape[1] % VALUE_BYTES[format] or values.dtype != VALUE_DTYPES[format]:
        return False
    rows, blocks = values.shape[0], values.shape[1] // VALUE_BYTES[format]
    return scales.dtype.itemsize == 1 and scales.numel == -(-rows // TILE_ROWS) * -(-blocks // TILE_COLUMNS) * 512


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in tiled order, of any shape, to (rows, columns)."""
    across = -(-columns // TILE_COLUMNS)
    tiles = scales.reshape(-1, across, 32, 4, TILE_COLUMNS)  # tile row, tile column, r % 32, r // 32, c
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1, across * TILE_COLUMNS)[:rows, :columns]
