"""A noise level for each latent frame, given by the host's noise mask.

A mask that is uniform over each frame gives every frame a share of the sampler's noise: 0 keeps it, 1 regenerates it, and values
in between refine it. If the weights were trained for this, such as Pusa's, the network is told these levels, and the sampler's
state is at them. Samplers that add noise between steps (ancestral, SDE, lcm) add it to all frames at their own level: frames
without noise are kept, but levels between 0 and 1 cause a warning. Masks that vary within a frame, and other weights, are left to
the host's inpainting.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ...mochi_core.sampling.given import at_levels, frame_levels

ADDING_NOISE = ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver")
"""Substrings of the names of the host's samplers that add noise between steps."""
ROUNDING = 1e-5
"""Rounding differences that the host's scaling of a mask may add."""


@dataclass(frozen=True)
class FrameLevels:
    """Noise levels of latent frames as shares of the sampler's; not a bare tensor, which the host would round to bf16."""

    shares: Tensor
    """(B, T) in [0, 1]."""

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise levels (B, T) for those of the sampler, `timestep` (B,)."""
        return frame_levels(timestep, self.shares)

    def scale(self, velocity: Tensor) -> Tensor:
        """`velocity` (B, C, T, H, W) as a derivative with respect to the sampler's noise level."""
        return velocity * self.shares[:, None, :, None, None].to(velocity)


def shares_of(mask: Tensor | None) -> Tensor | None:
    """(B, 1, T, 1, 1) from a mask (B, C, T, H, W); None without a mask, or if it varies within a frame."""
    if mask is None:
        return None
    low, high = mask.amin((1, 3, 4), keepdim=True), mask.amax((1, 3, 4), keepdim=True)
    return low if torch.all(high - low < ROUNDING) else None


def with_frame_levels(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *arguments, **named
):
    """Wraps a run of the host's sampler: starts each frame at its own level and has the host keep those without noise."""
    shares = shares_of(denoise_mask)
    if shares is not None and denoise_mask is not None and latent_image is not None:
        sampler = getattr(getattr(executor.class_obj, "sampler_function", None), "__name__", "")
        if ((shares > 0) & (shares < 1)).any() and any(part in sampler for part in ADDING_NOISE):
            logging.warning(
                "Mochi: %s adds noise to all frames alike, so frames with a noise level between 0 and 1 get too much; "
                "use euler, heun or another sampler that adds none.",
                sampler,
            )
        # The host mixes the noise with latent_image by the first sigma. A run without noise continues an earlier one, whose
        # frames are already at their levels.
        noise = at_levels(latent_image, noise, shares if noise.any() else (shares > 0).to(shares))
        denoise_mask = (denoise_mask > 0).to(denoise_mask)
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *arguments, **named)
