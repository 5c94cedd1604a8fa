"""A noise level of each latent frame, by the host's mask of what to denoise.

A mask that is the same all over each frame gives every frame a share of the sampler's noise: 0 keeps it, 1 makes it anew, and
what lies between refines it. With weights that were trained for it, such as Pusa's, the network is told these levels, and the
state of the sampler is at them. Samplers that add noise on the way (ancestral, SDE, lcm) add it at their own level to all
frames: they keep frames without noise, but for levels between 0 and 1 there is a warning. Masks that vary inside of a frame, and
other weights, are left to the host's inpainting.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ...mochi_core.sampling.given import at_levels, frame_levels

ADDING_NOISE = ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver")
"""Parts of the names of the host's samplers that add noise between steps."""
ROUNDING = 1e-5
"""What the host's scaling of a mask may add to differences."""


@dataclass(frozen=True)
class FrameLevels:
    """Noise levels of latent frames as shares of the sampler's; no bare tensor, which the host would round to bf16."""

    shares: Tensor
    """(B, T) in [0, 1]."""

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise levels (B, T) for those of the sampler, `timestep` (B,)."""
        return frame_levels(timestep, self.shares)

    def scale(self, velocity: Tensor) -> Tensor:
        """`velocity` (B, C, T, H, W) as a derivative by the sampler's noise level."""
        return velocity * self.shares[:, None, :, None, None].to(velocity)


def shares_of(mask: Tensor | None) -> Tensor | None:
    """(B, 1, T, 1, 1) from a mask (B, C, T, H, W); None without one, or if it varies inside of a frame."""
    if mask is None:
        return None
    low, high = mask.amin((1, 3, 4), keepdim=True), mask.amax((1, 3, 4), keepdim=True)
    return low if torch.all(high - low < ROUNDING) else None


def with_frame_levels(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *arguments, **named
):
    """Wraps a run of the host's sampler: starts each frame at its own level, and has the host keep those without noise."""
    shares = shares_of(denoise_mask)
    if shares is not None and denoise_mask is not None and latent_image is not None:
        sampler = getattr(getattr(executor.class_obj, "sampler_function", None), "__name__", "")
        if ((shares > 0) & (shares < 1)).any() and any(part in sampler for part in ADDING_NOISE):
            logging.warning(
                "Mochi: %s adds noise to all frames alike, so frames with a noise level between 0 and 1 get too much; "
                "use euler, heun or another sampler that adds none.",
                sampler,
            )
        # The host mixes it with latent_image by the first sigma. A run without noise goes on from one that has begun: its
        # frames are at their levels.
        noise = at_levels(latent_image, noise, shares if noise.any() else (shares > 0).to(shares))
        denoise_mask = (denoise_mask > 0).to(denoise_mask)
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *arguments, **named)
