"""Load Mochi Transformer in a real server: loading needs memory for the model and one tensor."""

import re
import threading
from pathlib import Path

import pytest

from tests.harness.client import ComfyClient
from tests.harness.graphs import assert_healthy, give_back_memory, node
from tests.harness.memory import SLACK, needs_proc, write_large
from tests.harness.server import PROBE, QUICK_START, ComfyServer
from tests.harness.tiny_models import write_models


def peak_of(process, action):
    """The largest growth of a process's own memory (without mapped files) during `action`."""
    status, done, sizes = Path(f"/proc/{process.pid}/status"), threading.Event(), []

    def watch():
        while not done.wait(0.001):
            sizes.append(int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return max(sizes) - sizes[0]


@pytest.fixture
def fresh_server(comfy_path, tmp_path):
    """An unused server: memory that others left behind, or allocate again, would be counted as this load's."""
    write_models(tmp_path / "models")
    with ComfyServer(comfy_path, tmp_path, QUICK_START, packs=(PROBE,)) as server:
        yield server


@needs_proc
def test_loading_in_another_dtype(fresh_server):
    """With the layout in which tensors are also merged; the core's own test has both, and each needs a fresh server."""
    path, size, largest = write_large(fresh_server.base / "models" / "diffusion_models", "diffusers")
    client = ComfyClient(fresh_server.url)
    assert_healthy(client)  # libraries are loaded
    give_back_memory(client)
    graph = {
        "load": node("Mochi1LoadTransformer", model_name=path.name, weight_dtype="fp32"),
        "show": node("PreviewAny", source=["load", 0]),
    }
    runs = []
    peak = peak_of(fresh_server.process, lambda: runs.append(client.run(graph)))
    assert runs[0].outcome == "execution_success", runs[0].error
    assert 0.95 * size < peak < size + largest + SLACK
