"""Files that are there when they are complete, and not before."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

UNFINISHED: set[Path] = set()
"""Temporary files of this process that are being written."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_writable(path: Path) -> None:
    """Raise an OSError if no file can be made where `path` is."""
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
    """A new name beside the file that `path` leads to, for what is not complete yet; no program lists models under it."""
    return target_of(path).with_name(f".{token_hex(4)}.part")  # short: names of files have some 255 bytes at most


def target_of(path: Path) -> Path:
    """Where `path` leads; unlike `Path.resolve`, links that lead to themselves raise no RuntimeError here."""
    return Path(os.path.realpath(path))


@contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary file beside `path`: what is written to it takes the place of `path` at the end, and is gone if anything fails.

    A link stays, and the file that it leads to is replaced.

    Raises:
        OSError: `path` cannot be written, the disk is full, or without `overwrite` there is a file by then.
    """
    check_writable(path)
    temporary = temporary_file(path)
    UNFINISHED.add(temporary)
    try:
        yield temporary
        if not overwrite and path.exists():
            raise FileExistsError(
                f"{path} has been written by another program meanwhile, and stays; choose another name."
            )
        temporary.replace(target_of(path))
    except OSError as error:  # of what is read for it, too
        if error.errno not in NO_ROOM:
            raise
        raise OSError(f"There is no room for {path} ({error.strerror}); free some, or choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)
        UNFINISHED.discard(temporary)


def remove_unfinished() -> None:
    """Remove what is not complete, for a process that is about to end at once."""
    for temporary in (*UNFINISHED,):
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def folder(path: Path) -> Iterator[None]:
    """Have a folder; what had to be made of it and of the folders around it is gone if anything fails."""
    made = [path, *path.parents]
    there = (i for i, place in enumerate(made) if place.exists())
    made = made[: next(there, len(made))]  # on Windows even a drive may be missing
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for place in made:
            with suppress(OSError):  # another program has put something there
                place.rmdir()
        raise
