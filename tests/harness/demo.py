"""Make three tiny videos through ComfyUI's API, or open the editor on the same set-up.

Run by `python dev.py demo` and `python dev.py serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.harness import trained
from tests.harness.server import PACK, ROOT, ComfyServer
from workflows.api.client import run

BASE = ROOT / ".dev" / "comfyui-data"
VIDEOS = ROOT / ".dev" / "videos"
WORKFLOWS = ROOT / "workflows"
TINY = "Mochi 1 - Tiny demo, no download"
SERVER = ("--cpu", "--preview-method", "auto")
SMALL = {"width": 96, "height": 64, "num_frames": 25, "steps": 8}
PROMPTS = (
    "a red star moving to the right",
    "A yellow circle falling over a gray background.",
    "a video of a blue square growing larger",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python dev.py", description=__doc__)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("demo", help="make three tiny videos").set_defaults(use=make_videos, port=None)
    serve = commands.add_parser("serve", help="open the editor")
    serve.add_argument("--port", type=free, help="of the server (default: one that is free)")
    serve.set_defaults(use=keep_open)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # also ends the server
    trained.install(BASE / "models")
    print("Starting ComfyUI (10 to 60 seconds) ...", flush=True)
    comfyui = Path(os.environ["COMFYUI_PATH"])
    try:
        with ComfyServer(comfyui, BASE, arguments=SERVER, threads=None, port=options.port) as server:
            return options.use(server) or 0
    except KeyboardInterrupt:
        return 130


def free(text: str) -> int:
    """Parse the number of a free port."""
    if not text.isdecimal() or not 1 <= (port := int(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not a port; use a number from 1 to 65535.")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise argparse.ArgumentTypeError(
                f"{port} is taken by another program, perhaps your own ComfyUI; use another."
            )
    return port


def keep_open(server: ComfyServer) -> int:
    link = template_link(server.url, TINY)
    print(f"The editor, with a workflow that runs at once:\n\n    {link}\n", flush=True)
    print(f"For the API, the address is {server.url}. Ctrl+C ends it.", flush=True)
    open_browser(link)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        print("\nStopping.")
        return 0
    print(f"ComfyUI has ended by itself; its log says:\n{server.log_tail()}", file=sys.stderr)
    return 1


def template_link(url: str, title: str) -> str:
    """The URL that opens a template of the pack in the editor."""
    return f"{url}/?{urlencode({'template': title, 'source': PACK})}"


def open_browser(link: str) -> None:
    """Open a graphical browser, if any: text browsers would take over the terminal and cannot show the editor."""
    if os.name == "nt" or sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        webbrowser.open(link)


def make_videos(server: ComfyServer) -> None:
    VIDEOS.mkdir(exist_ok=True)
    for seed, prompt in enumerate(PROMPTS):
        print(f"\n“{prompt}”", flush=True)
        start = time.monotonic()
        try:
            (path,) = run(tiny_prompt(prompt, seed=seed), server.url, str(VIDEOS))
        except (OSError, RuntimeError) as error:
            raise SystemExit(f"\nThe run failed: {error}\nThe log is {server.log}.") from None
        print(f"Done in {time.monotonic() - start:.0f} s: {path}")
    print("\n(From a model of 22 MB that knows coloured shapes; the real one's files go into ComfyUI's model folders.)")
    print("Next: python dev.py serve opens the editor.")


def tiny_prompt(text: str, **inputs: Any) -> dict[str, Any]:
    """The template tiny_mochi with another prompt; `inputs` are the sampler's."""
    prompt = json.loads((WORKFLOWS / "api" / "tiny_mochi.json").read_text(encoding="utf-8"))
    sampler = sampler_of(prompt)
    sampler["inputs"] |= inputs
    prompt[sampler["inputs"]["positive"][0]]["inputs"]["prompt"] = text
    return prompt


def sampler_of(prompt: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in prompt.values() if node["class_type"] == "Mochi1Sampler")


def small_prompt(**inputs: Any) -> dict[str, Any]:
    """The shipped workflow, shrunk so that a CPU runs it in seconds; `inputs` are the sampler's."""
    prompt = json.loads((WORKFLOWS / "api" / "text_to_video.json").read_text(encoding="utf-8"))
    sampler_of(prompt)["inputs"] |= {**SMALL, "seed": time.time_ns() % 2**32, **inputs}
    return prompt


if __name__ == "__main__":
    sys.exit(main())
