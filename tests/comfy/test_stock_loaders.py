"""Our nodes with the outputs of ComfyUI's own loaders."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness.graphs import SAMPLER, VAE, node, upto_sampler
from tests.harness.tiny_models import AsymmVAEConfig, cast, random_vae


@pytest.fixture(scope="module")
def released_size_vae(comfy_server):
    """An autoencoder file of the released size, the only one that ComfyUI's own class supports."""
    path = comfy_server.base / "models" / "vae" / "full.safetensors"
    save_file(cast(random_vae(AsymmVAEConfig()).state_dict(), torch.bfloat16), path)
    return path.name


def test_tiled_decode_on_a_vae_from_the_stock_loader(comfy_client, comfy_server, released_size_vae):
    graph = upto_sampler(width=32, height=32, num_frames=7)
    graph[VAE] = node("Mochi1LoadVAE", vae_name=released_size_vae, second_file="none", dtype="fp32")
    graph["stock"] = node("VAELoader", vae_name=released_size_vae)
    for name, vae in (("ours", VAE), ("theirs", "stock")):
        graph[f"decode {name}"] = node("Mochi1TiledVAEDecode", samples=[SAMPLER, 0], vae=[vae, 0])
        graph[f"encode {name}"] = node("Mochi1VAEEncode", pixels=[f"decode {name}", 0], vae=[VAE, 0])
        graph[f"save {name}"] = node("SaveLatent", samples=[f"encode {name}", 0], filename_prefix=name)
    run = comfy_client.run(graph)
    assert run.outcome == "execution_success", run.error
    ours, theirs = (
        load_file(comfy_server.base / "output" / f["subfolder"] / f["filename"])["latent_tensor"]
        for f in (run.outputs[f"save {name}"]["latents"][0] for name in ("ours", "theirs"))
    )
    assert (ours - theirs).norm() < 0.05 * ours.norm()


def test_a_vae_of_another_model_is_refused(comfy_client):
    graph = upto_sampler()
    graph["pixels"] = node("VAELoader", vae_name="pixel_space")
    graph["decode"] = node("Mochi1TiledVAEDecode", samples=[SAMPLER, 0], vae=["pixels", 0])
    graph["save"] = node("PreviewImage", images=["decode", 0])
    run = comfy_client.run(graph)
    assert run.outcome == "execution_error"
    assert "not Mochi's" in run.error
