"""Notes on a quantised layer's format, in ComfyUI's form: a tensor `X.comfy_quant` that holds JSON as bytes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..limits import read_json
from ..tensors import LazyTensor

NOTE = "comfy_quant"
"""Last component of the name of the tensor that states a quantised layer's format."""
MAX_NOTE_BYTES = 4096
INT8 = "int8_tensorwise"
EXACT_INT8 = {"format": INT8, "full_precision_matrix_mult": True}
"""int8 with a scale per row, from a tool that does not multiply in int8."""


def note_tensor(note: Any) -> Tensor:
    """A note on a quantised layer's format as it is stored in files: JSON in uint8."""
    return torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)


def read_note(tensor: LazyTensor) -> Any:
    """Parse a note, JSON in a tensor of bytes; ValueError if it is not JSON or too long."""
    if tensor.dtype != torch.uint8 or tensor.numel > MAX_NOTE_BYTES:
        raise ValueError(f"it is not JSON of up to {MAX_NOTE_BYTES:,} bytes")
    return read_json(bytes(tensor.read().flatten().tolist()).decode())
