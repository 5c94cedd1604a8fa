"""Open weight files without reading them: every tensor is a shape, a dtype and a way to read it."""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..ggml import BLOCK_TYPES
from ..quantized import QuantizedWeight

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
QUANTIZATION, NOTE = "_quantization_metadata", "comfy_quant"
"""A metadata entry and a tensor's last name, which both tell the form of quantised layers."""
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of what is stored."""
    read: Callable[[], Tensor]
    quantized: Callable[[], QuantizedWeight] | None = None
    """For a quantised weight, reads its stored form; `read` then widens it."""
    block_type: str | None = None
    """For GGML blocks, which (see `ggml.BLOCK_TYPES`)."""

    @property
    def form(self) -> str:
        """What people call the stored form: bfloat16, float8_e4m3fn, Q4_0 ..."""
        return self.block_type or str(self.dtype).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        """Of what is stored."""
        count = math.prod(self.shape)
        if self.block_type is None:
            return count * self.dtype.itemsize
        block = BLOCK_TYPES[self.block_type]
        return count // block.weights * block.bytes


Tensors = dict[str, StoredTensor]


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file or folder, and the file's own notes."""

    path: Path
    tensors: Tensors
    metadata: dict[str, str]


def open_tensors(path: str | Path) -> TensorFile:
    """Open a .safetensors or .gguf file, a torch.save file (weights only) or a folder with a sharded or single file.

    Raises:
        FileNotFoundError: there is nothing at `path`, or a shard is missing.
        ValueError: it is no readable weights file, or it is incomplete.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the name.")
    if path.suffix.lower() == ".gguf":
        from .gguf import open_gguf  # it makes use of this module

        return open_gguf(path)
    if path.suffix in TORCH_SUFFIXES:
        return TensorFile(path, _open_torch(path), {})
    return _open_safetensors(path)


def from_state_dict(state_dict: Mapping[str, Tensor]) -> Tensors:
    """Tensors that are already in memory, seen the same way."""
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in state_dict.items()
    }


def _open_safetensors(path: Path) -> TensorFile:
    header = read_header(path)
    metadata = header.pop("__metadata__", {})
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read ({error}); download it again.") from error
    tensors = {
        name: StoredTensor(tuple(entry["shape"]), _dtype(path, name, entry), lambda name=name: file.get_tensor(name))
        for name, entry in header.items()
    }
    return TensorFile(path, {**tensors, **_notes(path, metadata)}, metadata)


def _notes(path: Path, metadata: dict[str, str]) -> Tensors:
    """What the metadata says about quantised layers, as the tensors in which other files say it."""
    try:
        layers = json.loads(metadata.get(QUANTIZATION, "{}")).get("layers", {})
        notes = {f"{layer}.{NOTE}": json.dumps(note).encode() for layer, note in layers.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path.name} has an unreadable {QUANTIZATION}; download it again.") from error
    return from_state_dict({name: torch.frombuffer(bytearray(note), dtype=torch.uint8) for name, note in notes.items()})


def _dtype(path: Path, name: str, entry: dict[str, Any]) -> torch.dtype:
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{path.name} stores {name} as {entry['dtype']}, which cannot be read; use a bf16 or fp16 file."
        )
    return DTYPES[entry["dtype"]]


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked against the size of the file.

    Raises:
        ValueError: it is no safetensors file, or it is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = file.read(min(length, size)) if 2 <= length <= MAX_HEADER_BYTES else b""
    if len(text) < length and text.startswith(b"{"):
        raise ValueError(_incomplete(path, size, 8 + length))
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        hint = "an empty file" if size == 0 else "perhaps a web page or a Git LFS pointer"
        raise ValueError(f"{path.name} is not a safetensors file ({hint}); download the weights again.") from error
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ValueError(_incomplete(path, size, expected))
    return header


def _incomplete(path: Path, size: int, expected: int) -> str:
    return f"{path.name} is incomplete: it has {size:,} of at least {expected:,} bytes; download it again."


def _open_torch(path: Path) -> Tensors:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path.name} is not a file of plain tensors ({reason}); use a .safetensors file.") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path.name} holds something other than named tensors; use a .safetensors file.")
    return from_state_dict(content)


def _open_folder(folder: Path) -> TensorFile:
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    if len(indexes) == 1:
        return _open_shards(folder, indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return _open_safetensors(files[0])
    found = ", ".join(file.name for file in indexes or files) or "none"
    raise ValueError(
        f"{folder} must hold one .safetensors file or one shard index, found: {found}; name the file itself."
    )


def _open_shards(folder: Path, index: Path) -> TensorFile:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index.name} is not a shard index; download it again.") from error
    tensors: Tensors = {}
    for name in names:
        # A shard list is somebody else's text: it may only name files of its own folder.
        if Path(name).name != name:
            raise ValueError(f"{index.name} names the shard {name!r} outside its folder; do not trust this file.")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, but {index.name} lists it; download it.")
        tensors |= _open_safetensors(folder / name).tensors
    return TensorFile(folder, tensors, {})
