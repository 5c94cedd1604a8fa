"""torch.save files: the pickle is analysed before it is loaded, so that it cannot run code or exhaust memory.

PyTorch's own restricted unpickler runs no code, but it creates a `bytearray` of any size, unpacks deflated members of any size,
and hashes tuples whose parts are shared so often that it never finishes.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from io import SEEK_SET, BytesIO, FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ...shown import shown
from ..limits import MAX_PICKLE_BYTES, MAX_PICKLE_STEPS, MAX_TENSORS
from ..tensors import Checkpoint, from_state_dict
from .safetensors import DTYPE_CODES
from .torchao_pickle import flattened, torchao_stand_ins

# Keys under which training code stores the weights in a torch.save file.
WEIGHTS_KEYS = ("state_dict", "module", "model")
ZIP_MAGIC, ZIP_END, ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
PICKLES_WITHOUT_ZIP = 5
"""Before PyTorch 1.6, torch.save wrote a magic number, a version, system info, the content and the storage keys."""
# Globals whose arguments decide how much memory or time they take; none occurs in a pickle of plain tensors.
ALLOCATING = re.compile(
    r"(builtins|__builtin__) bytearray|_codecs encode|torch._utils _rebuild_qtensor|torch(\.\S*)? \w*Tensor"
)
STORAGE_CLASS = re.compile(r"torch\S* (Unt|T)ypedStorage")
DESCRIPTION = re.compile(r"[^/]+/data\.pkl")


def open_torch(path: Path) -> Checkpoint:
    """Open a torch.save file of named tensors, mapped if it is a zip archive; torchao's quantised weights are supported.

    Raises:
        ValueError: it holds something else, or cannot be read.
        OSError: the system denies access.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    try:
        _check_zip(path) if is_zip else _check_pickles(path)
        content = _load(path, mmap=is_zip)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        # Without the cause: a traceback would quote its text, with PyTorch's advice to turn the check off.
        raise ValueError(
            f"{path.name} is not a file of plain tensors ({_reason(error)}); use a .safetensors file."
        ) from None
    for key in WEIGHTS_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    content, metadata = flattened(content)
    if not isinstance(content, dict) or not all(_is_plain(*item) for item in content.items()):
        raise ValueError(f"{path.name} holds something other than named plain tensors; use a .safetensors file.")
    return Checkpoint(path.name, path, from_state_dict(content), metadata)


