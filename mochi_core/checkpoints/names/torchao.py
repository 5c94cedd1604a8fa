"""Weights quantised by torchao: the parts of `X.weight` are `X._weight_qdata`, `X._weight_scale` and the like.

Their type is in the file's metadata, under `X.weight`: JSON with the class and its attributes. Source: torchao,
prototype/safetensors/safetensors_support.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from ..limits import read_json
from ..tensors import LazyStateDict, LazyTensor, from_state_dict
from .notes import EXACT_INT8, NOTE, note_tensor

PART = re.compile(r"(?P<layer>.*\.)?_weight_(?P<part>\w+)")
INT8_KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
FLOAT8_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


def translate_torchao(tensors: LazyStateDict, metadata: Mapping[str, str]) -> LazyStateDict:
    """Rename int8 and fp8 weights to ComfyUI's names; a weight that cannot be read gets a note of its format."""
    translated, layers = dict(tensors), dict[str, LazyStateDict]()
    for name in tensors:
        if match := PART.fullmatch(name):
            layers.setdefault(match["layer"] or "", {})[match["part"]] = translated.pop(name)
    for layer, parts in layers.items():
        kind = _kind(metadata.get(f"{layer}weight", ""))
        note, values, scale = _note(kind, parts), parts.get("qdata"), parts.get("scale")
        translated[f"{layer}weight"] = values or next(iter(parts.values()))
        if scale is not None:
            translated[f"{layer}weight_scale"] = scale
        translated |= from_state_dict({layer + NOTE: note_tensor(note)})
    return translated


def _kind(text: str) -> str:
    with suppress(ValueError):
        content = read_json(text)
        if isinstance(content, dict):
            return str(content.get("_type"))
    return "of an unknown kind"


def _note(kind: str, parts: LazyStateDict) -> dict[str, Any]:
    """ComfyUI's note for values with a single scale or one per row; torchao's class name for everything else."""
    values, scale = parts.get("qdata"), parts.get("scale")
    if values is not None and scale is not None and _is_per_row(values, scale):
        zeros = parts.get("zero_point")
        if kind in INT8_KINDS and parts.keys() <= {"qdata", "scale", "zero_point"} and _is_zero(zeros):
            return EXACT_INT8
        if kind == "Float8Tensor" and parts.keys() == {"qdata", "scale"} and values.dtype in FLOAT8_FORMATS:
            return {"format": FLOAT8_FORMATS[values.dtype], "full_precision_matrix_mult": True}
    shape = "" if scale is None else f" with {scale.shape} scales"
    return {"format": f"torchao {kind}{shape}"}


def _is_per_row(values: LazyTensor, scale: LazyTensor) -> bool:
    return len(values.shape) == 2 and scale.shape in ((), (1,), (1, 1), (values.shape[0], 1), (values.shape[0],))


def _is_zero(zeros: LazyTensor | None) -> bool:
    return zeros is None or not bool(zeros.read().any())
