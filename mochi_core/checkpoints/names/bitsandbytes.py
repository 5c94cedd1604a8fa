"""Weights quantised by bitsandbytes, as transformers and diffusers save them.

int8: `X.weight`, with the largest magnitude of each row in `X.SCB`; a weight is value * SCB / 127. 4 bits: `X.weight` in uint8,
two codes per byte, with `X.weight.absmax` (a scale per block of values), `X.weight.quant_map` (the value of each code) and
`X.weight.quant_state.bitsandbytes__nf4` (JSON as bytes). With nested scales, absmax is itself quantised: indices into
`X.weight.nested_quant_map`, times `X.weight.nested_absmax` for each block of scales, plus an offset. Source: bitsandbytes,
functional.py (QuantState) and nn/modules.py.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quantization.block_floats import FP4_VALUES, NF4_VALUES
from ...quantization.blocks import BLOCK_TYPES, dequantize
from ..tensors import LazyStateDict, LazyTensor, block_weight, from_state_dict
from .notes import EXACT_INT8, NOTE, note_tensor, read_note

STATE_PART = "quant_state.bitsandbytes__"
PART = re.compile(r"(?P<weight>.*weight)\.(?P<part>.+)")
STATE = re.compile(rf"(?P<weight>.*weight)\.{re.escape(STATE_PART)}\w+")
VALUES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}
LARGEST_INT8 = 127


@dataclass(frozen=True)
class State:
    """How a 4-bit weight is stored."""

    block_type: str
    shape: tuple[int, int]
    block_size: int
    """Number of values that share a scale; blocks follow the matrix in row-major order."""
    nested_block_size: int
    nested_offset: float


def translate_bitsandbytes(tensors: LazyStateDict) -> LazyStateDict:
    """Rename int8 weights to ComfyUI's names, and merge the parts of each 4-bit weight into one tensor.

    A weight that cannot be read gets a note of its format, which `unknown_formats` finds.
    """
    translated = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".SCB"):
            _translate_int8(translated, name.removesuffix("SCB"), tensor)
    for weight, parts in _parts_of_4_bits(translated).items():
        for part in parts:
            del translated[f"{weight}.{part}"]
        _gather_4_bits(translated, weight, parts)
    return translated


def _translate_int8(tensors: LazyStateDict, layer: str, largest: LazyTensor) -> None:
    del tensors[layer + "SCB"]
    layout = tensors.pop(layer + "weight_format", None)
    by_rows = layout is None or (layout.numel == 1 and int(layout.read()) == 0)
    note = EXACT_INT8 if by_rows else {"format": "bitsandbytes int8 in tiles"}
    tensors[layer + "weight_scale"] = largest.map(lambda value: value.float() / LARGEST_INT8, dtype=torch.float32)
    tensors |= from_state_dict({layer + NOTE: note_tensor(note)})


def _parts_of_4_bits(tensors: LazyStateDict) -> dict[str, LazyStateDict]:
    """The tensors `X.weight.*` of each weight with a quantisation state, keyed by what the asterisk stands for."""
    parts = {match["weight"]: LazyStateDict() for name in tensors if (match := STATE.fullmatch(name))}
    for name, tensor in tensors.items():
        if (match := PART.fullmatch(name)) and match["weight"] in parts:
            parts[match["weight"]][match["part"]] = tensor
    return parts


def _gather_4_bits(tensors: LazyStateDict, weight: str, parts: LazyStateDict) -> None:
    states = [tensor for part, tensor in parts.items() if part.startswith(STATE_PART)]
    state, packed = _read_state(states[0]) if len(states) == 1 else None, tensors.get(weight)
    if state is None or packed is None or not _fits(state, packed, parts):
        note = {"format": "bitsandbytes 4 bits of an unknown kind"}
        tensors |= from_state_dict({weight.removesuffix("weight") + NOTE: note_tensor(note)})
    else:
        tensors[weight] = _weight(state, packed, parts)


def _read_state(tensor: LazyTensor) -> State | None:
    with suppress(ValueError, TypeError, KeyError, OverflowError):
        content = read_note(tensor)
        kind, (rows, columns), size = content["quant_type"], content["shape"], content["blocksize"]
        nested = content.get("nested_blocksize", 0), content.get("nested_offset", 0.0)
        whole = all(isinstance(n, int) and n >= 0 for n in (rows, columns, size, nested[0]))
        if kind in VALUES and whole and size > 0 and math.isfinite(nested[1]):
            return State(kind.upper(), (rows, columns), size, *nested)
    return None


def _fits(state: State, packed: LazyTensor, parts: LazyStateDict) -> bool:
    """Whether the parts have the sizes and values that the state implies."""
    count, scales = math.prod(state.shape), parts.get("absmax")
    if packed.dtype != torch.uint8 or packed.numel * 2 != count or count % state.block_size or scales is None:
        return False
    if scales.numel * state.block_size != count or "quant_map" not in parts:
        return False
    values = torch.tensor(VALUES[state.block_type.lower()])
    known = parts["quant_map"].shape == (16,) and torch.allclose(
        parts["quant_map"].read().float(), values, rtol=0, atol=1e-6
    )
    if not known or not state.nested_block_size:
        return known and scales.is_float
    table, largest = parts.get("nested_quant_map"), parts.get("nested_absmax")
    blocks = -(-scales.numel // state.nested_block_size)
    return scales.dtype == torch.uint8 and table is not None and largest is not None and (
        (table.numel, largest.numel) == (256, blocks)
    )  # fmt: skip


def _weight(state: State, packed: LazyTensor, parts: LazyStateDict) -> LazyTensor:
    """The weight in blocks if none extends past the end of a row; otherwise it is dequantised when read."""
    block = BLOCK_TYPES[state.block_type]
    rows, columns = state.shape
    row_bytes = columns // block.weights * block.bytes

    def read() -> Tensor:
        scales = _scales(state, parts).repeat_interleave(state.block_size // block.weights)
        values = packed.read().reshape(-1, block.weights // 2)
        return torch.cat((values, scales[:, None].view(torch.uint8)), dim=1)

    def read_dequantized() -> Tensor:
        scales = _scales(state, parts)
        plain = torch.cat((packed.read().flatten(), packed.read().new_zeros(-packed.numel % (block.weights // 2))))
        blocks = plain.reshape(-1, block.weights // 2)
        ones = torch.ones(len(blocks), 1).view(torch.uint8)
        values = dequantize(torch.cat((blocks, ones), dim=1), state.block_type).flatten()[: rows * columns]
        return (values.reshape(-1, state.block_size) * scales[:, None]).reshape(state.shape)

    if columns % state.block_size or state.block_size % block.weights:
        return LazyTensor(state.shape, torch.float32, read_dequantized)
    stored = LazyTensor((rows, row_bytes), torch.uint8, lambda: read().reshape(rows, row_bytes))
    return block_weight(stored, state.block_type)


def _scales(state: State, parts: LazyStateDict) -> Tensor:
    """The scale of every block, float32."""
    scales = parts["absmax"].read().flatten()
    if not state.nested_block_size:
        return scales.float()
    table, largest = (parts[f"nested_{part}"].read().float().flatten() for part in ("quant_map", "absmax"))
    # Capped: an untrusted block size larger than the number of scales would allocate that much.
    each = largest.repeat_interleave(min(state.nested_block_size, len(scales)))[: len(scales)]
    return table[scales.int()] * each + state.nested_offset
