"""Sizes in pixels, latents and tokens, and which of them Mochi accepts."""

from __future__ import annotations

import math
from dataclasses import dataclass

LATENT_CHANNELS = 12
SPATIAL_COMPRESSION = 8
TEMPORAL_COMPRESSION = 6
FPS = 30  # Mochi's frame rate
SIZE_STEP = 16  # one latent patch: 8 pixels per latent cell, 2 cells per patch
KEEP_FRAMES = 19
"""Frames of a clip that are kept to continue it: 4 latents, as Pusa's authors do to extend videos."""
MAX_VIDEO_TOKENS = 2**24
"""Most tokens of all videos made at once: 35 minutes of 848 x 480, 377 times what Mochi was trained for."""


def frames_to_latents(num_frames: int) -> int:
    """Number of latent frames that hold `num_frames` = 6k + 1 video frames."""
    return (num_frames - 1) // TEMPORAL_COMPRESSION + 1


def latents_to_frames(num_latents: int) -> int:
    """Number of video frames that `num_latents` latent frames decode to."""
    return TEMPORAL_COMPRESSION * (num_latents - 1) + 1


def seconds_to_frames(seconds: float) -> int:
    """The 6k + 1 frames whose last one comes closest to `seconds` after the first at 30 per second; ties round up.

    Raises:
        ValueError: `seconds` is infinite or NaN.
    """
    if not math.isfinite(seconds):
        raise ValueError(f"seconds is {seconds}, but must be finite; use a number such as 5.4.")
    return latents_to_frames(max(0, math.floor(seconds * FPS / TEMPORAL_COMPRESSION + 0.5)) + 1)


@dataclass(frozen=True)
class VideoSize:
    """A video that Mochi can make.

    Raises:
        ValueError: height or width is not a positive multiple of 16, or num_frames is not 6k + 1 (the message gives the nearest
            valid values); or the video has more than `MAX_VIDEO_TOKENS` tokens.
    """

    height: int = 480
    width: int = 848
    num_frames: int = 163

    def __post_init__(self) -> None:
        sizes = [size_problem(name, getattr(self, name)) for name in ("height", "width")]
        if problems := [problem for problem in (*sizes, frames_problem(self.num_frames)) if problem]:
            raise ValueError(" ".join(problems))
        if problem := tokens_problem(self):
            raise ValueError(problem)

    @property
    def num_latents(self) -> int:
        return frames_to_latents(self.num_frames)

    @property
    def num_tokens(self) -> int:
        return self.num_latents * (self.height // SIZE_STEP) * (self.width // SIZE_STEP)

    @property
    def most_frames(self) -> int:
        """Frames of the longest video of this height and width."""
        return latents_to_frames(MAX_VIDEO_TOKENS * self.num_latents // self.num_tokens)

    def latent_shape(self, batch: int = 1) -> tuple[int, int, int, int, int]:
        """Shape (B, 12, T, H, W) of the latents; ValueError for more than `MAX_VIDEO_TOKENS`."""
        if problem := tokens_problem(self, batch):
            raise ValueError(problem)
        height, width = self.height // SPATIAL_COMPRESSION, self.width // SPATIAL_COMPRESSION
        return batch, LATENT_CHANNELS, self.num_latents, height, width


def size_problem(name: str, value: int) -> str | None:
    """Error message if `value` is not a valid height or width, else None."""
    if value > 0 and value % SIZE_STEP == 0:
        return None
    return f"{name} is {value}, but Mochi needs a multiple of {SIZE_STEP}; use {_nearest(value, SIZE_STEP, 0)}."


def frames_problem(num_frames: int) -> str | None:
    """Error message if `num_frames` is not a valid length, else None."""
    if num_frames > 0 and num_frames % TEMPORAL_COMPRESSION == 1:
        return None
    nearest = _nearest(num_frames, TEMPORAL_COMPRESSION, 1)
    return f"num_frames is {num_frames}, but Mochi needs 6k + 1 frames (7, 13, 19, ... 163); use {nearest}."


def tokens_problem(size: VideoSize, batch: int = 1) -> str | None:
    """Error message if `batch` videos of that size cannot be made at once, else None."""
    if batch * size.num_tokens <= MAX_VIDEO_TOKENS:
        return None
    videos = f"{batch} videos" if batch > 1 else "A video"
    return (
        f"{videos} of {size.num_frames} frames of {size.width} x {size.height} pixels would exceed the limit of "
        f"{MAX_VIDEO_TOKENS:,} tokens at once; make it smaller or shorter."
    )


def _nearest(value: int, step: int, offset: int) -> str:
    below = (value - offset) // step * step + offset
    return f"{below} or {below + step}" if below > 0 else f"{below + step if below + step > 0 else step + offset}"
