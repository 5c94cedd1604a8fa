"""Make three tiny videos through ComfyUI's API, or leave the editor open on the same set-up.

Run by `python dev.py demo` and `python dev.py serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from tests.harness import trained
from tests.harness.server import ROOT, ComfyServer
from workflows.api.client import run

BASE = ROOT / ".dev" / "comfyui-data"
VIDEOS = ROOT / ".dev" / "videos"
WORKFLOW = ROOT / "workflows" / "api" / "text_to_video.json"
SMALL = {"width": 96, "height": 64, "num_frames": 25, "steps": 8}
PROMPTS = (
    "a red star moving to the right",
    "A yellow circle falling over a gray background.",
    "a video of a blue square growing larger",
)
# What the tiny model was trained on.
TRAINED = {"width": 64, "height": 64, "num_frames": 25, "steps": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="open the editor instead of making videos")
    serve = parser.parse_args().serve
    trained.install(BASE / "models")
    print("Starting ComfyUI (10 to 60 seconds) ...", flush=True)
    with ComfyServer(Path(os.environ["COMFYUI_PATH"]), BASE) as server:
        if serve:
            keep_open(server)
        else:
            make_videos(server)


def keep_open(server: ComfyServer) -> None:
    saved = BASE / "user" / "default" / "workflows" / "tiny_mochi.json"
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps(tiny_workflow()), encoding="utf-8")
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
            (path,) = run(tiny_prompt(prompt, **TRAINED, seed=seed), server.url, VIDEOS)
        except RuntimeError as error:
            raise SystemExit(f"\nThe run failed: {error}\nThe log is {server.log}.") from None
        print(f"\nDone in {time.monotonic() - start:.0f} s: {path}")
    print("\n(From a model of 22 MB that knows coloured shapes; the real one's files go into ComfyUI's model folders.)")


def tiny_prompt(text: str, **inputs: Any) -> dict[str, Any]:
    """The shipped workflow with the trained tiny model and another prompt; `inputs` go to the sampler."""
    prompt = small_prompt(**inputs)
    for node in prompt.values():
        node["inputs"] |= trained.FILES.get(node["class_type"], {})
    sampler = next(node for node in prompt.values() if node["class_type"] == "Mochi1Sampler")
    prompt[sampler["inputs"]["positive"][0]]["inputs"]["prompt"] = text
    return prompt


def small_prompt(**inputs: Any) -> dict[str, Any]:
    """The shipped workflow, shrunk so that a CPU makes it in seconds; `inputs` go to the sampler."""
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    sampler = next(node for node in prompt.values() if node["class_type"] == "Mochi1Sampler")
    sampler["inputs"] |= {**SMALL, "seed": time.time_ns() % 2**32, **inputs}
    return prompt


def tiny_workflow() -> dict[str, Any]:
    """The same, for the editor, where a node's values have no names."""
    workflow = json.loads((ROOT / "workflows" / "text_to_video.json").read_text(encoding="utf-8"))
    prompts = iter((PROMPTS[0], ""))
    for node in workflow["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "Mochi1Sampler":
            values[:4] = TRAINED.values()
        elif node["type"] == "Mochi1T5Encode":
            values[0] = next(prompts)
        elif node["type"] in trained.FILES:
            (values[0],) = trained.FILES[node["type"]].values()
    return workflow


if __name__ == "__main__":
    main()
