"""Make three tiny videos through ComfyUI's API, or open the editor on the same set-up.

Run by `python dev.py demo` and `python dev.py serve`.
"""

from __future__ import annotations

import argparse
import json
import os
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="open the editor instead of making videos")
    serve = parser.parse_args().serve
    trained.install(BASE / "models")
    print("Starting ComfyUI (10 to 60 seconds) ...", flush=True)
    with ComfyServer(Path(os.environ["COMFYUI_PATH"]), BASE, arguments=SERVER, threads=None) as server:
        if serve:
            keep_open(server)
        else:
            make_videos(server)


def keep_open(server: ComfyServer) -> None:
    link = template_link(server.url, TINY)
    print(f"The editor, with a workflow that runs at once:\n\n    {link}\n", flush=True)
    print(f"For the API, the address is {server.url}. Ctrl+C ends it.", flush=True)
    open_browser(link)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        print("\nStopping.")


def template_link(url: str, title: str) -> str:
    """The address at which the editor opens a template of the pack."""
    return f"{url}/?{urlencode({'template': title, 'source': PACK})}"


def open_browser(link: str) -> None:
    """Open a browser with windows, if there is one: those of a terminal would fill it and understand nothing of the page."""
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
    """The template tiny_mochi with another prompt; `inputs` go to the sampler."""
    prompt = json.loads((WORKFLOWS / "api" / "tiny_mochi.json").read_text(encoding="utf-8"))
    sampler = sampler_of(prompt)
    sampler["inputs"] |= inputs
    prompt[sampler["inputs"]["positive"][0]]["inputs"]["prompt"] = text
    return prompt


def sampler_of(prompt: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in prompt.values() if node["class_type"] == "Mochi1Sampler")


def small_prompt(**inputs: Any) -> dict[str, Any]:
    """The shipped workflow, shrunk so that a CPU makes it in seconds; `inputs` go to the sampler."""
    prompt = json.loads((WORKFLOWS / "api" / "text_to_video.json").read_text(encoding="utf-8"))
    sampler_of(prompt)["inputs"] |= {**SMALL, "seed": time.time_ns() % 2**32, **inputs}
    return prompt


if __name__ == "__main__":
    main()
