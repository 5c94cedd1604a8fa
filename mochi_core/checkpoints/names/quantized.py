"""Quantised weights in files: several tensors of a file become one weight that knows its stored form.

There are four layouts: `X.weight` in fp8 with `X.scale_weight` (and `X.scale_input`) and a marker tensor `scaled_fp8` in the
file; `X.weight` with `X.weight_scale`, `X.input_scale` and `X.comfy_quant` (JSON as bytes, or JSON for all layers in the file's
metadata); `X.weight` in plain fp8; GGML blocks in `X.Q4_0_qweight` and the like. Those of other tools are translated first:
`torchao`, `bitsandbytes`. Models in blocks that ComfyUI saves use the second layout, with the format `blocks_Q4_0` or
`blocks_NF4` (`ggml_Q4_0` in files of version 0.1); models that multiply in fp8 with scales per row, with the format
`float8_e4m3fn_rowwise`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ...quantization.blocks import BLOCK_TYPES
from ...quantization.fp8 import FP8, supports_scaled_mm
from ...quantization.weights import FP8_ROWWISE, QUANTIZERS, QuantizedWeight
from ..limits import read_json
from ..tensors import (
    QUANTIZATION,
    Checkpoint,
    LazyStateDict,
    LazyTensor,
    block_weight,
    from_state_dict,
    quantized_weight,
)
from .bitsandbytes import translate_bitsandbytes
from .block_scaled import gather_block_scaled
from .notes import INT8, NOTE, note_tensor, read_note
from .torchao import translate_torchao

GGML_WEIGHT = re.compile(r"(.*\.)([A-Z\d_]+)_qweight")
MARKER = re.compile(r"(.*\.)?scaled_fp8")
STORED_AS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, INT8: torch.int8}
ROWWISE_FORMAT = "float8_e4m3fn_rowwise"
BLOCK_FORMAT = "blocks_"
"""Prefix of the formats of layers in blocks; the name of the block type follows."""
READ_BLOCK_FORMAT = re.compile(rf"(?:{BLOCK_FORMAT}|ggml_)(\w+)")
SCALES, INPUT_SCALES = ("weight_scale", "scale_weight"), ("input_scale", "scale_input")
BLOCK_MATRIX = re.compile(r"blocks\..*\.weight|encoder\.block\..*\.(q|k|v|o|wi_0|wi_1|wo)\.weight")
MODULATION = re.compile(r".*\.mod_[xy]\.weight")


def gather_quantized(checkpoint: Checkpoint) -> LazyStateDict:
    """The tensors of a file, with every quantised weight merged into one `X.weight`, whatever the names of its parts.

    Layers in an unsupported format are left unchanged; `unknown_formats` lists these formats.

    Raises:
        ValueError: the metadata about quantised layers cannot be read.
    """
    tensors = translate_torchao(checkpoint.tensors, checkpoint.metadata)
    tensors = translate_bitsandbytes(tensors) | _notes_in_metadata(checkpoint)
    markers = {name: tensor for name, tensor in tensors.items() if MARKER.fullmatch(name)}
    # A marker with two elements requests matrix products in full precision.
    exact = tuple(name.removesuffix("scaled_fp8") for name, marker in markers.items() if marker.shape == (2,))
    gathered = {name: tensor for name, tensor in tensors.items() if name not in markers}
    for name, tensor in tensors.items():
        if tensor.quantized is not None:
            continue  # from a GGUF file, which states its block types itself
        is_matrix, is_weight = len(tensor.shape) == 2, name.endswith(".weight")
        if is_weight and _is_rotated(gathered, name.removesuffix("weight")):
            continue
        if is_matrix and (match := GGML_WEIGHT.fullmatch(name)) and _holds_blocks(tensor, match[2]):
            gathered[match[1] + "weight"] = block_weight(gathered.pop(name), match[2])
        elif is_matrix and is_weight and tensor.dtype == torch.uint8:
            _gather_blocks(gathered, name.removesuffix("weight"))
        elif is_weight and len(tensor.shape) > 1 and tensor.dtype in STORED_AS.values():
            _gather_scaled(gathered, name.removesuffix("weight"), exact_product=bool(exact) and name.startswith(exact))
    return gathered


def _notes_in_metadata(checkpoint: Checkpoint) -> LazyStateDict:
    """The notes on quantised layers in a file's metadata, as the tensors that other files store them in."""
    try:
        layers = read_json(checkpoint.metadata.get(QUANTIZATION, "{}")).get("layers", {})
        return from_state_dict({f"{layer}.{NOTE}": note_tensor(note) for layer, note in layers.items()})
    except (ValueError, AttributeError):
        raise checkpoint.error(f"has an unreadable {QUANTIZATION}; download it again.") from None


def is_block_matrix(name: str, tensor: LazyTensor | Tensor) -> bool:
    """Whether a tensor is a matrix in a block of the transformer or T5; only these are ever quantised on loading."""
    return BLOCK_MATRIX.fullmatch(name) is not None and len(tensor.shape) == 2


