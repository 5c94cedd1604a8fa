"""Video to video, and quantised weights, with the trained tiny model."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mochi_core import (
    MochiPipeline,
    denormalize_latents,
    linear_quadratic_schedule,
    load_transformer,
    normalize_latents,
)
from mochi_core.io.video import to_unit_range
from mochi_core.pipeline import initial_noise
from mochi_core.sampling.edit import edit
from mochi_core.sampling.schedule import schedule_below
from mochi_core.train.tiny import vae as tiny_vae
from mochi_core.train.tiny.shapes import COLORS, Scene, Sprite, draw
from tests.harness import quantized_files, trained
from tests.harness.semantics import CLEAN, HALF, SIZE, centers, direction, main_color, scores_of, videos

START = {"left": (0.0, 0.2), "right": (0.0, -0.2)}


@pytest.mark.parametrize(("way", "new"), [("right", "blue"), ("left", "red"), ("right", "green"), ("left", "white")])
def test_video_to_video_keeps_the_motion_and_takes_the_new_color(pipe, way, new):
    sprite = Sprite("circle", COLORS["yellow"], way, 0.17, START[way], 0.4)
    source = draw(Scene((sprite,), ((0.03, 0.03, 0.03),) * 2), SIZE["num_frames"], SIZE["height"], SIZE["width"])
    clean = normalize_latents(pipe.vae.encode(tiny_vae.to_video([source])).mode())
    schedule = linear_quadratic_schedule(48)
    sigmas = schedule[schedule <= 0.8]
    # Without motion in the prompt, the shape stands still.
    noisy = sigmas[0] * initial_noise(clean.shape, 0) + (1 - sigmas[0]) * clean
    (frames,) = videos(pipe, f"a {new} circle moving {way}", latents=noisy, sigmas=sigmas)
    assert main_color(frames) == new
    assert direction(frames, new) == way
    away = np.linalg.norm(centers(frames, new) - centers(source / 255, "yellow"), axis=1)
    print(f"{away.mean():.3f} of a frame height away on average")
    assert away.mean() < 0.06


@pytest.mark.parametrize(("way", "new"), [("left", "red"), ("right", "blue")])
def test_flow_edit_takes_the_changed_word_and_keeps_what_both_prompts_say(pipe, way, new):
    sprite = Sprite("circle", COLORS["yellow"], way, 0.17, START[way], 0.4)
    source = draw(Scene((sprite,), ((0.03, 0.03, 0.03),) * 2), SIZE["num_frames"], SIZE["height"], SIZE["width"])
    clean = normalize_latents(pipe.vae.encode(tiny_vae.to_video([source])).mode())
    texts = f"a yellow circle moving to the {way}", f"a {new} circle moving to the {way}", ""
    edited = edit(pipe.dit, clean, schedule_below(0.9, 16), *(pipe.text_encoder.encode([text]) for text in texts))
    (video,) = to_unit_range(pipe.vae.decode(denormalize_latents(edited)))  # (3, F, H, W)
    frames = video.permute(1, 2, 3, 0).numpy()
    assert main_color(frames) == new
    assert direction(frames, new) == way


def tensors_of_file():
    return {name: tensor.float() for name, tensor in load_file(trained.TRANSFORMER).items()}


FORMS = {
    "scaled fp8": (".safetensors", quantized_files.scaled_fp8),
    "int8": (".safetensors", quantized_files.int8),
    "GGUF Q8_0": (".gguf", quantized_files.gguf_file("Q8_0")),
}


@pytest.mark.parametrize("form", FORMS)
def test_quantized_weights_follow_prompts_as_well(pipe, tmp_path, form):
    suffix, write = FORMS[form]
    path = tmp_path / f"tiny{suffix}"
    write(tensors_of_file(), path)
    quantized = MochiPipeline(load_transformer(path, torch.float32), pipe.vae, pipe.text_encoder)
    colors, ways, dirt = scores_of(quantized, HALF)
    print(f"{form}: right colour in {colors:.0%}, right direction in {ways:.0%}")
    assert colors >= 0.9
    assert ways >= 0.85
    assert dirt < CLEAN
