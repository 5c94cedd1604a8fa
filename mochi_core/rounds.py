"""Long videos in rounds: each continues the previous one's last frames, so that no more is made at once than fits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .geometry import KEEP_FRAMES, TEMPORAL_COMPRESSION, frames_problem
from .pipeline import MochiPipeline
from .sampling.image_to_video import kept_frames

Frames = NDArray[np.floating]
MOST_ROUNDS = 10_000
"""Far more than anybody needs: 14 hours in rounds of 163 frames that keep 13."""


def round_sizes(num_frames: int, at_once: int, keep: int) -> list[int]:
    """Frames in each round of a video of `num_frames`, at most `at_once`; from the second round on, this includes those kept.

    Raises:
        ValueError: a number of frames is not 6k + 1, rounds would have no new frames, or there would be more than `MOST_ROUNDS`.
    """
    for frames in (num_frames, at_once):
        if problem := frames_problem(frames):
            raise ValueError(problem)
    kept = kept_frames(at_once, keep)
    if num_frames > at_once and kept == at_once:
        fewer = f"keep {at_once - TEMPORAL_COMPRESSION}, or " if at_once > TEMPORAL_COMPRESSION else ""
        raise ValueError(
            f"Rounds of {at_once} frames that keep {keep} have no room for new ones; {fewer}use rounds of "
            f"{kept_frames(keep, keep) + TEMPORAL_COMPRESSION} frames or more."
        )
    if num_frames > at_once + (MOST_ROUNDS - 1) * (at_once - kept):
        raise ValueError(
            f"{num_frames} frames are more than {MOST_ROUNDS:,} rounds of {at_once} that keep {kept} make; use longer rounds, "
            "or make a shorter video."
        )
    sizes, made = [min(num_frames, at_once)], min(num_frames, at_once)
    while made < num_frames:
        new = min(at_once - kept, num_frames - made)
        sizes.append(kept + new)
        made += new
    return sizes


def in_rounds(
    pipe: MochiPipeline,
    num_frames: int,
    at_once: int,
    *,
    seed: int = 0,
    keep: int = KEEP_FRAMES,
    image: Any = None,
    video: Any = None,
    last_image: Any = None,
    start_noise: float = 0.0,
    **arguments: Any,
) -> Frames:
    """Make one video (F, H, W, 3) in [0, 1] of `num_frames`, in rounds of at most `at_once` frames.

    The first round begins with `image` or `video`, the last one ends with `last_image`, and every later round continues the last
    `keep` frames of the previous one, with the next seed. All other arguments are those of a `MochiPipeline`, for one video.
    `start_noise` applies only to the frames that the first round begins with: frames kept by later rounds are already in the
    video, and with noise the new frames would continue different ones.

    Raises:
        ValueError: see `round_sizes` and `MochiPipeline`.
    """
    sizes, parts = round_sizes(num_frames, at_once, keep), list[Frames]()
    begin: dict[str, Any] = {"image": image, "video": video, "start_noise": start_noise}
    for number, size in enumerate(sizes):
        end = last_image if number == len(sizes) - 1 else None
        made = pipe(num_frames=size, seed=seed + number, keep=keep, last_image=end, **begin, **arguments)[0]
        parts.append(made if number == 0 else made[kept_frames(len(begin["video"]), keep) :])
        begin = {"video": made[-kept_frames(len(made), keep) :]}
    return np.concatenate(parts)


def continued(video: NDArray[np.uint8] | None, made: Frames, keep: int) -> NDArray[np.uint8] | Frames:
    """Append the frames that continue a given video (F, H, W, 3), if there is one, to it; `made` begins with its last ones."""
    if video is None:
        return made
    new = made[kept_frames(len(video), keep) :]
    return np.concatenate([video, (new * 255).round().astype(np.uint8)])
