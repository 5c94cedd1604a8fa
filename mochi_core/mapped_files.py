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
        """Whether the file has been written to or cut since.

        One that was removed, or that another one has taken the place of, has not: it stays until nobody maps it.
        """
        now = FileState.of(self.path) if self.path.exists() else self
        return now.inode == self.inode and now != self

    def check_while_loading(self) -> None:
        """Raise a ValueError if the file has changed since it was opened: a map of one that shrinks ends the process."""
        if self.changed:
            raise ValueError(f"{self.path.name} changed while it was loaded; load it again when it is complete.")


@dataclass(frozen=True)
class MappedFiles:
    """What is known of the files that a model's weights may lie in."""

    states: tuple[FileState, ...]
    """Every file when it was opened."""
    addresses: frozenset[int]
    """Where the weights lay in memory that were not copied."""


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor that was read from a file lies in it still, and not in memory that PyTorch has allocated."""
    return tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


def is_much_mapped(module: nn.Module) -> bool:
    """Whether more than a quarter of the bytes of the parameters and buffers lie in a file.

    Of diffusers' layout it is 40 %, because the other layers are merged; of converted weights, what is always float32.
    """
    sizes = [(tensor.nbytes, is_mapped(tensor)) for _, tensor in named_tensors(module)]
    return 4 * sum(size for size, mapped in sizes if mapped) > sum(size for size, _ in sizes)


def copy_mapped(module: nn.Module) -> None:
    """Give the parameters and buffers of `module` that lie in a file memory of their own."""
    for _, tensor in named_tensors(module):
        if is_mapped(tensor):
            tensor.data = tensor.data.clone()


def remember(model: nn.Module, states: tuple[FileState, ...]) -> None:
    """Note which parameters and buffers of `model` lie in files, and that these were as in `states`."""
    addresses = frozenset(tensor.data_ptr() for _, tensor in named_tensors(model) if is_mapped(tensor))
    setattr(model, ATTRIBUTE, MappedFiles(states, addresses))


def mapped_weights(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers of a loaded model that lie in a mapped file now."""
    files = getattr(model, ATTRIBUTE, None)
    return (
        [] if files is None else [name for name, tensor in named_tensors(model) if tensor.data_ptr() in files.addresses]
    )


def check_mapped_files(model: nn.Module) -> None:
    """Raise a ValueError if a file has changed that weights of `model` lie in."""
    files = getattr(model, ATTRIBUTE, None)
    if files is None or not mapped_weights(model):
        return
    for state in files.states:
        if state.changed:
            raise ValueError(
                f"{state.path.name} changed after it was loaded, and weights are read from it when they are used; load it "
                "again, with mmap=False if it will change once more."
            )


def named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """All parameters and buffers by name."""
    return chain(model.named_parameters(), model.named_buffers())
