"""A file of another kind in each of the pack's loaders: the error says what it is, and which node takes it from which folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness.bad_files import OTHERS
from tests.harness.graphs import MODEL, SAMPLER, T5, VAE, assert_healthy, node, prompt

NODES = {
    "transformer": (MODEL, "model_name", "a Mochi transformer", "mochi_preview_bf16.safetensors"),
    "vae": (VAE, "vae_name", "a Mochi autoencoder", "mochi_vae.safetensors"),
    "t5": (T5, "t5_name", "a T5 text encoder", "t5xxl_fp16.safetensors"),
    "lora": ("lora", "lora_name", "a LoRA", ""),
}
OWN = {
    "transformer": ("diffusion_models/mochi_preview_bf16.safetensors", "Load Mochi Transformer"),
    "vae": ("vae/mochi_vae.safetensors", "Load Mochi VAE"),
    "t5": ("text_encoders/t5xxl_fp16.safetensors", "Load Mochi T5"),
}
# Files for one of the host's loaders: its node class, its name, and the model folder that it lists.
HOST = {
    "a FLUX transformer": ("UNETLoader", "Load Diffusion Model", "diffusion_models"),
    "an SD3 transformer": ("UNETLoader", "Load Diffusion Model", "diffusion_models"),
    "a Wan transformer": ("UNETLoader", "Load Diffusion Model", "diffusion_models"),
    "a HunyuanVideo transformer": ("UNETLoader", "Load Diffusion Model", "diffusion_models"),
    "an LTX transformer": ("UNETLoader", "Load Diffusion Model", "diffusion_models"),
    "a Stable Diffusion UNet": ("UNETLoader", "Load Diffusion Model", "diffusion_models"),
    "a full checkpoint with a Stable Diffusion UNet": ("CheckpointLoaderSimple", "Load Checkpoint", "checkpoints"),
    "a CLIP text encoder": ("CLIPLoader", "Load CLIP", "text_encoders"),
    "a umT5 text encoder": ("CLIPLoader", "Load CLIP", "text_encoders"),
    "a language model used as a text encoder": ("CLIPLoader", "Load CLIP", "text_encoders"),
    "an image autoencoder": ("VAELoader", "Load VAE", "vae"),
    "a Wan or Qwen-Image autoencoder": ("VAELoader", "Load VAE", "vae"),
    "a small autoencoder for previews": ("VAELoader", "Load VAE", "vae_approx"),
    "a CLIP vision model": ("CLIPVisionLoader", "Load CLIP Vision", "clip_vision"),
    "a ControlNet": ("ControlNetLoader", "Load ControlNet Model", "controlnet"),
    "an upscale model": ("UpscaleModelLoader", "Load Upscale Model", "upscale_models"),
    "a LoRA for Wan": ("LoraLoaderModelOnly", "Load LoRA", "loras"),
    "a LoRA for Stable Diffusion": ("LoraLoader", "Load LoRA (Model and CLIP)", "loras"),
}
TAKEN = {phrase: f", which {name} takes from models/{folder}" for phrase, (_, name, folder) in HOST.items()} | {
    "a LoRA": ", which Load Mochi LoRA takes from models/loras",
    "latents": ", which Load Latent takes from the folder input if its name ends in .latent",
    "a textual inversion": "",
}
TAKEN_FROM_CHECKPOINTS = ", which Load Mochi Transformer and Load Mochi VAE take from models/checkpoints"


@pytest.fixture
def refusal(comfy_client, comfy_server):
    """The error of one of our loaders with a file of these tensors."""

    def run(loader, tensors, name="other.safetensors"):
        folder = comfy_server.base / "models" / ("loras" if loader == "lora" else "checkpoints")
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / name)
        graph = prompt()
        graph["lora"] = node("Mochi1LoadLoRA", model=[MODEL, 0], lora_name=name, strength=1.0)
        if loader == "lora":
            graph[SAMPLER]["inputs"]["model"] = ["lora", 0]
        else:
            del graph["lora"]
        number, key, *_ = NODES[loader]
        graph[number]["inputs"][key] = name
        done = comfy_client.run(graph)
        (folder / name).unlink()
        assert done.outcome == "execution_error"
        return done.error

    return run


def of_others(phrase):
    return {name: torch.zeros(2, 2) for name in OTHERS[phrase]}


def test_every_kind_is_in_the_table():
    assert OTHERS.keys() == TAKEN.keys()


@pytest.mark.parametrize("loader", NODES)
def test_other_files_are_named_with_the_loader_that_takes_them(comfy_client, refusal, loader):
    _, _, wanted, example = NODES[loader]
    for phrase, taken in TAKEN.items():
        error = refusal(loader, of_others(phrase))
        if loader != "lora":
            end = f", not {wanted}; choose a file such as {example}."
            assert error == f"other.safetensors holds {phrase}{taken}{end}"
        elif phrase != "a LoRA":
            assert error.startswith(f"other.safetensors holds {phrase}{taken}; Mochi has none of its layers, e.g. ")
            assert error.endswith(": choose a LoRA made for Mochi.")
    assert_healthy(comfy_client)


@pytest.mark.parametrize("loader", NODES)
def test_parts_of_mochi_are_sent_to_each_other(comfy_server, refusal, loader):
    for part, (file, taker) in OWN.items():
        if part != loader:
            folder = file.partition("/")[0]
            error = refusal(loader, load_file(comfy_server.base / "models" / file))
            assert error.startswith(f"other.safetensors holds {NODES[part][2]}, ")
            assert f", which {taker} takes from models/{folder}{';' if loader == 'lora' else ', not'}" in error


def test_a_whole_mochi_checkpoint_without_the_part(comfy_server, refusal):
    models = comfy_server.base / "models"
    tensors = {f"model.diffusion_model.{k}": t for k, t in load_file(models / OWN["transformer"][0]).items()}
    tensors |= {f"vae.{k}": t for k, t in load_file(models / OWN["vae"][0]).items()}
    assert TAKEN_FROM_CHECKPOINTS in refusal("t5", tensors)


@pytest.mark.parametrize(("node_class", "name", "folder"), sorted(set(HOST.values())))
def test_host_has_this_loader_and_it_lists_this_folder(comfy_client, comfy_server, node_class, name, folder):
    """Checked by the name that the editor shows; preview models are listed under the name of a pair of files."""
    place = comfy_server.base / "models" / folder
    place.mkdir(exist_ok=True)
    preview = folder == "vae_approx"
    for file in ("taesd_encoder", "taesd_decoder") if preview else ("listed",):
        save_file({"x": torch.zeros(1)}, place / f"{file}.safetensors")
    schema = comfy_client.get(f"/object_info/{node_class}")[node_class]
    assert schema["display_name"] == name
    assert ("taesd" if preview else "listed.safetensors") in json.dumps(schema["input"]["required"])


def test_what_the_host_does_not_list_is_not_sent_to_it(comfy_client, comfy_server):
    """Indices of sharded files, which only our loaders list."""
    folder = comfy_server.base / "models" / "diffusion_models"
    save_file(of_others("a FLUX transformer"), folder / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(OTHERS["a FLUX transformer"], "shard.safetensors")}
    (folder / "flux.safetensors.index.json").write_text(json.dumps(index))
    graph = prompt()
    graph[MODEL]["inputs"]["model_name"] = "flux.safetensors.index.json"
    assert "holds a FLUX transformer, not a Mochi transformer" in comfy_client.run(graph).error
