"""Procedural video: one or two coloured shapes moving over a plain or graded background, with matching captions.

Everything comes from a NumPy generator, so a seed determines a clip. Positions and sizes are in units of the frame height, so
that a scene can be drawn at any size; time runs from 0 to 1 over the clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Color = tuple[float, float, float]

COLORS: dict[str, Color] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.12, 0.20, 0.92),
    "yellow": (0.95, 0.85, 0.10),
    "white": (0.97, 0.97, 0.97),
}
NEW_COLORS: dict[str, Color] = {"purple": (0.60, 0.10, 0.85)}
"""Never in the clips that a denoiser is trained on: something new for a LoRA to learn."""
BACKGROUNDS: dict[str, Color] = {"black": (0.03, 0.03, 0.03), "gray": (0.32, 0.32, 0.32), "brown": (0.25, 0.17, 0.10)}
MOTIONS: dict[str, tuple[str, ...]] = {
    "left": ("moving left", "moving to the left", "going left"),
    "right": ("moving right", "moving to the right", "going right"),
    "up": ("moving up", "moving upwards", "rising"),
    "down": ("moving down", "moving downwards", "falling"),
    "circle": ("moving in a circle", "going round in a circle"),
    "growing": ("growing", "growing larger"),
    "still": ("standing still", "that does not move"),
}
SENTENCES = (
    "a {shape} {motion}",
    "A {shape} {motion} over a {background} background.",
    "a video of a {shape} {motion}",
    "{background} background, a {shape} {motion}",
)
TRAVEL = (0.34, 0.46)
"""Shortest and longest distance that a shape travels in a clip, in frame heights."""
RADIUS = (0.13, 0.19)
"""Smallest and largest radius of a shape, in frame heights."""
MARGIN = 0.03
"""Smallest distance of a shape from the border, in frame heights."""


@dataclass(frozen=True)
class Sprite:
    """One moving shape; lengths are in frame heights."""

    shape: str
    color: Color
    motion: str
    radius: float
    start: tuple[float, float]
    """(y, x) of the centre in the first frame, relative to the middle of the frame."""
    travel: float


@dataclass(frozen=True)
class Scene:
    """Shapes over a background, to be drawn by `draw`."""

    sprites: tuple[Sprite, ...]
    background: tuple[Color, Color]
    """Colours at the top and the bottom; equal for a plain background."""


def random_clip(rng: np.random.Generator, aspect: float = 1.0, *, two: float = 0.2) -> tuple[Scene, str]:
    """A scene and its caption; `aspect` is width / height, `two` the fraction of scenes with two shapes."""
    names = [str(rng.choice(list(COLORS))) for _ in range(1 + (rng.random() < two))]
    return described_clip(rng, [(COLORS[name], name) for name in names], aspect)


def described_clip(rng: np.random.Generator, colors: list[tuple[Color, str]], aspect: float = 1.0) -> tuple[Scene, str]:
    """A scene with one shape of each colour, and its caption, which uses the given colour names."""
    sprites = [_sprite(rng, color, i, len(colors), aspect) for i, (color, _) in enumerate(colors)]
    background, background_name = _background(rng)
    parts = [
        (f"{name} {sprite.shape}", str(rng.choice(MOTIONS[sprite.motion])))
        for sprite, (_, name) in zip(sprites, colors, strict=True)
    ]
    sentence = str(rng.choice(SENTENCES))
    shape, motion = parts[0][0], " and a ".join([parts[0][1], *(" ".join(part) for part in parts[1:])])
    return Scene(tuple(sprites), background), sentence.format(shape=shape, motion=motion, background=background_name)


def random_colors(rng: np.random.Generator, aspect: float = 1.0) -> Scene:
    """A scene in any colours, for an autoencoder that should know more colours than the captions use."""
    scene, _ = described_clip(rng, [(_any_color(rng), "") for _ in range(rng.integers(1, 3))], aspect)
    if rng.random() < 0.5:
        return scene
    top, bottom = _any_color(rng), _any_color(rng)
    return Scene(scene.sprites, (top, bottom if rng.random() < 0.5 else top))


def draw(
    scene: Scene, num_frames: int, height: int, width: int, window: tuple[slice, slice] | None = None
) -> NDArray[np.uint8]:
    """Pixels (F, H, W, 3) of a scene, or of the rows and columns in a window."""
    rows, columns = window or (slice(0, height), slice(0, width))
    y = ((np.arange(rows.start, rows.stop) + 0.5 - height / 2) / height).astype(np.float32)[None, :, None]
    x = ((np.arange(columns.start, columns.stop) + 0.5 - width / 2) / height).astype(np.float32)[None, None]
    time = np.linspace(0, 1, num_frames, dtype=np.float32)[:, None, None]
    top, bottom = (np.array(color, np.float32) for color in scene.background)
    pixels = np.broadcast_to(top + (bottom - top) * (y[..., None] + 0.5), (num_frames, y.size, x.size, 3))
    for sprite in scene.sprites:
        center_y, center_x, radius = _trajectory(sprite, time)
        distance = OUTLINES[sprite.shape](y - center_y, x - center_x, radius)
        covered = np.clip(0.5 - distance * height, 0, 1)[..., None]
        pixels = pixels + (np.array(sprite.color, np.float32) - pixels) * covered
    return np.round(pixels * 255).astype(np.uint8)


def _sprite(rng: np.random.Generator, color: Color, index: int, count: int, aspect: float) -> Sprite:
    motion, radius = str(rng.choice(list(MOTIONS))), float(rng.uniform(*RADIUS))
    travel = float(rng.uniform(*TRAVEL))
    sprite = Sprite(str(rng.choice(list(OUTLINES))), color, motion, radius, (0.0, 0.0), travel)
    time = np.linspace(0, 1, 25, dtype=np.float32)
    y, x, size = (np.broadcast_to(part, time.shape) for part in _trajectory(sprite, time))
    # Two shapes stay in their halves of the frame, if it is wide enough.
    left, right = -aspect / 2 + index * aspect / count, -aspect / 2 + (index + 1) * aspect / count
    start = _inside(rng, y, size, -0.5, 0.5), _inside(rng, x, size, left, right)
    return Sprite(sprite.shape, color, motion, radius, start, travel)


def _inside(rng: np.random.Generator, path: Array, size: Array, low: float, high: float) -> float:
    """A random start from which a path stays within two borders; the middle if there is no room."""
    first = low + MARGIN - float((path - size).min())
    last = high - MARGIN - float((path + size).max())
    return float(rng.uniform(first, last)) if first < last else (first + last) / 2


def _trajectory(sprite: Sprite, time: Array) -> tuple[Array, Array, Array]:
    """(y, x, radius) of a shape at each time in [0, 1]."""
    y, x = (np.full_like(time, start) for start in sprite.start)
    radius = np.full_like(time, sprite.radius)
    if sprite.motion == "circle":
        angle, around = 2 * np.pi * time, sprite.travel * 0.45
        return y + around * np.sin(angle), x + around * np.cos(angle), radius
    if sprite.motion == "growing":
        return y, x, radius * (0.5 + time)
    down, right = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}[sprite.motion]
    return y + down * sprite.travel * time, x + right * sprite.travel * time, radius


def _background(rng: np.random.Generator) -> tuple[tuple[Color, Color], str]:
    name = str(rng.choice(list(BACKGROUNDS)))
    color = BACKGROUNDS[name]
    if rng.random() < 0.6:
        return (color, color), name
    darker = (color[0] / 3, color[1] / 3, color[2] / 3)
    return (color, darker) if rng.random() < 0.5 else (darker, color), f"graded {name}"


def _any_color(rng: np.random.Generator) -> Color:
    red, green, blue = rng.random(3).tolist()
    return red, green, blue


def _circle(y: Array, x: Array, radius: Array) -> Array:
    return np.hypot(y, x) - radius


def _square(y: Array, x: Array, radius: Array) -> Array:
    return np.maximum(abs(y), abs(x)) - 0.85 * radius


def _triangle(y: Array, x: Array, radius: Array) -> Array:
    """Triangle with one corner at the top."""
    return np.maximum(y - 0.55 * radius, 0.866 * abs(x) - 0.5 * y - 0.5 * radius)


def _star(y: Array, x: Array, radius: Array) -> Array:
    """Five-pointed star with one point up; the distance is to the nearer of a point's two edges."""
    outer, inner = 1.15 * radius, 0.5 * radius
    sector = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)  # from the nearest point's direction
    along, across = np.hypot(y, x) * np.cos(angle), np.hypot(y, x) * np.sin(angle)
    edge_along, edge_across = outer - inner * np.cos(sector), inner * np.sin(sector)
    length = np.hypot(edge_along, edge_across)
    return ((along - outer) * edge_across + across * edge_along) / length


OUTLINES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}
"""Signed distance to the outline, negative inside, from the offsets from the centre and the radius."""
