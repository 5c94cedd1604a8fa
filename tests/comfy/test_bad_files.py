"""Bad files in a real server: one sentence each, nothing stays open, and the server goes on working."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfy.test_server import MODEL, T5, VAE, assert_healthy, node, prompt
from tests.core.test_bad_files import BAD, OTHERS
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
    """The error of a run with a file of that content, as the server's client sees it."""

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


def still_open(server):
    """Bad files that the server has open or mapped."""
    process = Path("/proc") / str(server.process.pid)
    opened = [str(link.readlink()) for link in (process / "fd").iterdir()]
    return [line for line in [*opened, *(process / "maps").read_text().splitlines()] if "bad." in line]


def test_bad_files_of_every_kind_in_every_loader(comfy_client, comfy_server, refusal):
    for folder in PLACES:
        for case in ("empty", "Git LFS pointer", "web page", "cut in the data", "overlap", "duplicate name"):
            content, phrase = BAD[case]
            assert phrase in refusal(folder, lambda path, content=content: path.write_bytes(content))
        for kind in ("a FLUX transformer", "a Wan transformer", "an image autoencoder"):
            tensors = {name: torch.zeros(2, 2) for name in OTHERS[kind]}
            assert f"holds {kind}" in refusal(folder, lambda path, tensors=tensors: save_file(tensors, path))
        good = load_file(comfy_server.base / "models" / folder / GOOD[folder])
        name = sorted(name for name in good if name.endswith("weight"))[5]
        nan = {**good, name: torch.full_like(good[name], torch.nan)}
        message = refusal(folder, lambda path, nan=nan: save_file(nan, path))
        assert f"holds NaN or infinite values in {name}" in message
    assert_healthy(comfy_client)  # and the server forgets the last error
    assert not still_open(comfy_server)


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
