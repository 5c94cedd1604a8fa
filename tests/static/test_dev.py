"""The set-up that a developer's checkouts share."""

import io
import re
import sys
import time

import pytest

import dev


def test_an_environment_behind_a_link_is_the_same_one(tmp_path, monkeypatch):
    (tmp_path / "one" / "venv").mkdir(parents=True)
    (tmp_path / "two").symlink_to(tmp_path / "one")
    found = set()
    for folder in ("one", "two"):
        monkeypatch.setattr(dev, "VENV", tmp_path / folder / "venv")
        found.add(dev.fingerprint(["torch"]))
    assert len(found) == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_step_shows_in_a_terminal_that_it_goes_on(monkeypatch, terminal):
    class Output(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr(sys, "stdout", output := Output())
    with dev.step("Waiting", every=0.01):
        while terminal and output.getvalue().count("\b") < 8:
            time.sleep(0.01)
    counted = r"\d+ s (?:\x08+\d+ s )+\x08+" if terminal else ""
    assert re.fullmatch(rf"Waiting \.\.\. {counted}done in \d+ s\n", output.getvalue())
