"""Videos from a first image, from a first and a last one, and from the beginning of a clip, with the trained tiny model.

Where a shape is, is in the given frames alone, never in the prompt. With `--all -s`, all prompts with two seeds: the table of
docs/train.md.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mochi_core import denormalize_latents, linear_quadratic_schedule, normalize_latents, sample
from mochi_core.io.video import to_unit_range
from mochi_core.pipeline import initial_noise
from mochi_core.sampling.sample import Given
from mochi_core.train.tiny import vae as tiny_vae
from mochi_core.train.tiny.shapes import COLORS, OUTLINES, Scene, Sprite, draw
from tests.harness.semantics import CASES, MIN_PIXELS, STEPS, direction, main_color, main_shape, masks

FRAMES = 25
LEVELS = {"image": (0, 1, 1, 1, 1), "first and last": (0, 1, 1, 1, 0), "extension": (0, 0, 0, 1, 1), "text": (1, 1, 1, 1, 1)}
"""Noise level of each latent frame."""
SEAM = {"image": 1, "first and last": 1, "extension": 13, "text": 1}
"""The first frame that is made."""
START = {"left": (0.0, 0.2), "right": (0.0, -0.2), "up": (0.2, 0.0), "down": (-0.2, 0.0)}


@dataclass(frozen=True)
class Row:
    """Means over videos, as the table has them."""

    first: float
    """PSNR of the first frame, in dB."""
    after: float
    """Distance of the shape's centre to the truth in the six frames after the seam, in frame heights."""
    end: float
    """The same in the last frame."""
    jump: float
    """Step of the centre at the seam, as a multiple of the usual step."""
    colors: float
    ways: float
    shapes: float
    same: float
    """Share of videos with the right shape in the first, the middle and the last frame, each looked at alone."""


def truth(rng, color, way, prompt):
    """A clip (F, H, W, 3) in [0, 1] of what a prompt says, somewhere."""
    shape = next(name for name in OUTLINES if name in prompt)
    down, right = START[way]
    place = (down or float(rng.uniform(-0.15, 0.15)), right or float(rng.uniform(-0.15, 0.15)))
    ground = (0.32, 0.32, 0.32) if "gray" in prompt else (0.03, 0.03, 0.03)
    scene = Scene((Sprite(shape, COLORS[color], way, 0.16, place, 0.4),), (ground, ground))
    return draw(scene, FRAMES, 64, 64)


def made(pipe, task, cases, seed):
    """The truths and what is made of them, (B, F, H, W, 3) in [0, 1] each."""
    rng = np.random.default_rng(seed)
    clips = [truth(rng, *case) for case in cases]
    clean = normalize_latents(pipe.vae.encode(tiny_vae.to_video(clips)).mode())
    given = Given(clean, torch.tensor(LEVELS[task], dtype=torch.float32))
    prompts = [prompt for *_, prompt in cases]
    cond, uncond = pipe.text_encoder.encode(prompts), pipe.text_encoder.encode([""])
    noise = initial_noise(clean.shape, seed)
    latents = sample(pipe.dit, noise, linear_quadratic_schedule(STEPS), cond, uncond, given=given)
    frames = to_unit_range(pipe.vae.decode(denormalize_latents(latents)))
    return np.stack(clips) / 255, frames.movedim(1, -1).numpy()


def row(pipe, task, cases, seeds):
    measured = []
    for seed in seeds:
        for clip, video, (color, way, prompt) in zip(*made(pipe, task, cases, seed), cases, strict=True):
            seam, centers = SEAM[task], center(video, color)
            steps = np.linalg.norm(np.diff(centers, axis=0), axis=1)
            astray = np.linalg.norm(centers - center(clip, color), axis=1)
            looks = [main_shape(video[[i]], color) for i in (0, FRAMES // 2, -1)]
            measured.append(
                Row(
                    -10 * np.log10(np.mean((video[0] - clip[0]) ** 2)),
                    np.nanmean(astray[seam : seam + 6]),
                    astray[-1],
                    steps[seam - 1] / np.nanmedian(steps),
                    main_color(video) == color,
                    direction(video, color) == way,
                    str(main_shape(video, color)) in prompt,
                    all(str(look) in prompt for look in looks),
                )
            )
    found = Row(*np.nanmean([list(vars(one).values()) for one in measured], axis=0))
    print(f"| {task} | " + " | ".join(f"{value:.3g}" for value in vars(found).values()) + f" | {len(measured)} |")
    return found


def center(frames, color):
    """Centre (y, x) of a colour in each frame, in frame heights; NaN where it is not seen."""
    places = [np.argwhere(mask).mean(0) if mask.sum() >= MIN_PIXELS else (np.nan,) * 2 for mask in masks(frames)[color]]
    return np.array(places) / frames.shape[1]
