"""Open weight files without reading them: every tensor is a shape, a dtype and a function that reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ...mapped_files import FileState
from ...shown import sentence, shown, shown_names
from ..limits import MAX_INDEX_BYTES, MAX_NAME, MAX_SHARDS, MAX_TENSORS, read_json
from ..tensors import QUANTIZATION, Checkpoint, LazyStateDict
from .gguf import open_gguf
from .safetensors import open_safetensors
from .torch_file import open_torch

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
INDEX_PATTERN = "*.index*.json"
FOLDER_PATTERNS = ("*.safetensors.index*.json", "*.safetensors", "*.bin.index*.json", "*.bin")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .safetensors or .gguf file, a shard index, a torch.save file (weights only), or a folder with one of them.

    Raises:
        FileNotFoundError: there is nothing at `path`, or a shard is missing.
        OSError: the system denies access.
        ValueError: it is not a readable weights file, or it is incomplete. Reading a tensor raises it, too, if the file has
            changed since.
    """
    path = Path(path)
    if path.is_dir():
        return replace(open_checkpoint(_choose(path)), name=str(path))
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the name.")
    try:
        state, file = FileState.of(path), _open_file(path)
    except ValueError as error:
        raise ValueError(sentence(error)) from None
    except OSError as error:
        if error.errno is None:  # our own message, about a shard
            raise
        raise type(error)(
            f"{path.name} cannot be read ({error.strerror}); check its permissions and its disk."
        ) from None
    tensors = {name: tensor.guarded(state.check_while_loading) for name, tensor in file.tensors.items()}
    return replace(file, tensors=tensors, files=file.files or (state,))


def _open_file(path: Path) -> Checkpoint:
    if path.suffix.lower() == ".gguf":
        return open_gguf(path)
    if path.suffix.lower() in TORCH_SUFFIXES:
        return open_torch(path)
    return _open_shards(path) if path.match(INDEX_PATTERN) else open_safetensors(path)


def _choose(folder: Path) -> Path:
    """The shard index or single file in a folder; among variants such as `.fp16`, the one without a variant suffix."""
    found = next((files for pattern in FOLDER_PATTERNS if (files := sorted(folder.glob(pattern)))), [])
    choice = found if len(found) == 1 else [file for file in found if not _has_variant(file.name)]
    if len(choice) == 1:
        return choice[0]
    names = shown_names([file.name for file in found]) or "none"
    raise ValueError(
        f"{folder} must hold one weights file or one shard index, found: {names}; give the path of the file itself."
    )


def _has_variant(name: str) -> bool:
    return len([part for part in name.split(".") if part not in ("safetensors", "index", "json", "bin")]) > 1


def _open_shards(index: Path) -> Checkpoint:
    weight_map = _read_index(index)
    shards = {name: _open_shard(index, name) for name in sorted(set(weight_map.values()))}
    tensors: LazyStateDict = {}
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise ValueError(
                f"{index.name} says that {shown(shard)} holds {shown(name)}, but it does not; download both again."
            )
        tensors[name] = shards[shard].tensors[name]
    metadata = _joined_metadata(index, [shard.metadata for shard in shards.values()])
    return Checkpoint(index.name, index, tensors, metadata, tuple(file for s in shards.values() for file in s.files))


def _joined_metadata(index: Path, shards: list[dict[str, str]]) -> dict[str, str]:
    """The metadata of all shards, with their notes on quantised layers merged: each shard describes only its own."""
    joined = {key: value for shard in shards for key, value in shard.items()}
    try:
        notes = [read_json(shard[QUANTIZATION])["layers"] for shard in shards if QUANTIZATION in shard]
        layers = {layer: note for shard in notes for layer, note in shard.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index.name} has a shard with an unreadable {QUANTIZATION}; download it again.") from None
    return joined | ({QUANTIZATION: json.dumps({"layers": layers})} if layers else {})


def _read_index(index: Path) -> dict[str, str]:
    if (size := index.stat().st_size) > MAX_INDEX_BYTES:
        raise ValueError(f"{index.name} has {size:,} bytes; an index may have at most {MAX_INDEX_BYTES:,}.")
    try:
        weight_map = read_json(index.read_text(encoding="utf-8"))["weight_map"]
        shards = set(weight_map.values())
        # A shard may not be another index: opening it might never end.
        is_index = bool(weight_map) and not any(Path(shard).match(INDEX_PATTERN) for shard in shards)
    except (ValueError, KeyError, AttributeError, TypeError):
        is_index = False
    if not is_index:
        raise ValueError(f"{index.name} is not a shard index; download it again.")
    if len(weight_map) > MAX_TENSORS or len(shards) > MAX_SHARDS:
        raise ValueError(
            f"{index.name} lists {len(weight_map):,} tensors in {len(shards):,} files; at most {MAX_TENSORS:,} in {MAX_SHARDS:,} "
            "are allowed."
        )
    return weight_map


def _open_shard(index: Path, name: str) -> Checkpoint:
    # A shard index is untrusted: it may only name files in its own folder.
    if Path(name).name != name or name == ".." or "\0" in name or len(name) > MAX_NAME:
        raise ValueError(f"{index.name} names the shard {shown(name)} outside its folder; do not trust this file.")
    if not (index.parent / name).is_file():
        raise FileNotFoundError(f"{index.parent / shown(name)} is missing, but {index.name} lists it; download it.")
    return open_checkpoint(index.parent / name)
