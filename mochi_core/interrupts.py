"""Handle Ctrl-C and termination signals.

Ctrl-C while a command is still importing, which takes seconds, ends it like any other program, without a traceback. A
termination signal while it runs (kill, a scheduler, a closed terminal) leaves no partial files behind.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PACKAGE, COMMANDS = "mochi_core", ("mochi", "mochi.exe")
TERMINATION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
Handler = Callable[[int, FrameType | None], object] | signal.Handlers


def end_at_once() -> None:
    """Make Ctrl-C end this program at once, if it is one of our commands, until `raise_again` is called."""
    if is_command() and _handler_is(signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again."""
    if _handler_is(signal.SIG_DFL):
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Make termination signals raise SystemExit, so that unfinished work is cleaned up; the status is 128 + signal, as usual."""
    with handled_by(_exit):
        yield


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Set the handler of termination signals for the duration, except of ignored ones: nohup ignores SIGHUP."""
    before = {number: signal.getsignal(number) for number in TERMINATION if not _handler_is(signal.SIG_IGN, number)}
    if threading.current_thread() is not threading.main_thread():  # only it may set a handler
        before = {}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, signal.SIG_DFL if handler_before is None else handler_before)


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _handler_is(handler: object, number: int = signal.SIGINT) -> bool:
    # Only the main thread may set a signal handler.
    return threading.current_thread() is threading.main_thread() and signal.getsignal(number) is handler


def is_command() -> bool:
    """Whether this program is one of our commands, even while it is still importing."""
    if sys.argv[:1] != ["-m"]:
        return Path("".join(sys.argv[:1])).name in COMMANDS
    # `python -m` is still locating the module, and importing its parent packages.
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
    return module.split(".")[0] == PACKAGE
