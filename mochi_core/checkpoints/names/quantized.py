"""Quantised weights inside files: several tensors of the file become one weight that knows its stored form.

They are written in four ways: `X.weight` in fp8 with `X.scale_weight` (and `X.scale_input`) beside it and a marker tensor
`scaled_fp8` in the file; `X.weight` with `X.weight_scale`, `X.input_scale` and `X.comfy_quant` (JSON as bytes, or the JSON of
all layers in the file's metadata); `X.weight` in plain fp8; GGML blocks in `X.Q4_0_qweight` and the like. What ComfyUI
saves of a model in GGML blocks is of the second kind, in the form `ggml_Q4_0`; of one that multiplies in fp8 with scales per
row, in the form `float8_e4m3fn_rowwise`.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ...quantization.fp8 import FP8, supports_scaled_mm
from ...quantization.ggml import BLOCK_TYPES
from ...quantization.weights import FP8_ROWWISE, QUANTIZERS, QuantizedWeight
from ..formats.reader import NOTE
from ..tensors import LazyStateDict, LazyTensor, ggml_weight, quantized_weight

GGML_WEIGHT = re.compile(r"(.*\.)([A-Z\d_]+)_qweight")
MARKER = re.compile(r"(.*\.)?scaled_fp8")
STORED_AS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
ROWWISE_FORMAT = "float8_e4m3fn_rowwise"
GGML_FORMAT = "ggml_"
MAX_NOTE_BYTES = 4096
SCALES, INPUT_SCALES = ("weight_scale", "scale_weight"), ("input_scale", "scale_input")
LARGE = re.compile(r"blocks\..*\.weight|encoder\.block\..*\.(q|k|v|o|wi_0|wi_1|wo)\.weight")
MODULATION = re.compile(r".*\.mod_[xy]\.weight")


def resolve(tensors: LazyStateDict) -> LazyStateDict:
    """The same tensors, but every quantised weight is one `X.weight`, whatever its parts were called.

    Layers in a form that cannot be read here are left as they are; `unknown_forms` names them.
    """
    markers = {name: tensor for name, tensor in tensors.items() if MARKER.fullmatch(name)}
    # A marker of two elements asks for products in full precision.
    exact = tuple(name.removesuffix("scaled_fp8") for name, marker in markers.items() if marker.shape == (2,))
    resolved = {name: tensor for name, tensor in tensors.items() if name not in markers}
    for name, tensor in tensors.items():
        is_matrix, is_weight = len(tensor.shape) == 2, name.endswith(".weight")
        if is_matrix and (match := GGML_WEIGHT.fullmatch(name)) and _holds_blocks(tensor, match[2]):
            resolved[match[1] + "weight"] = ggml_weight(resolved.pop(name), match[2])
        elif is_matrix and is_weight and tensor.dtype == torch.uint8:
            _resolve_blocks(resolved, name.removesuffix("weight"))
        elif is_weight and len(tensor.shape) > 1 and tensor.dtype in STORED_AS.values():
            _resolve_scaled(resolved, name.removesuffix("weight"), exact_product=bool(exact) and name.startswith(exact))
    return resolved


def is_large(name: str, tensor: LazyTensor | Tensor) -> bool:
    """Whether it is a matrix of the blocks of a transformer or of T5; nothing else is ever quantised here."""
    return LARGE.fullmatch(name) is not None and len(tensor.shape) == 2


def quantize_large(tensors: LazyStateDict, kind: str | None) -> LazyStateDict:
    """The same tensors, but the matrices of the blocks are quantised when they are read (see `QUANTIZERS`); None is none.

    What the file has quantised stays in the file's form. With fp8_rowwise, `mod_x` and `mod_y` are left as they are: they
    have a row for each prompt only, so that there is nothing to gain from a faster product.
    """
    if kind is None:
        return tensors
    if kind not in QUANTIZERS:
        raise ValueError(f"There is no quantisation {kind!r}; use {', '.join(QUANTIZERS)}.")
    quantize = QUANTIZERS[kind]

    def quantized(tensor: LazyTensor) -> LazyTensor:
        return quantized_weight(tensor.shape, tensor.dtype, lambda: quantize(tensor.read()))

    def takes_part(name: str, tensor: LazyTensor) -> bool:
        left_out = kind == FP8_ROWWISE and MODULATION.fullmatch(name) is not None
        return is_large(name, tensor) and tensor.quantized is None and not left_out

    return {name: quantized(tensor) if takes_part(name, tensor) else tensor for name, tensor in tensors.items()}


def unknown_forms(tensors: LazyStateDict) -> set[str]:
    """What layers that `resolve` could not read call their form."""
    notes = [_note(tensors, name.removesuffix(NOTE)) for name in tensors if name.endswith("." + NOTE)]
    bare = any(t.dtype == torch.int8 and t.quantized is None for t in tensors.values())
    blocks = {match[2] for name in tensors if (match := GGML_WEIGHT.fullmatch(name))}
    return {str(note.get("format")) for note in notes} | blocks | ({"int8 without a scale"} if bare else set())


def _holds_blocks(stored: LazyTensor, block_type: str) -> bool:
    return block_type in BLOCK_TYPES and stored.shape[1] % BLOCK_TYPES[block_type].bytes == 0


def _resolve_blocks(tensors: LazyStateDict, layer: str) -> None:
    block_type = str(_note(tensors, layer).get("format")).removeprefix(GGML_FORMAT)
    if _holds_blocks(tensors[layer + "weight"], block_type):
        del tensors[layer + NOTE]
        tensors[layer + "weight"] = ggml_weight(tensors[layer + "weight"], block_type)


def _resolve_scaled(tensors: LazyStateDict, layer: str, *, exact_product: bool) -> None:
    """Replace the parts of one layer by its weight, unless they are in an unknown form."""
    note, values = _note(tensors, layer), tensors[layer + "weight"]
    scale, input_scale = _first(tensors, layer, SCALES), _first(tensors, layer, INPUT_SCALES)
    form = note.get("format")
    known = {**STORED_AS, ROWWISE_FORMAT: FP8}.get(str(form)) == values.dtype if "format" in note else True
    bare = values.dtype == torch.int8 and scale is None
    if (
        not known
        or bare
        or note.get("convrot")
        or _count(scale) not in (1, values.shape[0])
        or _count(input_scale) != 1
    ):
        return
    for leaf in (*SCALES, *INPUT_SCALES, NOTE):
        tensors.pop(layer + leaf, None)
    exact_product = scale is None or bool(note.get("full_precision_matrix_mult", exact_product))
    fp8_product = (
        form == ROWWISE_FORMAT and not exact_product and supports_scaled_mm(values.shape) and _count(scale) > 1
    )

    def read() -> QuantizedWeight:
        return QuantizedWeight(
            values.read(),
            None if scale is None else _read_scale(scale, len(values.shape)),
            input_scale=None if input_scale is None else _read_scale(input_scale, len(values.shape)),
            exact_product=exact_product,
            fp8_product=fp8_product,
        )

    tensors[layer + "weight"] = quantized_weight(values.shape, values.dtype, read)


def _count(scale: LazyTensor | None) -> int:
    return 1 if scale is None else math.prod(scale.shape)


def _read_scale(scale: LazyTensor, axes: int) -> Tensor:
    """One float32 number, or (rows, 1), with more ones for the kernels of convolutions."""
    return scale.read().float().reshape(() if _count(scale) == 1 else (-1, *(1,) * (axes - 1)))


def _first(tensors: LazyStateDict, layer: str, leaves: tuple[str, ...]) -> LazyTensor | None:
    return next((tensors[layer + leaf] for leaf in leaves if layer + leaf in tensors), None)


def _note(tensors: LazyStateDict, layer: str) -> dict[str, Any]:
    """What the file says about the form of a layer; empty if nothing."""
    if layer + NOTE not in tensors:
        return {}
    text, note = tensors[layer + NOTE], None
    if math.prod(text.shape) <= MAX_NOTE_BYTES:
        with suppress(ValueError, TypeError, RecursionError):
            note = json.loads(bytes(text.read().flatten().tolist()))
    return note if isinstance(note, dict) else {"format": "something that is no JSON"}
