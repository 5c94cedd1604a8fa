"""Frames that a video is made from: a first image, a last one, the end of an earlier video.

Weights trained for it, such as Pusa's (arXiv 2507.16116), take per-frame noise levels. Others take one level for all frames, so a
given frame is held: it has the noise of the schedule, and goes straight to the given image. That is temporal inpainting; holding
the neighbours of a given frame to the same image and releasing them late is differential diffusion (arXiv 2306.00950) with a
temporal mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Given:
    """Given frames of a video, each with a level."""

    latents: Tensor
    """(B or 1, C, T, H, W), clean, in DiT space; not used where the level is 1."""
    levels: Tensor
    """(T,) in [0, 1]. Not held: the noise level of each latent frame as a fraction of the schedule's (Pusa's noise multiplier);
    0 keeps the given frame, 1 makes a new one, values between refine it. Held: the noise level at which a frame is released."""
    held: bool = False
    """Whether frames are held instead of having their own noise levels: for weights that take one level for all frames."""

    def check(self, noise: Tensor) -> None:
        """Raise a ValueError if the shapes do not fit those of `noise` (B, C, T, H, W), or levels are outside [0, 1]."""
        if self.latents.shape not in (noise.shape, (1, *noise.shape[1:])) or self.levels.shape != noise.shape[2:3]:
            raise ValueError(
                f"Given latents {(*self.latents.shape,)} with {len(self.levels)} levels do not fit a video of latents "
                f"{(*noise.shape,)}; give latents for one or all videos, and a level for each of {noise.shape[2]} frames."
            )
        if not ((self.levels >= 0) & (self.levels <= 1)).all():
            raise ValueError(f"The levels of given frames are {self.levels.tolist()}; use 0 (kept) to 1 (new).")

    def start(self, noise: Tensor) -> Tensor:
        """`noise` (B, C, T, H, W) with the given frames inserted, each at its level."""
        return at_levels(self.latents.to(noise), noise, self.levels[:, None, None].to(noise))

    def hold(self, velocity: Tensor, straight: Tensor, sigma: float) -> Tensor:
        """`velocity` (B, C, T, H, W) at noise level `sigma`, replaced with `straight` in frames not yet released."""
        holds = (self.levels < sigma)[:, None, None].to(velocity.device)  # (T, 1, 1)
        return torch.where(holds, straight, velocity)


def at_levels(clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """Interpolate from `clean` to `noise` (B, C, T, H, W) by `levels`; both `clean` and `levels` broadcast to `noise`.

    Where a level is 1, the result is pure noise, whatever `clean` holds.
    """
    return torch.where(levels < 1, levels * noise + (1 - levels) * clean, noise)


def frame_levels(sigmas: Tensor, levels: Tensor) -> Tensor:
    """Per-frame noise levels (n, T): the sampler's `sigmas` (n,) times the fractions `levels` (T,) or (n, T)."""
    return sigmas[:, None] * levels.to(sigmas)
