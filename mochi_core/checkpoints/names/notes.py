"""Notes on the format of a quantised layer: a tensor `X.comfy_quant` of JSON in bytes, as ComfyUI has them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..limits import read_json
from ..tensors import LazyTensor

NOTE = "comfy_quant"
"""Last name of the tensor that tells the format of a quantised layer."""
MAX_NOTE_BYTES = 4096
INT8 = "int8_tensorwise"
EXACT_INT8 = {"format": INT8, "full_precision_matrix_mult": True}
"""int8 with a scale for each row, from a tool whose products are not in int8."""


def note_tensor(note: Any) -> Tensor:
    """A note about the format of a quantised layer as files keep it: JSON in uint8."""
    return torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)


def read_note(tensor: LazyTensor) -> Any:
    """What a note says: the JSON in a tensor of bytes; ValueError if it is none, or too long."""
    if tensor.dtype != torch.uint8 or tensor.numel > MAX_NOTE_BYTES:
        raise ValueError(f"it is not JSON of up to {MAX_NOTE_BYTES:,} bytes")
    return read_json(bytes(tensor.read().flatten().tolist()).decode())
