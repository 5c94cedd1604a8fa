"""A real ComfyUI server with this pack installed and everything else in its own folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK = "mochi-nodes"
PROBE = ROOT / "tests" / "harness" / "probe"
START_SECONDS = 240
# Without nodes for paid services, which take a fifth of the start-up time.
QUICK_START = ("--cpu", "--disable-api-nodes")
FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")


class ComfyServer:
    """Context manager: the server runs inside, and is gone afterwards.

    `base` gets models/, input/, output/, user/ ... and custom_nodes/ with links to this repository and to `packs`.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        arguments: tuple[str, ...] = ("--cpu",),
        packs: tuple[Path, ...] = (),
        threads: int | None = 1,
        port: int | None = None,
    ) -> None:
        """`threads` for PyTorch, or None for its own choice; tiny models are fastest with one. `port` None means a free one."""
        self.comfyui, self.base, self.arguments, self.packs = comfyui, base, arguments, packs
        self.environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self.log = base / "server.log"
        self.port = port or free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ComfyServer:
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link_pack(self.base / "custom_nodes" / PACK, ROOT)
        for pack in self.packs:
            link_pack(self.base / "custom_nodes" / pack.name, pack)
        command = [
            sys.executable, str(self.comfyui / "main.py"), "--port", str(self.port), "--base-directory", str(self.base),
            "--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}", *self.arguments,
        ]  # fmt: skip
        self.output = self.log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            command, cwd=self.comfyui, env=self.environment, stdout=self.output, stderr=subprocess.STDOUT
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended while starting; its log says:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not answer within {START_SECONDS} s; its log says:\n{self.log_tail()}")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_pack(link: Path, pack: Path) -> None:
    """Put a node pack into custom_nodes: a link where the system allows one, a copy elsewhere."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        link.symlink_to(pack, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        shutil.copytree(pack, link, ignore=shutil.ignore_patterns(".dev", ".git", "__pycache__"))
