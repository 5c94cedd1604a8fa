"""Make a tiny video through ComfyUI's API, or leave the editor open on the same set-up.

Run by `python dev.py demo` and `python dev.py serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from tests.harness.client import ComfyClient
from tests.harness.server import ROOT, ComfyServer
from tests.harness.tiny_models import write_models

BASE = ROOT / ".dev" / "comfyui-data"
WORKFLOW = ROOT / "workflows" / "api" / "text_to_video.json"
SMALL = {"width": 96, "height": 64, "num_frames": 25, "steps": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="open the editor instead of making a video")
    serve = parser.parse_args().serve
    print("Writing tiny models with random weights ...", flush=True)
    write_models(BASE / "models")
    print("Starting ComfyUI (10 to 60 seconds) ...", flush=True)
    with ComfyServer(Path(os.environ["COMFYUI_PATH"]), BASE) as server:
        if serve:
            keep_open(server)
        else:
            make_video(ComfyClient(server.url))


def keep_open(server: ComfyServer) -> None:
    print(f"The editor is at {server.url}; open the template text_to_video there. Ctrl+C ends it.", flush=True)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        print("\nStopping.")


def make_video(client: ComfyClient) -> None:
    start = time.monotonic()
    run = client.run(small_prompt(), on_event=show_progress)
    if run.outcome != "execution_success":
        raise SystemExit(f"\nThe run failed: {run.error or run.outcome}; the log is {BASE / 'server.log'}.")
    file = run.files[0]
    print(f"\nDone in {time.monotonic() - start:.0f} s: {BASE / 'output' / file['subfolder'] / file['filename']}")
    print("(The weights are random, so the video is coloured noise; real weights go into ComfyUI's model folders.)")


def small_prompt(**inputs: Any) -> dict[str, Any]:
    """The shipped workflow, shrunk so that a CPU makes it in seconds; `inputs` go to the sampler."""
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    sampler = next(node for node in prompt.values() if node["class_type"] == "Mochi1Sampler")
    sampler["inputs"] |= {**SMALL, "seed": time.time_ns() % 2**32, **inputs}
    return prompt


def show_progress(name: str, data: dict[str, Any]) -> None:
    if name == "executing" and data.get("node"):
        print(f"\nnode {data['node']}", end="", flush=True)
    elif name == "progress":
        print(f"\rnode {data['node']}: {data['value']} of {data['max']}", end="", flush=True)


if __name__ == "__main__":
    main()
