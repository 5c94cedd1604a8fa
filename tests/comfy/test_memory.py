"""Load Mochi Transformer in a real server: loading takes the memory of the model and of one tensor."""

import re
import threading
from pathlib import Path

import pytest

from tests.comfy.test_server import assert_healthy, node
from tests.core.test_convert import needs_proc
from tests.core.test_memory import SLACK, write_large


def peak_of(process, action):
    """The largest growth of a process' own memory (mapped files excepted) during `action`."""
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


def give_back_memory(client):
    """That of earlier models; or the next one would hide in it."""
    client.post("/free", {"unload_models": True, "free_memory": True})
    image = {"image": node("EmptyImage", width=16, height=16, batch_size=1, color=0)}
    for _ in range(2):  # the server frees between two runs
        trim = node("ProbeLimitMemory", value=["image", 0], mib=0)
        assert client.run({**image, "trim": trim, "show": node("PreviewImage", images=["trim", 0])}).files


@needs_proc
@pytest.mark.parametrize("layout", ["canonical", "diffusers"])
def test_loading_in_another_dtype(comfy_client, comfy_server, layout):
    folder = comfy_server.base / "models" / "diffusion_models"
    path, size, largest = write_large(folder, layout)
    assert_healthy(comfy_client)  # libraries are there
    give_back_memory(comfy_client)
    graph = {
        "load": node("Mochi1LoadTransformer", model_name=path.name, weight_dtype="fp32"),
        "show": node("PreviewAny", source=["load", 0]),
    }
    runs = []
    peak = peak_of(comfy_server.process, lambda: runs.append(comfy_client.run(graph)))
    assert runs[0].outcome == "execution_success", runs[0].error
    assert 0.95 * size < peak < size + largest + SLACK
    for written in {path, folder / "canonical.safetensors"}:
        written.unlink()
