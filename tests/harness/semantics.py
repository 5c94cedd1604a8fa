"""Recognises what a clip of coloured shapes shows: the colours, and where they move."""

from __future__ import annotations

from typing import Any

import numpy as np

from mochi_core.train.tiny.shapes import BACKGROUNDS, COLORS, MOTIONS, NEW_COLORS, OUTLINES, Scene, Sprite, draw

PALETTE = {**COLORS, **NEW_COLORS}
MIN_PIXELS = 12  # pixels of a colour in a 64 x 64 frame that count as a shape


def masks(frames: np.ndarray) -> dict[str, Any]:
    """For each colour, the pixels (F, H, W) that are closer to it than to any other colour or background.

    `frames` (F, H, W, 3) in [0, 1].
    """
    nearest = _distances(frames).argmin(-1)
    return {name: nearest == i for i, name in enumerate(PALETTE)}


def stray(frames: np.ndarray) -> float:
    """RMS distance of pixels from the nearest colour that a clip may have: how unclean a picture is."""
    return float(np.sqrt(_distances(frames).min(-1).mean()))


def _distances(frames: np.ndarray) -> np.ndarray:
    """Squared distance of each pixel to the shapes' colours, then the backgrounds', (F, H, W, colours)."""
    grounds = [np.array(color) * shade for color in BACKGROUNDS.values() for shade in (1.0, 2 / 3, 1 / 3)]
    references = np.stack([*(np.array(color) for color in PALETTE.values()), *grounds])
    return ((frames[..., None, :] - references) ** 2).sum(-1)


def main_color(frames: np.ndarray) -> str | None:
    """The colour with the most pixels, if it is visible in most frames."""
    found = masks(frames)
    name = max(found, key=lambda color: int(found[color].sum()))
    return name if name in shown_colors(frames) else None


def shown_colors(frames: np.ndarray) -> list[str]:
    """The colours that are visible in most frames."""
    return [name for name, mask in masks(frames).items() if (mask.sum(axis=(1, 2)) >= MIN_PIXELS).mean() > 0.5]


def shift(frames: np.ndarray, color: str) -> tuple[float, float]:
    """How far down and to the right a colour's centre moves from the first third of a clip to the last, in frame heights."""
    rows = [_center(mask) for mask in masks(frames)[color] if mask.sum() >= MIN_PIXELS]
    if len(rows) < 3:
        return 0.0, 0.0
    third = max(1, len(rows) // 3)
    down, right = np.mean(rows[-third:], axis=0) - np.mean(rows[:third], axis=0)
    return float(down) / frames.shape[1], float(right) / frames.shape[1]


def direction(frames: np.ndarray, color: str, least: float = 0.08) -> str:
    """The direction of a colour: left, right, up or down, or still if it moves less than `least` of a frame's height."""
    down, right = shift(frames, color)
    if max(abs(down), abs(right)) < least:
        return "still"
    if abs(down) > abs(right):
        return "down" if down > 0 else "up"
    return "right" if right > 0 else "left"


def centers(frames: np.ndarray, color: str) -> np.ndarray:
    """Centre (y, x) of a colour in each frame, in frame heights, (F, 2); NaN where it is not visible."""
    found = [_center(mask) if mask.sum() >= MIN_PIXELS else (np.nan, np.nan) for mask in masks(frames)[color]]
    return np.array(found) / frames.shape[1]


def psnr(frame: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; both in [0, 1]."""
    return float(-10 * np.log10(np.mean((frame - other) ** 2)))


def drawn(case: tuple[str, str, str], across: float, num_frames: int) -> np.ndarray:
    """The video of a case of `CASES`, (F, 64, 64, 3) uint8; the shape is off-centre by `across`, perpendicular to its path."""
    color, way, prompt = case
    shape = next(name for name in OUTLINES if name in prompt)
    down, right = {"left": (0.0, 0.2), "right": (0.0, -0.2), "up": (0.2, 0.0), "down": (-0.2, 0.0)}[way]
    ground = (0.32, 0.32, 0.32) if "gray" in prompt else (0.03, 0.03, 0.03)
    sprite = Sprite(shape, COLORS[color], way, 0.16, (down or across, right or across), 0.4)
    return draw(Scene((sprite,), (ground, ground)), num_frames, 64, 64)


def main_shape(frames: np.ndarray, color: str) -> str | None:
    """The outline that matches a colour best over the first, middle and last frame."""
    shown = [mask for mask in masks(frames)[color][:: max(1, len(frames) // 2)] if mask.sum() >= MIN_PIXELS]
    fits = {shape: sum(_overlap(mask, shape) for mask in shown) for shape in OUTLINES}
    return max(fits, key=lambda shape: fits[shape]) if shown else None


def _overlap(mask: np.ndarray, shape: str) -> float:
    """Intersection over union with the outline at the position and size of the best fit."""
    height, width = mask.shape
    y, x = np.mgrid[:height, :width] - _center(mask)[:, None, None]
    # A triangle's pixels are not centred on its outline's centre.
    drawn = [OUTLINES[shape](y - down, x, radius) < 0 for radius in np.arange(6.0, 14.0) for down in (-2, 0, 2)]
    return max((mask & inside).sum() / (mask | inside).sum() for inside in drawn)


def _center(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(axis=0)


DIRECTIONS = ("left", "right", "up", "down")
SENTENCES = (
    "a {} {} {}",
    "A {} {} {} over a gray background.",
    "a video of a {} {} {}",
    "black background, a {} {} {}",
)
CASES = [
    (color, way, SENTENCES[(i + j) % 4].format(color, list(OUTLINES)[(i + j) % 4], MOTIONS[way][(i + j) % 3]))
    for i, color in enumerate(COLORS)
    for j, way in enumerate(DIRECTIONS)
]
HALF = [case for i, case in enumerate(CASES) if sum(divmod(i, len(DIRECTIONS))) % 2 == 0]
"""Two of the four directions for each colour, each direction equally often."""
FEW = HALF[::2]
"""One case per colour: enough to notice that something is wrong."""
STEPS, SIZE = 24, {"height": 64, "width": 64, "num_frames": 13}
CLEAN = 0.06  # maximum of `stray` for a clean picture


def videos(pipe, prompts, seed=0, **arguments):
    """The videos, (B, F, H, W, 3) in [0, 1]."""
    return pipe(prompts, num_inference_steps=STEPS, seed=seed, **{**SIZE, **arguments})


def scores(made, cases):
    """Shares of videos with the right colour, and with its right direction, and how far they are from clean."""
    colors, ways, dirt = [], [], []
    for frames, (color, way, _) in zip(made, cases, strict=True):
        colors.append(main_color(frames) == color)
        ways.append(direction(frames, color) == way)
        dirt.append(stray(frames))
    return np.mean(colors), np.mean(ways), np.mean(dirt)


def scores_of(pipe, cases, **arguments):
    """`scores` of one video per case."""
    return scores(videos(pipe, [prompt for *_, prompt in cases], **arguments), cases)
