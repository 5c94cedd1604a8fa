"""The header of a safetensors file, believed only after every number in it has been checked.

Layout: 8 bytes length of the header (little-endian), the header in JSON, then the tensors' bytes, without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# What people have instead of a safetensors file, by how it begins.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, which only stands for one"),
    (b"<", "a web page"),
    (b"PK\x03\x04", "a torch.save file, whose name should end in .pt"),
    (b"GGUF", "a GGUF file, whose name should end in .gguf"),
)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `end` behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check a header; it describes every byte of the file exactly once.

    Raises:
        ValueError: it is no safetensors file, it is cut off, or its header is wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = struct.unpack("<Q", start[:LENGTH_BYTES])[0] if len(start) >= LENGTH_BYTES else 0
        _refuse_impostors(path, start, length)
        file.seek(LENGTH_BYTES)
        text = file.read(length) if LENGTH_BYTES + length <= size else b""
    if len(text) < length or size < LENGTH_BYTES:
        raise ValueError(_incomplete(path, size, LENGTH_BYTES + length))
    try:
        header = _parse(text)
        end = _check_layout(header.entries)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ValueError(
            f"{path.name} has a wrong header ({reason}); download it again or use another file."
        ) from error
    expected = LENGTH_BYTES + length + end
    if size < expected:
        raise ValueError(_incomplete(path, size, expected))
    if size > expected:
        raise ValueError(f"{path.name} has {size - expected:,} bytes too many at its end; download it again.")
    return header


def _refuse_impostors(path: Path, start: bytes, length: int) -> None:
    what = next((what for magic, what in IMPOSTORS if start.lstrip().startswith(magic)), None)
    if not start:
        what = "an empty file"
    elif what is None and (length > MAX_HEADER_BYTES or start[LENGTH_BYTES : LENGTH_BYTES + 1] not in (b"{", b"")):
        what = "something else"
    if what is not None:
        raise ValueError(f"{path.name} is not a safetensors file but {what}; download the weights again.")


def _incomplete(path: Path, size: int, expected: int) -> str:
    return f"{path.name} is incomplete: it has {size:,} of at least {expected:,} bytes; download it again."


def _parse(text: bytes) -> Header:
    raw = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata are not strings")
    return Header({name: _entry(name, value) for name, value in raw.items()}, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_shown(twice)} is there twice")
    return content


def _entry(name: str, raw: Any) -> Entry:
    fields: dict[str, Any] = raw if isinstance(raw, dict) else {}
    shape, offsets, stored = fields.get("shape", ""), fields.get("data_offsets", ""), fields.get("dtype", "")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the entry of {_shown(name)} describes no tensor")
    dtype = DTYPES.get(stored) if isinstance(stored, str) else None
    if dtype is None:
        raise ValueError(f"{_shown(name)} is stored as {_shown(str(stored))}, which cannot be read")
    start, end = offsets
    size = math.prod(shape) * dtype.itemsize
    if end - start != size:
        raise ValueError(f"{_shown(name)} should take {size:,} bytes, not {end - start:,}")
    return Entry(dtype, tuple(shape), start, end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _check_layout(entries: dict[str, Entry]) -> int:
    """The number of bytes behind the header; ValueError if tensors overlap or leave holes."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            problem = "overlaps the tensor" if entry.start < position else "leaves a hole"
            raise ValueError(f"{_shown(name)} {problem} before it")
        position = entry.end
    return position


def _shown(name: str) -> str:
    """Fit for a terminal, whatever it is."""
    return ascii(name)[1:-1][:80]
