"""One file with transformer, autoencoder and T5, like ComfyUI's whole checkpoints, in all three loaders."""

import torch
from safetensors.torch import load_file, save_file

from tests.harness.graphs import DECODE, MODEL, T5, VAE, node, prompt

PARTS = {
    "model.diffusion_model.": "diffusion_models/mochi_preview_bf16.safetensors",
    "vae.": "vae/mochi_vae.safetensors",
    "text_encoders.t5xxl.transformer.": "text_encoders/t5xxl_fp16.safetensors",
}


def test_same_video_as_from_three_files(comfy_client, comfy_server):
    models = comfy_server.base / "models"
    tensors = {prefix + name: t for prefix, file in PARTS.items() for name, t in load_file(models / file).items()}
    (models / "checkpoints").mkdir(exist_ok=True)
    save_file(tensors, models / "checkpoints" / "all.safetensors")
    graph, videos = prompt(), []
    for name in ("separate.safetensors", "all.safetensors"):
        graph["probe"] = node("ProbeSaveTensor", images=[DECODE, 0], name=name)
        run = comfy_client.run(graph)
        assert run.outcome == "execution_success", run.error
        videos.append(load_file(comfy_server.base / "output" / name)["images"])
        for loader, key in ((MODEL, "model_name"), (VAE, "vae_name"), (T5, "t5_name")):
            graph[loader]["inputs"][key] = "all.safetensors"
    assert videos[0].shape == (13, 64, 96, 3)
    assert torch.equal(*videos)