def _load(path: Path, *, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "torchao." not in str(error):
            raise
    with torchao_stand_ins():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _reason(error: Exception) -> str:
    """Why a file is refused, in our own words: PyTorch's message adds unsafe advice."""
    text = str(error)
    if unsupported := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {shown(unsupported[1])}"
    return text if isinstance(error, _RefusalError) else "it is damaged or another type of file"


def _is_plain(name: Any, value: Any) -> bool:
    """Whether it is a named tensor with all its elements in the file: copying an expanded one could take any amount of memory."""
    if not isinstance(name, str) or type(value) not in (Tensor, Parameter) or value.device.type != "cpu":
        return False
    if value.layout != torch.strided or value.is_nested or value.dtype not in DTYPE_CODES.values():
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


class _RefusalError(ValueError):
    """The reason why a file is refused, as a clause."""


class _ShortReads(FileIO):
    """A file from which `zipfile` cannot read more at once than a genuine central directory takes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size > MAX_PICKLE_BYTES:
            raise _RefusalError("its list of members is too long")
        return super().read(size) or b""

    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
        if whence == SEEK_SET and offset < 0:
            raise _RefusalError("its list of members points to before its start")
        return super().seek(offset, whence)


def _check_zip(path: Path) -> None:
    """Check the sizes that an archive claims against its own, and the pickle in it."""
    size = path.stat().st_size
    with _ShortReads(path) as file:
        file.seek(max(0, size - ZIP_END_BYTES))
        if (
            not file.read(len(ZIP_END)) == ZIP_END
        ):  # with trailing data, PyTorch might read another directory than we do
            raise _RefusalError("it is incomplete")
        with zipfile.ZipFile(file) as archive:  # pyright: ignore[reportArgumentType] - FileIO is a file of bytes
            members = archive.infolist()
            if len(members) > MAX_TENSORS:
                raise _RefusalError(f"it has {len(members):,} members")
            packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
            if packed or sum(member.file_size for member in members) > size:
                raise _RefusalError("it is compressed, which torch.save never does")
            descriptions = [member for member in members if DESCRIPTION.fullmatch(member.filename)]
            if len(descriptions) != 1 or descriptions[0].file_size > MAX_PICKLE_BYTES:
                raise _RefusalError("it has no description of tensors, or one that is too long")
            _check_pickle(BytesIO(archive.read(descriptions[0])), None)


def _check_pickles(path: Path) -> None:
    with path.open("rb") as file:
        for _ in range(PICKLES_WITHOUT_ZIP):
            _check_pickle(file, path.stat().st_size)


class _Value(NamedTuple):
    """What is known about a value that a pickle would create, without creating it."""

    content: Any = None
    """A number, a string, a tuple of contents, or None for anything else."""
    size: int = 1
    """Number of nested values, counting repeats: hashing a tuple takes time in proportion."""
    has_storage_class: bool = False


def _check_pickle(file: IO[bytes], file_bytes: int | None) -> None:
    """Raise a `_RefusalError` if loading the next pickle in a file would take disproportionate memory or time.

    `file_bytes` is the size of a file whose storages are allocated before they are read; None for a mapped one.
    """
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value | None] = {}
    storages: dict[Any, int] = {}
    for code, argument in _steps(file):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name == "MARK":
            stack.append(None)
        else:
            taken = _take(stack, code)
            if code.name in ("BINPERSID", "PERSID"):
                _count_storage(storages, taken[-1].content if taken else None, file_bytes)
            stack += [_made(code.name, argument, taken)] * len(code.stack_after)


def _steps(file: IO[bytes]) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    for count, (code, argument, _) in enumerate(pickletools.genops(file)):
        if count > MAX_PICKLE_STEPS:
            raise _RefusalError("its description of the tensors is too long")
        yield code, argument


def _take(stack: list[_Value | None], code: pickletools.OpcodeInfo) -> list[_Value]:
    """Pop what an opcode consumes: a fixed number of values, and for some also all above the last mark."""
    before = list(code.stack_before)
    taken: list[_Value | None] = []
    if pickletools.markobject in before:
        mark = len(stack) - 1 - stack[::-1].index(None)
        taken, stack[mark:] = stack[mark + 1 :], []
        before = before[: before.index(pickletools.markobject)]
    count = len(before)
    taken = stack[len(stack) - count :] + taken
    del stack[len(stack) - count :]
    return [value for value in taken if value is not None]


def _made(name: str, argument: Any, parts: list[_Value]) -> _Value:
    """The value that an opcode makes of its operands."""
    if name in ("GLOBAL", "INST") and ALLOCATING.fullmatch(argument):
        raise _RefusalError(f"it asks for {shown(argument.replace(' ', '.'))}")
    if name == "GLOBAL":
        return _Value(has_storage_class=STORAGE_CLASS.fullmatch(argument) is not None)
    if not parts or name in ("BINPERSID", "PERSID"):
        return _Value(None if parts else argument)
    size, storage = 1 + sum(part.size for part in parts), any(part.has_storage_class for part in parts)
    if size > MAX_PICKLE_STEPS or (storage and name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD")):
        raise _RefusalError("it asks for more than the file holds")
    content = tuple(part.content for part in parts) if "TUPLE" in name else argument
    return _Value(content, size, storage)


def _count_storage(storages: dict[Any, int], key: Any, file_bytes: int | None) -> None:
    """Add a storage to the total; its key is ("storage", class, key, device, number of elements)."""
    if file_bytes is None:
        return
    if not isinstance(key, tuple) or len(key) < 5 or not isinstance(key[4], int):
        raise _RefusalError("it has a storage without a size")
    storages[key[2]] = key[4]
    if sum(storages.values()) > file_bytes:
        raise _RefusalError("it asks for more than the file holds")
