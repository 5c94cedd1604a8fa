"""Ctrl-C in the package's commands; tests/static/test_imports.py tests it during their import."""

import importlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from mochi_core.io.latent_files import save_latents
from tests.harness import trained

ROOT = Path(__file__).parents[2]
COMMANDS = [".".join(path.relative_to(ROOT).parts[:-1]) for path in (ROOT / "mochi_core").rglob("__main__.py")]
ARGUMENTS = {"mochi_core": ["inspect", "none"], "mochi_core.train": ["plot", "none", "-o", "none.png"]}
"""Arguments with which a command runs, but not for long."""


@pytest.mark.parametrize("command", COMMANDS)
def test_once_a_command_runs_ctrl_c_raises_so_that_it_can_clean_up(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command, *ARGUMENTS.get(command, ["--help"])])
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as during import
    try:
        with suppress(SystemExit):
            importlib.import_module(f"{command}.__main__").main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_commands_are_found():
    assert {"mochi_core", "mochi_core.train", "mochi_core.train.tiny"} <= {*COMMANDS}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("request_", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_no_half_file(tmp_path, request_):
    save_latents(torch.zeros(1, 12, 100, 16, 16), tmp_path / "x.latent")
    command = [
        "decode",
        str(tmp_path / "x.latent"),
        "--vae",
        str(trained.VAE),
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "x.mp4"),
    ]
    process = subprocess.Popen([sys.executable, "-m", "mochi_core", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not [*tmp_path.glob(".*.part")] and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(request_)
    assert process.wait(60) == 128 + request_
    assert [path.name for path in tmp_path.iterdir()] == ["x.latent"]
