"""Ctrl-C in the commands of the package; while they are imported: tests/static/test_imports.py."""

import importlib
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [".".join(path.relative_to(ROOT).parts[:-1]) for path in (ROOT / "mochi_core").rglob("__main__.py")]
ARGUMENTS = {"mochi_core": ["inspect", "none"], "mochi_core.train": ["plot", "none", "-o", "none.png"]}
"""What has a command run, but not for long."""


@pytest.mark.parametrize("command", COMMANDS)
def test_once_a_command_runs_ctrl_c_raises_so_that_it_can_clean_up(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command, *ARGUMENTS.get(command, ["--help"])])
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as while it is imported
    try:
        with suppress(SystemExit):
            importlib.import_module(f"{command}.__main__").main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_commands_are_found():
    assert {"mochi_core", "mochi_core.train", "mochi_core.train.tiny"} <= {*COMMANDS}
