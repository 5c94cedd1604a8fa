"""Make three tiny videos through ComfyUI's API, or leave the editor open on the same set-up.

Run by `python dev.py demo` and `python dev.py serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from tests.harness import trained
from tests.harness.server import ROOT, ComfyServer
from workflows.api.client import run

BASE = ROOT / ".dev" / "comfyui-data"
VIDEOS = ROOT / ".dev" / "videos"
WORKFLOWS = ROOT / "workflows"
TINY = "Mochi 1 - Tiny demo, no download.json"
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
    with ComfyServer(Path(os.environ["COMFYUI_PATH"]), BASE, threads=None) as server:
        if serve:
            keep_open(server)
        else:
            make_videos(server)


def keep_open(server: ComfyServer) -> None:
    saved = BASE / "user" / "default" / "workflows" / TINY
    saved.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(WORKFLOWS / TINY, saved)
    print(f"The editor is at {server.url}; open the workflow {saved.stem} there. Ctrl+C ends it.", flush=True)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        print("\nStopping.")


def make_videos(server: ComfyServer) -> None:
    VIDEOS.mkdir(exist_ok=True)
    for seed, prompt in enumerate(PROMPTS):
        print(f"\n“{prompt}”", flush=True)
        start = time.monotonic()
        try:
            (path,) = run(tiny_prompt(prompt, seed=seed), server.url, VIDEOS)
        except RuntimeError as error:
            raise SystemExit(f"\nThe run failed: {error}\nThe log is {server.log}.") from None
        print(f"\nDone in {time.monotonic() - start:.0f} s: {path}")
    print("\n(From a model of 22 MB that knows coloured shapes; the real one's files go into ComfyUI's model folders.)")


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
