"""The trained tiny model in a real ComfyUI server: prompts, LoRA nodes, video to video."""

import shutil

import numpy as np
import pytest

from mochi_core import save_video
from mochi_core.train.tiny.shapes import COLORS, Scene, Sprite, draw
from tests.harness.demo import PROMPTS, tiny_prompt
from tests.harness.frames import read_frames
from tests.harness.graphs import MODEL, SAMPLER, VAE, node
from tests.harness.semantics import direction, main_color

PURPLE = ("a purple circle moving left", "a purple square moving left", "a purple triangle moving left")
SHORT = {"num_frames": 13, "steps": 24, "seed": 0}


def frames_of(comfy, graph):
    """(F, H, W, 3) in [0, 1] of the mp4 that a graph makes."""
    run = comfy.client.run(graph)
    assert run.outcome == "execution_success", run.error
    return read_frames(comfy.client.download(run.files[0])) / 255


def test_demo_prompts(comfy):
    red, yellow, blue = (frames_of(comfy, tiny_prompt(text, seed=i)) for i, text in enumerate(PROMPTS))
    assert len(red) == 25
    assert [main_color(frames) for frames in (red, yellow, blue)] == ["red", "yellow", "blue"]
    assert direction(red, "red") == "right"
    assert direction(yellow, "yellow") == "down"


def with_lora(comfy, path, class_type, prompt, **inputs):
    """The workflow with a LoRA node behind the loader."""
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder)
    graph = tiny_prompt(prompt, **SHORT)
    graph["lora"] = node(class_type, model=[MODEL, 0], lora_name=path.name, **inputs)
    graph[SAMPLER]["inputs"]["model"] = ["lora", 0]
    return graph


def test_new_color_with_our_lora_loader_and_the_stock_one(comfy, purple_loras):
    def purple(build):
        return sum(main_color(frames_of(comfy, build(prompt))) == "purple" for prompt in PURPLE)

    diffusers, genmo = purple_loras
    assert purple(lambda prompt: tiny_prompt(prompt, **SHORT)) == 0
    assert purple(lambda prompt: with_lora(comfy, genmo, "Mochi1LoadLoRA", prompt, strength=1.0)) >= 2
    assert purple(lambda prompt: with_lora(comfy, diffusers, "Mochi1LoadLoRA", prompt, strength=1.0)) >= 2
    assert purple(lambda prompt: with_lora(comfy, genmo, "LoraLoaderModelOnly", prompt, strength_model=1.0)) >= 2


@pytest.mark.parametrize(("way", "start"), [("right", -0.2), ("left", 0.2)])
def test_video_to_video(comfy, way, start):
    sprite = Sprite("circle", COLORS["yellow"], way, 0.17, (0.0, start), 0.4)
    source = draw(Scene((sprite,), ((0.03, 0.03, 0.03),) * 2), 13, 64, 64)
    save_video(source[None] / np.float32(255), comfy.base / "input" / f"{way}.mp4")
    graph = tiny_prompt("a blue circle", **{**SHORT, "steps": 12, "denoise": 0.27})  # from a noise level of 0.77
    graph["file"] = node("LoadVideo", file=f"{way}.mp4")
    graph["frames"] = node("GetVideoComponents", video=["file", 0])
    graph["latent"] = node("Mochi1VAEEncode", pixels=["frames", 0], vae=[VAE, 0])
    graph[SAMPLER]["inputs"]["latent"] = ["latent", 0]
    frames = frames_of(comfy, graph)
    assert main_color(frames) == "blue"
    assert direction(frames, "blue") == way
