"""The set-up that a developer's checkouts share."""

import argparse
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dev
from tests.harness import demo

ROOT = Path(dev.__file__).parent


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


@pytest.mark.parametrize(("word", "code"), [("dmo", 2), ("--help", 0)])
def test_a_command_that_is_not_there_is_named(word, code):
    done = subprocess.run([sys.executable, "dev.py", word], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "python dev.py demo" in done.stdout
    wrong = "Stopped: there is no command dmo; use demo, serve, test, generate.\n"
    assert done.stderr == (wrong if code else "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_what_a_command_has_started_ends_with_it(tmp_path):
    said = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('told')); print(1, flush=True)"
    (tmp_path / "waiting.py").write_text(f"{said}; time.sleep(60)")
    code = "import dev, sys; dev.PYTHON = sys.executable"
    code += "; dev.serve = lambda _: dev.run_module('waiting', [], None); sys.argv = ['dev.py', 'serve']; sys.exit(dev.main())"
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, **pipes) as process:
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20) == ("", "told\n")
    assert process.returncode == 128 + signal.SIGTERM


def test_a_port_for_the_server_is_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for text, wrong in (
            (str(port), "is taken"),
            ("0", "is not a port"),
            ("70000", "is not a port"),
            ("x", "is not a port"),
        ):
            with pytest.raises(argparse.ArgumentTypeError, match=f"{text} {wrong}"):
                demo.free(text)
    assert demo.free(str(port)) == port
