"""Models whose weights lie in memory-mapped files: which weights do, and whether their files are still the same.

A mapped weight takes no memory of its own, is shared by all processes that map it, and is read from the file when it is first
used. So the file must stay as it is: written over, it changes the weights; cut, it ends the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

ATTRIBUTE = "mapped_files"


@dataclass(frozen=True)
class FileState:
    """A file at one time: which one it is, its size in bytes and its date in ns."""

    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        status = path.stat()
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class MappedFiles:
    """What is known of the files that a model's weights may lie in."""

    states: dict[Path, FileState]
    """Every file when the model was loaded."""
    addresses: frozenset[int]
    """Where the weights lay in memory that were not copied."""


def remember(model: nn.Module, states: dict[Path, FileState], names: Iterable[str]) -> None:
    """Note that the parameters and buffers `names` of `model` lie in files that were as in `states`."""
    wanted = set(names)
    addresses = frozenset(tensor.data_ptr() for name, tensor in _tensors(model) if name in wanted)
    setattr(model, ATTRIBUTE, MappedFiles(states, addresses))


def mapped_weights(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers of a loaded model that lie in a mapped file now."""
    files = getattr(model, ATTRIBUTE, None)
    return [] if files is None else [name for name, tensor in _tensors(model) if tensor.data_ptr() in files.addresses]


def check_mapped_files(model: nn.Module) -> None:
    """Raise a ValueError if a file has changed that weights of `model` lie in.

    A file that was removed, or that another one has taken the place of, does no harm: it stays until nobody maps it.
    """
    files = getattr(model, ATTRIBUTE, None)
    if files is None or not mapped_weights(model):
        return
    for path, before in files.states.items():
        now = FileState.of(path) if path.exists() else before
        if now.inode == before.inode and now != before:
            raise ValueError(
                f"{path.name} changed after it was loaded, and weights are read from it when they are used; load it again, "
                "with mmap=False if it will change once more."
            )


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())
