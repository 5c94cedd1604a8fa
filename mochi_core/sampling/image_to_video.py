"""Turn images and clips into the given frames of a video.

The autoencoder is causal: a first image is latent 0 of its video, and a clip of 6k + 1 frames the first k + 1 latents. A last
image has no latent of its own, because every latent but the first holds 6 frames: it is given as 6 identical frames, or as the
frames that lead up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import KEEP_FRAMES, TEMPORAL_COMPRESSION, VideoSize, frames_to_latents, latents_to_frames
from .given import Given

Encode = Callable[[Tensor], Tensor]
"""Frames (6k + 1, H, W, 3) in [0, 1] to latents (1, 12, k + 1, H / 8, W / 8)."""

RAMP = (0.8, 0.95)
"""Noise levels at which the neighbours of a held frame are released, the nearest last; until then they show the same image. The
best values measured without training, on the tiny model: docs/image_to_video.md."""


def given_frames(
    encode: Encode,
    size: VideoSize,
    start: Tensor | None = None,
    end: Tensor | None = None,
    *,
    keep: int = KEEP_FRAMES,
    start_noise: float = 0.0,
    end_noise: float = 0.0,
    held: bool = False,
) -> Given:
    """The given frames for a video of `size`, in the latent space of `encode`.

    Args:
        start: image or clip (F, H, W, 3 or more) in [0, 1] that the video begins with; of a clip, the last frames are used.
        end: image, or the last frames of a clip, that the video ends with; a single image is repeated for 6 frames.
        keep: most frames of a clip to use, rounded down to 6k + 1.
        start_noise, end_noise: levels of the given frames, see `Given.levels`.
        held: for weights that take one noise level for all frames. The neighbours of the given frames then show the same image,
            and are released by `RAMP`.

    Raises:
        ValueError: there are no frames, a level is outside [0, 1], or no new frames are left to make.
    """
    if start is None and end is None:
        raise ValueError("There is no image to make a video from; give a first image, a last one or both.")
    for name, level in (("start_noise", start_noise), ("end_noise", end_noise)):
        if not 0 <= level <= 1:
            raise ValueError(
                f"{name} is {level}; use 0 (given frames are kept as they are) to 1 (they are regenerated)."
            )
    first = None if start is None else _last_frames(start, size, keep)
    last = None if end is None else _ending(_last_frames(end, size, keep))
    count = 0 if first is None else frames_to_latents(len(first))
    count += 0 if last is None else frames_to_latents(len(last)) - 1
    if count >= size.num_latents:
        raise ValueError(
            f"The given frames fill {count} of the {size.num_latents} latents of {size.num_frames} frames, so there is nothing "
            "left to make; make a longer video, or keep fewer frames."
        )
    released = RAMP if held else ()
    still, sides = TEMPORAL_COMPRESSION * len(released), []
    if first is not None:
        latents = encode(torch.cat([first, first[-1:].expand(still, -1, -1, -1)]))
        sides.append(_placed(latents, start_noise, released, size.num_latents))
    if last is not None:
        # The first latent is dropped: it encodes a single frame, and so does not fit the end of a video.
        whole = encode(torch.cat([last[:1].expand(still, -1, -1, -1), last]))
        latents, levels = _placed(whole[:, :, 1:].flip(2), end_noise, released, size.num_latents)
        sides.append((latents.flip(2), levels.flip(0)))
    return Given(*_merged(*sides), held)


def _ending(frames: Tensor) -> Tensor:
    """Frames (6k + 1, ...) that end a video, whose first one is dropped later; a single image is repeated."""
    return frames if len(frames) > 1 else frames.expand(TEMPORAL_COMPRESSION + 1, -1, -1, -1)


def _placed(latents: Tensor, level: float, released: Sequence[float], num_latents: int) -> tuple[Tensor, Tensor]:
    """Latents (1, C, T, H, W) and levels (T,) of a video of `num_latents` from those at its start, repeating the last latent.

    The levels are `level` for the given latents, then those of `released`, then 1.
    """
    given = latents.shape[2] - len(released)
    levels = [level] * given + [max(level, sigma) for sigma in released] + [1.0] * num_latents
    places = torch.arange(num_latents, device=latents.device).clamp(max=latents.shape[2] - 1)
    return latents.index_select(2, places), torch.tensor(levels[:num_latents])


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Latents and levels from both ends of a video: for each frame, those with the lower level."""
    if other is None:
        return one
    (latents, levels), (latents_of_end, levels_of_end) = one, other
    nearer = (levels <= levels_of_end)[:, None, None].to(latents.device)  # (T, 1, 1)
    return torch.where(nearer, latents, latents_of_end), torch.minimum(levels, levels_of_end)


def _last_frames(frames: Tensor, size: VideoSize, keep: int) -> Tensor:
    """The last 6k + 1 frames, at most `keep`, at the size of the video."""
    if frames.ndim != 4 or frames.shape[-1] < 3 or 0 in frames.shape:
        raise ValueError(
            f"Given frames have shape {tuple(frames.shape)}; they must be (frames, height, width, 3), at least one of each."
        )
    return fitted(frames[-kept_frames(len(frames), keep) :], size.height, size.width)


def kept_frames(count: int, keep: int) -> int:
    """The largest 6k + 1 that is at most `count` and `keep`: how many of `count` frames are kept.

    Raises:
        ValueError: `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but at least one frame must be kept; use 1, 7, 13, 19 ...")
    return latents_to_frames(frames_to_latents(min(count, keep)))


def fitted(frames: Tensor, height: int, width: int) -> Tensor:
    """Centre-crop frames (F, H, W, 3 or more) in [0, 1] and resize them to (F, height, width, 3)."""
    images = frames[..., :3].movedim(-1, 1).float()  # (F, 3, H, W)
    if images.shape[2:] != (height, width):
        scale = max(height / images.shape[2], width / images.shape[3])
        rows, columns = max(1, round(height / scale)), max(1, round(width / scale))
        top, left = (images.shape[2] - rows) // 2, (images.shape[3] - columns) // 2
        images = images[:, :, top : top + rows, left : left + columns]
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return images.movedim(1, -1)
