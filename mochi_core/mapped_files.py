"""Track which weights of a model are in memory-mapped files, and whether the files are unchanged.

A mapped weight takes no memory of its own, is shared by all processes that map it, and is read from the file on first use. So
the file must not change: overwriting it changes the weights, truncating it crashes the process.
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
    """A file at one point in time: its identity, its size in bytes and its modification time in ns."""

    path: Path
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        status = path.stat()
        return cls(path, status.st_ino, status.st_size, status.st_mtime_ns)

    @property
    def changed(self) -> bool:
        """Whether the file has been written to or truncated since.

        A file that was removed or replaced does not count: it persists until nobody maps it.
        """
        now = FileState.of(self.path) if self.path.exists() else self
        return now.inode == self.inode and now != self

    def check_while_loading(self) -> None:
        """Raise a ValueError if the file has changed since it was opened: reading a mapped file that shrank is a crash."""
        if self.changed:
            raise ValueError(f"{self.path.name} changed while it was being loaded; load it again when it is complete.")


@dataclass(frozen=True)
class MappedFiles:
    """The files that a model's weights may be mapped from."""

    states: tuple[FileState, ...]
    """State of every file when it was opened."""
    addresses: frozenset[int]
    """Memory addresses of the weights that were not copied."""


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor read from a file is still in the mapped file, not in memory that PyTorch allocated."""
    return tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


def is_much_mapped(module: nn.Module) -> bool:
    """Whether more than a quarter of the bytes of the parameters and buffers are mapped.

    In diffusers' layout 40 % are, because the other layers are merged; with converted weights, only those always in float32.
    """
    sizes = [(tensor.nbytes, is_mapped(tensor)) for _, tensor in named_tensors(module)]
    return 4 * sum(size for size, mapped in sizes if mapped) > sum(size for size, _ in sizes)


def copy_mapped(module: nn.Module) -> None:
    """Copy the mapped parameters and buffers of `module` to memory of their own."""
    for _, tensor in named_tensors(module):
        if is_mapped(tensor):
            tensor.data = tensor.data.clone()


def remember(model: nn.Module, states: tuple[FileState, ...]) -> None:
    """Record which parameters and buffers of `model` are mapped, and the state of their files."""
    addresses = frozenset(tensor.data_ptr() for _, tensor in named_tensors(model) if is_mapped(tensor))
    setattr(model, ATTRIBUTE, MappedFiles(states, addresses))


def mapped_weights(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers of a loaded model that are in a mapped file now."""
    files = getattr(model, ATTRIBUTE, None)
    return (
        [] if files is None else [name for name, tensor in named_tensors(model) if tensor.data_ptr() in files.addresses]
    )


def check_mapped_files(model: nn.Module) -> None:
    """Raise a ValueError if a file that weights of `model` are mapped from has changed."""
    files = getattr(model, ATTRIBUTE, None)
    if files is None or not mapped_weights(model):
        return
    for state in files.states:
        if state.changed:
            raise ValueError(
                f"{state.path.name} changed after it was loaded, but weights are still read from it on use; load it "
                "again, with mmap=False if it will keep changing."
            )


def named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """All parameters and buffers by name."""
    return chain(model.named_parameters(), model.named_buffers())
