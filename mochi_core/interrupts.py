"""Ctrl-C while a command is still imported, which takes seconds: it ends like any other program, and shows no code."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

PACKAGE, COMMANDS = "mochi_core", ("mochi", "mochi.exe")


def end_at_once() -> None:
    """Have Ctrl-C end this program, if it is one of our commands, until `raise_again` is called."""
    if is_command() and _handler_is(signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again."""
    if _handler_is(signal.SIG_DFL):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _handler_is(handler: object) -> bool:
    # Other threads may not set one.
    return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is handler


def is_command() -> bool:
    """Whether this program is one of our commands, also while it is still imported."""
    if sys.argv[:1] != ["-m"]:
        return Path("".join(sys.argv[:1])).name in COMMANDS
    # `python -m` is looking for a module, and imports the packages around it.
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
    return module.split(".")[0] == PACKAGE
