"""Write safetensors files tensor by tensor: a model of any size takes the memory of one tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from ...output_files import replacing
from ..tensors import LazyStateDict
from .safetensors import DTYPE_CODES, LENGTH_BYTES

CODES = {dtype: code for code, dtype in DTYPE_CODES.items()}
ALIGNMENT = 8


def write_safetensors(
    path: Path,
    tensors: LazyStateDict,
    metadata: dict[str, str],
    on_tensor: Callable[[], object] = lambda: None,
    *,
    overwrite: bool = True,
) -> None:
    """Read the tensors in order and write each at its offset; `path` appears only when the file is complete.

    Raises:
        OSError: see `replacing`; or a tensor cannot be read.
    """
    header, places = layout(tensors, metadata)
    with replacing(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name, tensor in tensors.items():
            file.seek(len(header) + places[name])
            file.write(tensor.read().contiguous().flatten().view(torch.uint8).numpy().data)
            on_tensor()


def layout(tensors: LazyStateDict, metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header including its length, and the offset of each tensor after it; wide dtypes come first to keep all aligned."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    places, position = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        end = position + math.prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        places[name], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, places
