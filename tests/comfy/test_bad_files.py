"""Bad files in a real server: one sentence each, no file stays open, and the server keeps working."""

import json
import os
import pickle
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness.bad_files import BAD
from tests.harness.graphs import MODEL, T5, VAE, assert_healthy, node, prompt
from tests.harness.tiny_models import random_vae

PLACES = {
    "diffusion_models": (MODEL, "model_name"),
    "vae": (VAE, "vae_name"),
    "text_encoders": (T5, "t5_name"),
}
GOOD = {
    "diffusion_models": "mochi_preview_bf16.safetensors",
    "vae": "mochi_vae.safetensors",
    "text_encoders": "t5xxl_fp16.safetensors",
}


@pytest.fixture
def refusal(comfy_client, comfy_server):
    """The error of a run with a file of this content, as a client sees it."""

    def run(folder, write, name="bad.safetensors"):
        path = comfy_server.base / "models" / folder / name
        write(path)
        graph, (loader, key) = prompt(), PLACES[folder]
        graph[loader]["inputs"][key] = name
        done = comfy_client.run(graph)
        path.unlink()
        assert done.outcome == "execution_error"
        assert name in done.error
        assert "\n" not in done.error
        return done.error

    return run


def stays_open(client, server):
    """Bad files that the server still has open or mapped after a garbage collection.

    The host keeps the frames of an error in a reference cycle until it collects garbage: every ten seconds, or when asked to free
    memory.
    """
    client.post("/free", {"free_memory": True, "unload_models": False})
    process, end = Path("/proc") / str(server.process.pid), time.monotonic() + 20
    while True:
        opened = []
        for link in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed in the meantime
                opened.append(str(link.readlink()))
        bad = [line for line in [*opened, *(process / "maps").read_text().splitlines()] if "bad." in line]
        if not bad or time.monotonic() > end:
            return bad
        time.sleep(0.2)


@pytest.mark.parametrize("folder", PLACES)
def test_bad_bytes_and_no_numbers(comfy_client, comfy_server, refusal, folder):
    """All cases in the transformer's loader, some in the other two, which read files the same way."""
    everything = folder == "diffusion_models"
    for case in BAD if everything else ("empty", "Git LFS pointer", "cut in the data", "overlap", "duplicate name"):
        content, phrase = BAD[case]
        message = refusal(folder, lambda path, content=content: path.write_bytes(content))
        assert re.search(phrase, message), message
    good = load_file(comfy_server.base / "models" / folder / GOOD[folder])
    name = sorted(name for name in good if name.endswith("weight"))[5]
    for value in (torch.nan, torch.inf) if everything else (torch.nan,):
        broken = {**good, name: torch.full_like(good[name], value)}
        message = refusal(folder, lambda path, broken=broken: save_file(broken, path))
        assert f"has NaN or infinite values in {name}" in message
    assert_healthy(comfy_client)
    assert not stays_open(comfy_client, comfy_server)


@pytest.mark.parametrize(
    ("shard", "message"), [("gone.safetensors", "is missing"), ("../vae/mochi_vae.safetensors", "outside its folder")]
)
def test_indices_of_shards_that_are_not_there(comfy_client, refusal, shard, message):
    index = json.dumps({"weight_map": {"t5_yproj.weight": shard}})
    name = "bad.safetensors.index.json"
    assert message in refusal("diffusion_models", lambda path: path.write_text(index), name)
    assert_healthy(comfy_client)


def test_a_file_that_changes_while_it_loads(comfy_client, comfy_server, refusal):
    """Only the file's date changes: truncating it at the right moment is not possible from here."""
    good = comfy_server.base / "models" / "diffusion_models" / GOOD["diffusion_models"]
    done = threading.Event()

    def keep_changing(path):
        with suppress(FileNotFoundError):  # until it ends
            while not done.wait(0.002):
                os.utime(path)

    def write(path):
        path.write_bytes(good.read_bytes())
        threading.Thread(target=keep_changing, args=(path,), daemon=True).start()

    try:
        message = refusal("diffusion_models", write)
    finally:
        done.set()
    assert "bad.safetensors changed while it was being loaded; load it again when it is complete." in message
    assert_healthy(comfy_client)


class Trap:
    def __reduce__(self):
        return os.system, ("touch trap",)


def test_code_in_a_pickle_is_not_run(comfy_client, comfy_server, refusal):
    trap = pickle.dumps({"t5_yproj.weight": Trap()}, protocol=2)
    for folder in PLACES:
        message = refusal(folder, lambda path: path.write_bytes(trap), "bad.ckpt")
        assert "not a file of plain tensors" in message
    assert not (comfy_server.comfyui / "trap").exists()
    assert_healthy(comfy_client)


def test_a_decoder_where_an_encoder_is_wanted(comfy_client, comfy_server):
    save_file(random_vae().decoder.state_dict(), comfy_server.base / "models" / "vae" / "decoder.safetensors")
    graph = {
        "vae": node("Mochi1LoadVAE", vae_name="decoder.safetensors", dtype="auto"),
        "image": node("EmptyImage", width=64, height=64, batch_size=7, color=0),
        "encode": node("Mochi1VAEEncode", pixels=["image", 0], vae=["vae", 0]),
        "save": node("SaveLatent", samples=["encode", 0], filename_prefix="x"),
    }
    done = comfy_client.run(graph)
    assert done.outcome == "execution_error"
    assert "has no encoder; load a file that has one" in done.error
