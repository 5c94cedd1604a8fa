"""Hundreds of prompts in a row on one server: files, LoRAs, dtypes and sizes change, and runs are cancelled at any time."""

import random
import re
import threading
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.harness.client import ComfyClient
from tests.harness.graphs import DECODE, MODEL, SAMPLER, T5, VAE, give_back_memory, node, prompt
from tests.harness.lora_files import write_genmo_lora
from tests.harness.memory import needs_proc
from tests.harness.server import PROBE, ComfyServer
from tests.harness.tiny_models import random_dit, random_t5, random_vae, write_models

PROMPTS, EVERY = 300, 50
DTYPES = ("auto", "fp32", "bf16", "fp8_e4m3fn", "fp8_rowwise", "int8", "q4_0")
SIZES = ((64, 64, 7), (96, 64, 13), (64, 96, 19), (128, 128, 1), (96, 96, 25))
SAVE, LORA = "9", "lora"
# Nodes at which a run is cancelled; most are not.
CANCELS = (None, None, None, MODEL, LORA, T5, VAE, SAMPLER, DECODE, SAVE)
# Allowed growth over 250 further prompts: the host's history of them, and glibc's arenas of ended threads.
MEMORY_GROWS_BY, FILES_GROW_BY, THREADS_GROW_BY = 64 * 2**20, 4, 2


@pytest.fixture
def server(with_all, comfy_path, tmp_path):  # noqa: ARG001 - only started for this test
    write_models(tmp_path / "models")
    write_genmo_lora(tmp_path / "models/loras/style.safetensors", random_dit())
    with ComfyServer(comfy_path, tmp_path, packs=(PROBE,)) as server:
        yield server


@needs_proc
def test_a_server_is_after_300_prompts_what_it_was_after_50(server, capsys):
    client, chance = ComfyClient(server.url), random.Random(0)
    outcomes, records = [], []
    for number in range(1, PROMPTS + 1):
        outcomes.append(run_one(client, server.base / "models", chance, number))
        if number % EVERY == 0:
            give_back_memory(client)
            records.append(holdings(server.process.pid))
            with capsys.disabled():
                print(f"\n{number} prompts: {describe(records[-1])}", end="", flush=True)
    assert outcomes.count("execution_success") > PROMPTS / 3
    assert outcomes.count("execution_interrupted") > PROMPTS / 5
    settled, last = records[0], records[-1]
    assert last["memory"] < settled["memory"] + MEMORY_GROWS_BY
    assert last["threads"] <= settled["threads"] + THREADS_GROW_BY
    assert last["files"] <= settled["files"] + FILES_GROW_BY
    assert last["maps"] <= settled["maps"]


def run_one(client, models, chance, number):
    """Run one random prompt, possibly after rewriting a file or with a cancel; returns how it ended."""
    change_a_file(models, chance, number)
    width, height, frames = chance.choice(SIZES)
    graph = prompt(width=width, height=height, num_frames=frames, steps=chance.randint(1, 4))
    graph[MODEL]["inputs"]["weight_dtype"] = chance.choice(DTYPES)
    graph[LORA] = node("Mochi1LoadLoRA", model=[MODEL, 0], lora_name="style.safetensors", strength=chance.random())
    graph[SAMPLER]["inputs"]["model"] = chance.choice(([MODEL, 0], [LORA, 0]))
    cancel_at = chance.choice(CANCELS)
    run = run_and_cancel(client, graph, cancel_at)
    assert run.outcome == "execution_success" or (cancel_at and run.outcome == "execution_interrupted"), run.error
    return run.outcome


def change_a_file(models, chance, number):
    """Every other time, replace one of the four files under the same name, as a user does who copies a newer one."""
    writers = {
        "diffusion_models/mochi_preview_bf16": lambda: random_dit(seed=number).state_dict(),
        "vae/mochi_vae": lambda: random_vae(seed=number).state_dict(),
        "text_encoders/t5xxl_fp16": lambda: random_t5(seed=number),
    }
    name = chance.choice([*writers, "lora", None, None, None, None])
    if name == "lora":
        write_genmo_lora(models / "loras/style.safetensors", random_dit(), seed=number)
    elif name:
        save_file(writers[name](), models / "new")
        (models / "new").replace(models / f"{name}.safetensors")


def run_and_cancel(client, graph, node_id):
    """Cancel once when the given node begins; at the sampler, after its first step."""
    cancel = threading.Thread(target=client.interrupt)
    begun = "progress" if node_id == SAMPLER else "executing"

    def on_event(name, data):
        if name == begun and data.get("node") == node_id and cancel.ident is None:
            cancel.start()

    run = client.run(graph, on_event)
    if cancel.ident is not None:
        cancel.join()  # or it would cancel the next run
    return run


def holdings(pid):
    """Resources that a process holds: its own memory in bytes, threads, open files, and mapped model files."""
    process = Path(f"/proc/{pid}")
    return {
        "memory": int(re.search(r"RssAnon:\s+(\d+)", (process / "status").read_text())[1]) * 1024,
        "threads": len([*(process / "task").iterdir()]),
        "files": len([*(process / "fd").iterdir()]),
        "maps": sum("/models/" in line for line in (process / "maps").read_text().splitlines()),
    }


def describe(held):
    return f"{held['memory'] / 2**20:,.0f} MiB, " + ", ".join(f"{held[k]} {k}" for k in ("threads", "files", "maps"))
