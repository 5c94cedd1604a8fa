"""Safetensors files: the library checks the header, this module says what people have instead of a whole file.

Layout: 8 bytes length of the header (little-endian), the header in JSON, then the tensors' bytes, without gaps.
Source: the section "Format" of the README of huggingface/safetensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..tensors import Checkpoint, LazyTensor

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
DTYPE_CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# How files begin that people have instead of a safetensors file.
OTHER_FILE_TYPES = (
    (b"version https://git-lfs", "a Git LFS pointer, which only stands for one"),
    (b"<", "a web page"),
    (b"PK\x03\x04", "a torch.save file, whose name should end in .pt"),
    (b"GGUF", "a GGUF file, whose name should end in .gguf"),
)


def open_safetensors(path: Path) -> Checkpoint:
    """Open a safetensors file without reading its tensors.

    Raises:
        ValueError: it is no safetensors file, it is cut off, or its header is wrong.
    """
    text = _read_header(path)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
        header.pop("__metadata__", None)
    except (ValueError, RecursionError) as error:
        raise ValueError(_wrong_header(path, error)) from error
    _check_size(path, len(text), header)
    try:
        file = safe_open(path, framework="pt")
        tensors = {name: _lazy(file.get_tensor, name, entry) for name, entry in header.items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(_wrong_header(path, error)) from error
    except RuntimeError as error:
        raise ValueError(f"{path.name} cannot be read ({error}).") from error
    return Checkpoint(path.name, path, tensors, file.metadata() or {})


def _read_header(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = struct.unpack("<Q", start[:LENGTH_BYTES])[0] if len(start) >= LENGTH_BYTES else 0
        _refuse_other_file_types(path, start, length)
        file.seek(LENGTH_BYTES)
        text = file.read(length) if LENGTH_BYTES + length <= size else b""
    if len(text) < length or size < LENGTH_BYTES:
        raise ValueError(_incomplete(path, size, LENGTH_BYTES + length))
    return text


def _refuse_other_file_types(path: Path, start: bytes, length: int) -> None:
    what = next((what for magic, what in OTHER_FILE_TYPES if start.lstrip().startswith(magic)), None)
    if not start:
        what = "an empty file"
    elif what is None and (length > MAX_HEADER_BYTES or start[LENGTH_BYTES : LENGTH_BYTES + 1] not in (b"{", b"")):
        what = "something else"
    if what is not None:
        raise ValueError(f"{path.name} is not a safetensors file but {what}; download the weights again.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The library lets the last of two tensors of one name win."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_size(path: Path, header_bytes: int, header: dict[str, Any]) -> None:
    """The library says only that a size is wrong; people want to know whether a download was cut off."""
    size, expected = path.stat().st_size, LENGTH_BYTES + header_bytes
    with suppress(TypeError, KeyError, IndexError):  # a wrong header, which the library will name
        expected += max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size < expected:
            raise ValueError(_incomplete(path, size, expected))
        if size > expected:
            raise ValueError(f"{path.name} has {size - expected:,} bytes too many at its end; download it again.")


def _lazy(get: Callable[[str], Tensor], name: str, entry: dict[str, Any]) -> LazyTensor:
    if entry["dtype"] not in DTYPE_CODES:
        raise ValueError(f"{name} is stored as {entry['dtype']}, which cannot be read")
    if any(size >= 2**63 for size in entry["shape"]):
        raise ValueError(f"{name} is too large")
    return LazyTensor(tuple(entry["shape"]), DTYPE_CODES[entry["dtype"]], lambda: get(name))


def _incomplete(path: Path, size: int, expected: int) -> str:
    return f"{path.name} is incomplete: it has {size:,} of at least {expected:,} bytes; download it again."


def _wrong_header(path: Path, error: Exception) -> str:
    """The reason is cut and fit for a terminal, whatever names the file has."""
    reason = ascii(str(error).removeprefix("Error while deserializing header: "))[1:-1][:200]
    return f"{path.name} has a wrong header ({reason}); download it again or use another file."
