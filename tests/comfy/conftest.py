"""What tests read from a server: latents of a prompt, and console lines during a run."""

import pytest
from safetensors.torch import load_file

from tests.harness.graphs import node


@pytest.fixture
def latents_of(comfy_client, comfy_server):
    """Run graphs that end in LATENTs, and read SaveLatent's file for each."""

    def run(graph, *sources):
        saves = {
            f"save{i}": node("SaveLatent", samples=source, filename_prefix="t") for i, source in enumerate(sources)
        }
        done = comfy_client.run({**graph, **saves})
        assert done.outcome == "execution_success", done.error
        files = [done.outputs[name]["latents"][0] for name in saves]
        return [
            load_file(comfy_server.base / "output" / f["subfolder"] / f["filename"])["latent_tensor"] for f in files
        ]

    return run


@pytest.fixture
def said(comfy_client, comfy_server):
    """The pack's console lines during a graph's run."""

    def run(graph):
        before = comfy_server.log.stat().st_size
        assert comfy_client.run(graph).outcome == "execution_success"
        new = comfy_server.log.read_bytes()[before:].decode(errors="replace")
        return [line.partition("Mochi ")[2] for line in new.splitlines() if "Mochi " in line]

    return run