def quantize_block_matrices(checkpoint: Checkpoint, kind: str | None) -> Checkpoint:
    """Quantise the blocks' matrices when they are read, with one of `QUANTIZERS`; None changes nothing.

    Weights already quantised in the file keep their form. fp8_rowwise leaves `mod_x` and `mod_y` unchanged: their input has only
    one row per prompt, so a faster product gains nothing.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind is None:
        return checkpoint
    if kind not in QUANTIZERS:
        raise ValueError(f"There is no quantisation {kind!r}; use {', '.join(QUANTIZERS)}.")
    quantize = QUANTIZERS[kind]

    def quantized(tensor: LazyTensor) -> LazyTensor:
        return quantized_weight(tensor.shape, tensor.dtype, lambda: quantize(tensor.read()))

    def takes_part(name: str, tensor: LazyTensor) -> bool:
        left_out = kind == FP8_ROWWISE and MODULATION.fullmatch(name) is not None
        return is_block_matrix(name, tensor) and tensor.quantized is None and not left_out

    tensors = checkpoint.tensors.items()
    return checkpoint.with_tensors({name: quantized(t) if takes_part(name, t) else t for name, t in tensors})


def unknown_formats(tensors: LazyStateDict) -> set[str]:
    """The file's names for the formats of layers that `gather_quantized` could not read."""
    notes = [_note(tensors, name.removesuffix(NOTE)) for name in tensors if name.endswith("." + NOTE)]
    bare = any(
        tensor.dtype == torch.int8 and tensor.quantized is None and name.removesuffix("weight") + NOTE not in tensors
        for name, tensor in tensors.items()
    )
    blocks = {match[2] for name in tensors if (match := GGML_WEIGHT.fullmatch(name))}
    return {str(note.get("format")) for note in notes} | blocks | ({"int8 without a scale"} if bare else set())


def _is_rotated(tensors: LazyStateDict, layer: str) -> bool:
    """Whether a layer's note says that its weight was rotated before quantisation, in any format."""
    note = _note(tensors, layer)
    params = note.get("params")
    return bool(note.get("convrot") or (isinstance(params, dict) and params.get("convrot")))


def _holds_blocks(stored: LazyTensor, block_type: str) -> bool:
    return block_type in BLOCK_TYPES and stored.shape[1] % BLOCK_TYPES[block_type].bytes == 0


def _gather_blocks(tensors: LazyStateDict, layer: str) -> None:
    stored, stored_format = tensors[layer + "weight"], str(_note(tensors, layer).get("format"))
    match, scale = READ_BLOCK_FORMAT.fullmatch(stored_format), _first(tensors, layer, SCALES)
    block_type = match[1] if match else ""
    if stored_format == "nvfp4" and gather_block_scaled(tensors, layer, stored_format):
        del tensors[layer + NOTE]
    elif _holds_blocks(stored, block_type) and _count(scale) in (1, stored.shape[0]):
        for leaf in (*SCALES, NOTE):
            tensors.pop(layer + leaf, None)
        tensors[layer + "weight"] = block_weight(stored, block_type, scale)


def _gather_scaled(tensors: LazyStateDict, layer: str, *, exact_product: bool) -> None:
    """Replace the parts of a layer with its weight, unless they are in an unknown format."""
    note, values = _note(tensors, layer), tensors[layer + "weight"]
    if note.get("format") == "mxfp8" and gather_block_scaled(tensors, layer, "mxfp8"):
        del tensors[layer + NOTE]
        return
    scale, input_scale = _first(tensors, layer, SCALES), _first(tensors, layer, INPUT_SCALES)
    stored_format = note.get("format")
    known = "format" not in note or {**STORED_AS, ROWWISE_FORMAT: FP8}.get(str(stored_format)) == values.dtype
    bare = values.dtype == torch.int8 and scale is None
    fits = _count(scale) in (1, values.shape[0]) and _count(input_scale) == 1
    if not known or bare or not fits:
        return
    for leaf in (*SCALES, *INPUT_SCALES, NOTE):
        tensors.pop(layer + leaf, None)
    exact_product = scale is None or bool(note.get("full_precision_matrix_mult", exact_product))
    fp8_product = (
        stored_format == ROWWISE_FORMAT and not exact_product and supports_scaled_mm(values.shape) and _count(scale) > 1
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
    return 1 if scale is None else scale.numel


def _read_scale(scale: LazyTensor, axes: int) -> Tensor:
    """A float32 scalar, or (rows, 1), with further axes of size 1 for convolution kernels."""
    return scale.read().float().reshape(() if _count(scale) == 1 else (-1, *(1,) * (axes - 1)))


def _first(tensors: LazyStateDict, layer: str, leaves: tuple[str, ...]) -> LazyTensor | None:
    return next((tensors[layer + leaf] for leaf in leaves if layer + leaf in tensors), None)


def _note(tensors: LazyStateDict, layer: str) -> dict[str, Any]:
    """The file's note on a layer's format; empty if there is none."""
    if layer + NOTE not in tensors:
        return {}
    note = None
    with suppress(ValueError):
        note = read_note(tensors[layer + NOTE])
    return note if isinstance(note, dict) else {"format": "something that is not JSON"}
