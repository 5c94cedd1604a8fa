"""Safetensors files: the library checks the header, this module reports truncated files and files of other types.

Layout: the header's length in 8 bytes (little-endian), the header in JSON, then the tensors' bytes, without gaps.
Source: section "Format" of the README of huggingface/safetensors.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...shown import shown
from ..limits import MAX_AXES, MAX_HEADER_BYTES, MAX_NAME, MAX_TENSORS, read_json
from ..tensors import Checkpoint, LazyTensor

LENGTH_BYTES = 8
SUFFIXES = (".safetensors", ".sft", ".latent")
"""Usual suffixes of such files; a file with another suffix was chosen by mistake rather than damaged."""
DTYPE_CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # since PyTorch 2.7; the scales of mxfp8
    DTYPE_CODES["F8_E8M0"] = torch.float8_e8m0fnu
# First bytes of files that users have in place of a safetensors file.
OTHER_FILE_TYPES = (
    (b"version https://git-lfs", "a Git LFS pointer to one"),
    (b"<", "a web page"),
    (b"PK\x03\x04", "a torch.save file, whose name should end in .pt"),
    (b"GGUF", "a GGUF file, whose name should end in .gguf"),
)


def open_safetensors(path: Path) -> Checkpoint:
    """Open a safetensors file without reading its tensors.

    Raises:
        ValueError: it is not a safetensors file, it is truncated, or its header is invalid.
    """
    text = _read_header(path)
    try:
        header = read_json(text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
        header.pop("__metadata__", None)
        _check_counts(header)
    except ValueError as error:
        raise ValueError(_wrong_header(path, error)) from None  # a traceback would show the file's text unescaped
    _check_size(path, len(text), header)
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, ValueError) as error:
        raise ValueError(_wrong_header(path, error)) from None
    except RuntimeError as error:
        raise ValueError(f"{path.name} cannot be read ({shown(str(error))}).") from None
    tensors = {name: _lazy(path, file.get_tensor, name, entry) for name, entry in header.items()}
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
    begins = start[LENGTH_BYTES : LENGTH_BYTES + 1]
    if begins == b"{" and length <= MAX_HEADER_BYTES:  # a header, even if the length bytes match another magic
        return
    what = next((what for magic, what in OTHER_FILE_TYPES if start.lstrip().startswith(magic)), None)
    if not start:
        what = "an empty file"
    elif what is None and begins not in (b"{", b""):
        what = "something else"
    if what is not None:
        remedy = "download the weights again" if path.suffix.lower() in SUFFIXES else "choose another one"
        raise ValueError(f"{path.name} is not a safetensors file but {what}; {remedy}.")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path.name} claims a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed. "
            "Use another file, or one with less metadata."
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate names, of which the library would silently keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = (Counter(name for name, _ in pairs)).most_common(1)[0]
        raise ValueError(f"{shown(twice)} occurs twice")
    return content


def _check_counts(header: dict[str, Any]) -> None:
    """Refuse counts that no real file has, before they cost time or memory."""
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header):,} tensors; at most {MAX_TENSORS:,} are allowed")
    for name, entry in header.items():
        if len(name) > MAX_NAME:
            raise ValueError(f"the name {shown(name)}; at most {MAX_NAME} characters are allowed")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) > MAX_AXES:
            raise ValueError(f"{shown(name)} has {len(shape):,} axes; at most {MAX_AXES} are allowed")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _check_size(path: Path, header_bytes: int, header: dict[str, Any]) -> None:
    """Report a truncated download as such: the library says only that a size is wrong."""
    size, expected = path.stat().st_size, LENGTH_BYTES + header_bytes
    with suppress(TypeError, KeyError, IndexError):  # an invalid header, which the library will report
        expected += max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size < expected:
            raise ValueError(_incomplete(path, size, expected))
        if size > expected:
            raise ValueError(f"{path.name} has {size - expected:,} surplus bytes at its end; download it again.")


def _lazy(path: Path, get: Callable[[str], Tensor], name: str, entry: dict[str, Any]) -> LazyTensor:
    if entry["dtype"] not in DTYPE_CODES:
        stored = f"{shown(name)} stored as {shown(entry['dtype'])}"
        raise ValueError(f"{path.name} has {stored}, which cannot be read; use another file.")
    if any(size >= 2**63 for size in entry["shape"]):
        raise ValueError(_wrong_header(path, ValueError(f"{shown(name)} is too large")))
    return LazyTensor(tuple(entry["shape"]), DTYPE_CODES[entry["dtype"]], lambda: get(name))


def _incomplete(path: Path, size: int, expected: int) -> str:
    return f"{path.name} is incomplete: it has {size:,} of at least {expected:,} bytes; download it again."


def _wrong_header(path: Path, error: Exception) -> str:
    reason = str(error).removeprefix("Error while deserializing header: ")
    return f"{path.name} has an invalid header ({shown(reason)}); download it again or use another file."
