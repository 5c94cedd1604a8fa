"""Ctrl-C in the commands of the package; while they are imported: tests/static/test_imports.py."""

import importlib
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [".".join(path.relative_to(ROOT).parts[:-1]) for path in (ROOT / "mochi_core").rglob("__main__.py")]


@pytest.mark.parametrize("command", COMMANDS)
def test_once_a_command_runs_ctrl_c_raises_so_that_it_can_clean_up(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as while it is imported
    try:
        with pytest.raises(SystemExit):
            importlib.import_module(f"{command}.__main__").main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.startswith("usage: ")


def test_the_commands_are_found():
    assert {"mochi_core", "mochi_core.train", "mochi_core.train.tiny"} <= {*COMMANDS}
