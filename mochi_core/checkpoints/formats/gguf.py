"""GGUF containers: a header of keys and tensor descriptions, then the data, all little-endian.

Nothing in the header is trusted until it has been checked against the file size. Layout: docs/gguf.md of ggml-org/ggml; type
numbers: its enum ggml_type.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...quantization.ggml import BLOCK_TYPES
from ...shown import shown
from ..limits import MAX_AXES, MAX_GGUF_HEADER_BYTES, MAX_GGUF_TEXTS, MAX_NAME, MAX_TENSORS
from ..tensors import Checkpoint, LazyStateDict, LazyTensor, block_weight

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN_TYPES = {
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
    28: torch.float64, 30: torch.bfloat16,
}  # fmt: skip
BLOCK_NAMES = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4",
}  # fmt: skip
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
DEFAULT_ALIGNMENT, ALIGNMENTS = 32, {2**power for power in range(3, 17)}
TRUE_SHAPE = "comfy.gguf.orig_shape."
"""Key prefix under which converters (city96/ComfyUI-GGUF) store the shape of a tensor flattened to fill whole blocks."""


@dataclass
class _Cursor:
    """Reads the header sequentially, never past its end."""

    data: memoryview
    place: int = 0
    texts: int = 0
    """Number of strings skipped in lists."""

    def take(self, count: int) -> memoryview:
        piece = self.data[self.place : self.place + count]
        if len(piece) < count:
            raise ValueError("it ends within its header")
        self.place += count
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return bytes(self.take(self.number("Q"))).decode("utf-8", errors="replace")

    def name(self) -> str:
        """The name of a key or a tensor."""
        name = self.text()
        if len(name) > MAX_NAME:
            raise ValueError(f"it has the name {shown(name)}, longer than the limit of {MAX_NAME} characters")
        return name

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def value(self) -> Any:
        """The value of a key: a number, a string, or the first few entries of a list."""
        kind = self.number("I")
        if kind != ARRAY:
            return self._scalar(kind)
        kind, count = self.number("I"), self.number("Q")
        first = tuple(self._scalar(kind) for _ in range(min(count, MAX_AXES)))
        rest = count - len(first)
        if kind in SCALARS:
            self.take(rest * struct.calcsize(f"<{SCALARS[kind]}"))
        else:
            self._skip_texts(rest)
        return first

    def _skip_texts(self, count: int) -> None:
        self.texts += count
        if self.texts > MAX_GGUF_TEXTS:
            raise ValueError(f"its lists hold more than {MAX_GGUF_TEXTS:,} strings")
        length_at, bytes_of_length = struct.Struct("<Q").unpack_from, struct.calcsize("<Q")
        try:
            for _ in range(count):
                self.place += bytes_of_length + length_at(self.data, self.place)[0]
        except (struct.error, OverflowError):
            self.place = len(self.data) + 1
        if self.place > len(self.data):
            raise ValueError("it ends within its header")

    def _scalar(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind not in SCALARS:
            raise ValueError(f"a value has the unknown kind {kind}")
        return self.number(SCALARS[kind])


@dataclass(frozen=True)
class _Description:
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file without reading its tensors; scalar keys become its metadata.

    Raises:
        ValueError: it is not a GGUF file, it is truncated, or it holds tensors of an unsupported type.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(
                f"{path.name} is not a GGUF file (perhaps a web page or a Git LFS pointer); download it again."
            )
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # mapped, not read
    try:
        keys, descriptions, start = _read_header(_Cursor(data[:MAX_GGUF_HEADER_BYTES].numpy().data, len(MAGIC)))
    except ValueError as error:
        raise _damaged(path, error) from None
    _refuse_types(path, descriptions)
    try:
        tensors = {d.name: _stored(d, data[start:], keys) for d in descriptions}
        _refuse_shared_bytes(descriptions, tensors)
    except ValueError as error:
        raise _damaged(path, error) from None
    metadata = {key: str(value) for key, value in keys.items() if not isinstance(value, tuple)}
    return Checkpoint(path.name, path, tensors, metadata)


def _damaged(path: Path, error: ValueError) -> ValueError:
    return ValueError(f"{path.name} cannot be read: {error}; download it again or use another file.")


def _refuse_types(path: Path, descriptions: list[_Description]) -> None:
    for d in descriptions:
        if d.type in OTHER_TYPES:
            raise ValueError(
                f"{path.name} has {shown(d.name)} of type {OTHER_TYPES[d.type]}, which is not supported; "
                "use a file in F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS or MXFP4."
            )


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], list[_Description], int]:
    """Keys, tensor descriptions, and the offset at which the data begins."""
    version, num_tensors, num_keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise ValueError(f"its GGUF version is {version}, but must be 2 or 3")
    if max(num_tensors, num_keys) > MAX_TENSORS:
        raise ValueError(
            f"it claims {num_tensors:,} tensors and {num_keys:,} keys; at most {MAX_TENSORS:,} are allowed"
        )
    keys = {cursor.name(): cursor.value() for _ in range(num_keys)}
    descriptions = [_describe(cursor) for _ in range(num_tensors)]
    alignment = keys.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment not in ALIGNMENTS:  # 32.0 is in the set, too
        raise ValueError(f"its alignment is {shown(str(alignment))}, but must be a power of two from 8 to 65536")
    return keys, descriptions, -(-cursor.place // alignment) * alignment


def _describe(cursor: _Cursor) -> _Description:
    name, dimensions = cursor.name(), cursor.number("I")
    if dimensions > MAX_AXES:
        raise ValueError(f"{shown(name)} has {dimensions} dimensions")
    shape = tuple(reversed(cursor.numbers("Q", dimensions)))  # the file lists the innermost first
    if 0 in shape:
        raise ValueError(f"{shown(name)} is empty")
    return _Description(name, shape, cursor.number("I"), cursor.number("Q"))


def _refuse_shared_bytes(descriptions: list[_Description], tensors: LazyStateDict) -> None:
    if len(tensors) < len(descriptions):
        raise ValueError("it has two tensors of the same name")
    ordered = sorted(descriptions, key=lambda d: d.offset)
    for first, second in pairwise(ordered):
        if first.offset + tensors[first.name].num_bytes > second.offset:
            raise ValueError(f"{shown(first.name)} and {shown(second.name)} overlap")


def _stored(description: _Description, data: Tensor, keys: dict[str, Any]) -> LazyTensor:
    d = description
    shape = keys.get(TRUE_SHAPE + d.name, d.shape)
    if not isinstance(shape, tuple) or not _same_size(shape, d.shape):
        raise ValueError(f"{shown(d.name)} has shape {d.shape}, which cannot be reshaped to {shown(str(shape))}")
    if d.type in PLAIN_TYPES:
        dtype = PLAIN_TYPES[d.type]
        piece = _piece(d, data, math.prod(shape) * dtype.itemsize)
        return LazyTensor(shape, dtype, lambda: piece.view(dtype).reshape(shape))
    if d.type not in BLOCK_NAMES:
        raise ValueError(f"{shown(d.name)} has type {d.type}, which no version of the format defines")
    return _stored_blocks(d, data, shape)


def _same_size(shape: tuple[Any, ...], other: tuple[int, ...]) -> bool:
    return all(isinstance(n, int) and n >= 0 for n in shape) and math.prod(shape) == math.prod(other)


def _stored_blocks(d: _Description, data: Tensor, shape: tuple[int, ...]) -> LazyTensor:
    """A tensor in blocks, which run along the innermost dimension of the shape in the file."""
    block = BLOCK_TYPES[BLOCK_NAMES[d.type]]
    columns = d.shape[-1] if d.shape else 1
    if columns % block.weights:
        raise ValueError(f"{shown(d.name)} has rows of {columns}, not a whole number of {BLOCK_NAMES[d.type]} blocks")
    row_bytes = columns // block.weights * block.bytes
    piece = _piece(d, data, math.prod(d.shape) // block.weights * block.bytes).view(-1, row_bytes)
    weight = block_weight(LazyTensor(tuple(piece.shape), torch.uint8, lambda: piece), BLOCK_NAMES[d.type])
    return weight if shape == weight.shape else weight.map(lambda value: value.reshape(shape), shape=shape)


def _piece(d: _Description, data: Tensor, count: int) -> Tensor:
    if d.offset % 8 or d.offset + count > len(data):
        raise ValueError(
            f"{shown(d.name)} is at offset {d.offset:,} and takes {count:,} bytes; the data has {len(data):,}"
        )
    return data[d.offset : d.offset + count]
