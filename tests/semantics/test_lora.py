"""A LoRA trained here for a new colour, in Python and in a server."""

import shutil

import numpy as np
import torch

from mochi_core import MochiPipeline, VideoSize, load_lora, load_transformer
from mochi_core.train.prepare import read_video
from mochi_core.train.tiny.shapes import OUTLINES
from tests.harness import trained
from tests.harness.demo import tiny_prompt
from tests.harness.graphs import MODEL, SAMPLER, node
from tests.harness.semantics import main_color, videos

PROMPTS = [f"a purple {shape} {motion}" for shape in OUTLINES for motion in ("moving left", "rising")]
IN_A_SERVER = PROMPTS[::4]


def test_the_new_color_appears_with_the_lora_and_not_without(pipe, purple_loras):
    assert len(purple_loras) == 2
    before = videos(pipe, PROMPTS)
    without = [main_color(frames) for frames in before]
    print("without:", without)
    assert without.count("purple") <= 2
    dit = load_transformer(trained.TRANSFORMER, torch.float32)
    with_lora = MochiPipeline(dit, pipe.vae, pipe.text_encoder)
    one, other = purple_loras
    lora = load_lora(dit, one)
    made = videos(with_lora, PROMPTS)
    found = [main_color(frames) for frames in made]
    print("with:", found)
    assert found.count("purple") >= 6
    lora.remove()
    np.testing.assert_allclose(videos(with_lora, PROMPTS[:1]), before[:1], rtol=0, atol=1e-3)
    load_lora(dit, other)  # the same LoRA in another format
    np.testing.assert_allclose(videos(with_lora, PROMPTS[:1]), made[:1], rtol=0, atol=1e-3)


def test_samples_on_the_way_show_the_new_color(purple_loras):
    video = read_video(next((purple_loras[0].parent / "samples").glob("*-1.mp4")), VideoSize(64, 64, 13))
    assert main_color(video / 255) == "purple"


def with_lora(comfy, path, class_type, prompt, **inputs):
    """The workflow with a LoRA node after the loader."""
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder)
    graph = tiny_prompt(prompt, num_frames=13, steps=24, seed=0)
    graph["lora"] = node(class_type, model=[MODEL, 0], lora_name=path.name, **inputs)
    graph[SAMPLER]["inputs"]["model"] = ["lora", 0]
    return graph


def test_new_color_with_our_lora_loader_and_the_stock_one(comfy, purple_loras):
    def purple(build):
        return [main_color(comfy.frames(build(prompt))) == "purple" for prompt in IN_A_SERVER]

    diffusers, genmo = purple_loras
    assert not any(purple(lambda prompt: tiny_prompt(prompt, num_frames=13, steps=24, seed=0)))
    assert all(purple(lambda prompt: with_lora(comfy, genmo, "Mochi1LoadLoRA", prompt, strength=1.0)))
    assert all(purple(lambda prompt: with_lora(comfy, diffusers, "Mochi1LoadLoRA", prompt, strength=1.0)))
    assert all(purple(lambda prompt: with_lora(comfy, genmo, "LoraLoaderModelOnly", prompt, strength_model=1.0)))
