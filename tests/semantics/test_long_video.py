"""Long videos of the trained tiny model: in one piece, and in rounds of the length that it was trained for.

With `--all -s`, the table of docs/long_video.md.
"""

import numpy as np
import pytest

from mochi_core.rounds import in_rounds
from tests.harness.semantics import MIN_PIXELS, STEPS, main_color, main_shape, masks

SCENES = [
    ("red", "circle", "moving in a circle"),
    ("blue", "square", "going round in a circle"),
    ("green", "star", "that does not move"),
    ("yellow", "triangle", "moving in a circle"),
    ("white", "circle", "standing still"),
    ("red", "square", "moving in a circle"),
]
SIZE = {"height": 64, "width": 64, "num_inference_steps": STEPS}
FRAMES, EACH = 121, 12
"""Length of the videos of the table, and after how many frames the shape is looked at."""


def steps(frames, color):
    """How far the centre of a colour moves from frame to frame, in frame heights; NaN where it is not seen."""
    places = [np.argwhere(mask).mean(0) if mask.sum() >= MIN_PIXELS else (np.nan,) * 2 for mask in masks(frames)[color]]
    return np.linalg.norm(np.diff(np.array(places) / frames.shape[1], axis=0), axis=1)


def measured(name, make, scenes):
    """Means over videos: right colour, shape in view, right shape, one shape; longest and median step."""
    rows = []
    for number, (color, shape, motion) in enumerate(scenes):
        frames = make(f"a {color} {shape} {motion}", number)
        shapes = [main_shape(frames[[i]], color) for i in range(0, len(frames), EACH)]
        seen = np.mean(masks(frames)[color].sum((1, 2)) >= MIN_PIXELS)
        far = steps(frames, color)
        right = np.mean([found == shape for found in shapes])
        one = len(set(shapes)) == 1
        rows.append((main_color(frames) == color, seen, right, one, np.nanmax(far), np.nanmedian(far)))
    found = np.mean(rows, axis=0)
    print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |")
    return found


def test_a_second_round_goes_on_without_a_jump(held):
    (color, shape, motion) = SCENES[4]
    prompt = f"a {color} {shape} {motion}"
    frames = in_rounds(held, 37, 25, prompt=prompt, keep=13, **SIZE)
    assert frames.shape == (37, 64, 64, 3)
    assert main_color(frames) == color
    far = steps(frames, color)
    assert np.isfinite(far).all(), "it is in view in every frame"
    assert far[24:27].max() <= 0.08, "the seam is between frames 24 and 25"


@pytest.mark.usefixtures("with_all")
def test_rounds_keep_a_shape_in_view_and_one_piece_loses_it(pipe, held):
    piece = measured("one piece", lambda prompt, i: pipe(prompt, num_frames=FRAMES, seed=i, **SIZE)[0], SCENES)
    for name, one in {"held in time": held, "noise levels by frame": pipe}.items():
        for keep in (7, 13):

            def make(prompt, i, one=one, keep=keep):
                return in_rounds(one, FRAMES, 25, prompt=prompt, seed=100 * i, keep=keep, **SIZE)

            colors, seen, *_ = measured(f"rounds of 25 that keep {keep}, {name}", make, SCENES)
            assert colors == 1
            assert seen > max(0.95, piece[1])
