"""Long videos of the trained tiny model: in one piece, in rounds of its training length, in ComfyUI's windows.

With `--all -s`, the table in docs/long_video.md.
"""

import numpy as np
import pytest

from mochi_core.rounds import in_rounds
from tests.harness.demo import tiny_prompt
from tests.harness.graphs import MODEL, SAMPLER, with_defaults
from tests.harness.semantics import MIN_PIXELS, STEPS, centers, main_color, main_shape, masks

SCENES = [
    ("red", "circle", "moving in a circle"),
    ("blue", "square", "going round in a circle"),
    ("green", "star", "that does not move"),
    ("yellow", "triangle", "moving in a circle"),
    ("white", "circle", "standing still"),
    ("red", "square", "moving in a circle"),
    ("green", "circle", "going round in a circle"),
    ("blue", "triangle", "moving in a circle"),
    ("white", "star", "going round in a circle"),
    ("yellow", "square", "that does not move"),
    ("green", "triangle", "standing still"),
    ("blue", "circle", "moving in a circle"),
    ("red", "star", "moving in a circle"),
    ("yellow", "circle", "going round in a circle"),
    ("white", "square", "moving in a circle"),
    ("red", "triangle", "standing still"),
    ("green", "square", "that does not move"),
    ("yellow", "star", "going round in a circle"),
    ("white", "triangle", "moving in a circle"),
    ("blue", "star", "standing still"),
]
SEEDS = (0, 1)
SIZE = {"height": 64, "width": 64, "num_inference_steps": STEPS}
FRAMES, EACH = 121, 12
"""Length of the videos in the table, and the interval of frames at which the shape is checked."""


def steps(frames, color):
    """How far the centre of a colour moves from frame to frame, in frame heights; NaN where it is not visible."""
    return np.linalg.norm(np.diff(centers(frames, color), axis=0), axis=1)


def right_motion(frames, color, motion):
    """Share of a video's pieces in which a colour moves as it should: it keeps its direction, or turns as in training clips."""
    pieces = [centers(frames[i : i + EACH], color) for i in range(0, len(frames) - EACH + 1, EACH)]
    if "circle" not in motion:
        return np.mean([np.linalg.norm(piece[-1] - piece[0]) < 0.08 for piece in pieces])
    ways = [np.diff(piece[::3], axis=0) for piece in pieces]  # (steps, 2), down and to the right
    return np.mean([np.sum(way[:-1, 1] * way[1:, 0] - way[:-1, 0] * way[1:, 1]) > 0 for way in ways])


def measured(name, make):
    """Means over videos: right colour, shape in view, right shape, one shape, right motion; longest and median step."""
    rows = []
    for number, (color, shape, motion) in enumerate(SCENES * len(SEEDS)):
        frames = make(f"a {color} {shape} {motion}", number)
        shapes = [main_shape(frames[[i]], color) for i in range(0, len(frames), EACH)]
        seen = np.mean(masks(frames)[color].sum((1, 2)) >= MIN_PIXELS)
        far = steps(frames, color)
        right = np.mean([found == shape for found in shapes])
        one = len(set(shapes)) == 1
        moves = right_motion(frames, color, motion)
        lengths = (np.nanmax(far), np.nanmedian(far)) if np.isfinite(far).any() else (np.nan, np.nan)
        rows.append((main_color(frames) == color, seen, right, one, moves, *lengths))
    found = np.nanmean(rows, axis=0)
    print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + f" | {len(rows)} |")
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
def test_one_piece_loses_the_shape(pipe):
    _, seen, *_ = measured("one piece", lambda prompt, i: pipe(prompt, num_frames=FRAMES, seed=i, **SIZE)[0])
    assert seen < 0.8


@pytest.mark.usefixtures("with_all")
@pytest.mark.parametrize("keep", [7, 13])
@pytest.mark.parametrize("way", ["held in time", "noise levels by frame"])
def test_rounds_keep_a_shape_in_view(pipe, held, way, keep):
    one = held if way == "held in time" else pipe

    def make(prompt, i):
        return in_rounds(one, FRAMES, 25, prompt=prompt, seed=100 * i, keep=keep, **SIZE)

    colors, seen, *_ = measured(f"rounds of 25 that keep {keep}, {way}", make)
    assert colors >= 0.95
    assert seen > 0.95


@pytest.mark.usefixtures("with_all")
@pytest.mark.parametrize("overlap", [2, 1])
def test_windows_of_the_host(comfy, overlap):
    """Context windows in a server, of 25 frames each, as in the template for long videos."""

    def make(prompt, i):
        graph = tiny_prompt(prompt, num_frames=FRAMES, steps=STEPS, seed=i)
        windows = {"context_length": 5, "context_overlap": overlap, "dim": 2, "freenoise": True}
        graph["windows"] = with_defaults(comfy.client, "ContextWindowsManual", model=[MODEL, 0], **windows)
        graph[SAMPLER]["inputs"]["model"] = ["windows", 0]
        return comfy.frames(graph)

    colors, seen, *_ = measured(f"windows of 25 that share {overlap} latents", make)
    assert colors >= 0.95
    assert seen > 0.95
