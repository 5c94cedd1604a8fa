"""Output files that appear only once they are complete."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

UNFINISHED: set[Path] = set()
"""Temporary files that this process is writing."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_writable(path: Path) -> None:
    """Raise an OSError if no file can be written at `path`."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; choose the name of a file.")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a device or a pipe, which a file would replace; choose the name of a file.")
    temporary = temporary_file(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}); choose another place.") from error


def temporary_file(path: Path) -> Path:
    """A new name next to the file that `path` refers to, for an incomplete file; no program lists it as a model."""
    return target_of(path).with_name(f".{token_hex(4)}.part")  # short: file names are limited to some 255 bytes


def target_of(path: Path) -> Path:
    """The file that `path` refers to; unlike `Path.resolve`, circular links do not raise a RuntimeError."""
    return Path(os.path.realpath(path))


@contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary file next to `path` that replaces it at the end, or is deleted if anything fails.

    If `path` is a link, the file that it refers to is replaced.

    Raises:
        OSError: `path` cannot be written, the disk is full, or `overwrite` is False and the file exists by then.
    """
    check_writable(path)
    temporary = temporary_file(path)
    UNFINISHED.add(temporary)
    try:
        yield temporary
        if not overwrite and path.exists():
            raise FileExistsError(
                f"{path} has meanwhile been written by another program, and is kept; choose another name."
            )
        temporary.replace(target_of(path))
    except OSError as error:  # including errors from reading the input
        if error.errno not in NO_ROOM:
            raise
        raise OSError(
            f"There is no room for {path} ({error.strerror}); free some space, or choose another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
        UNFINISHED.discard(temporary)


def remove_unfinished() -> None:
    """Remove incomplete files, for a process that is about to end without cleaning up."""
    for temporary in (*UNFINISHED,):
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def folder(path: Path) -> Iterator[None]:
    """Create a folder and its missing parents for the duration; if anything fails, those created are removed again."""
    made = [path, *path.parents]
    there = (i for i, place in enumerate(made) if place.exists())
    made = made[: next(there, len(made))]  # on Windows even a drive may be missing
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for place in made:
            with suppress(OSError):  # another program has put something in it
                place.rmdir()
        raise
