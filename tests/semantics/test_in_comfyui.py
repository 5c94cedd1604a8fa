"""The trained tiny model in a real ComfyUI server: prompts, video to video."""

import numpy as np
import pytest

from mochi_core import save_video
from mochi_core.train.tiny.shapes import COLORS, Scene, Sprite, draw
from tests.harness.demo import PROMPTS, tiny_prompt
from tests.harness.graphs import SAMPLER, VAE, node
from tests.harness.semantics import direction, main_color

SHORT = {"num_frames": 13, "steps": 24, "seed": 0}


def test_demo_prompts(comfy):
    red, yellow, blue = (comfy.frames(tiny_prompt(text, seed=i)) for i, text in enumerate(PROMPTS))
    assert len(red) == 25
    assert [main_color(frames) for frames in (red, yellow, blue)] == ["red", "yellow", "blue"]
    assert direction(red, "red") == "right"
    assert direction(yellow, "yellow") == "down"


@pytest.mark.parametrize(("way", "start"), [("right", -0.2), ("left", 0.2)])
def test_video_to_video(comfy, way, start):
    sprite = Sprite("circle", COLORS["yellow"], way, 0.17, (0.0, start), 0.4)
    source = draw(Scene((sprite,), ((0.03, 0.03, 0.03),) * 2), 13, 64, 64)
    save_video(source[None] / np.float32(255), comfy.base / "input" / f"{way}.mp4")
    graph = tiny_prompt(
        f"a blue circle moving {way}", **{**SHORT, "steps": 12, "denoise": 0.33}
    )  # from a noise level of 0.86
    graph["file"] = node("LoadVideo", file=f"{way}.mp4")
    graph["frames"] = node("GetVideoComponents", video=["file", 0])
    graph["latent"] = node("Mochi1VAEEncode", pixels=["frames", 0], vae=[VAE, 0])
    graph[SAMPLER]["inputs"]["latent"] = ["latent", 0]
    frames = comfy.frames(graph)
    assert main_color(frames) == "blue"
    assert direction(frames, "blue") == way
