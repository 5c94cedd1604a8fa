"""Images and masks as the LATENT that a video is sampled from.

Weights with a noise level of each frame are told them by `frame_levels`. With any others, the host's inpainting holds the given
frames, and a function of the MODEL releases each frame of the mask when the noise has fallen to its value.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from torch import Tensor

from ...mochi_core import VideoSize
from ...mochi_core.geometry import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, frames_to_latents
from ...mochi_core.sampling.image_to_video import given_frames, kept_frames
from .vae import crop_frames, encode_frames, require_mochi_vae


def image_to_video(
    model, vae, size: VideoSize, start: Tensor | None, end: Tensor | None, keep: int, **noise: float
) -> tuple[Any, dict[str, Any], int]:
    """A MODEL and a LATENT for any sampler, and how many frames of `start` the video begins with.

    `start` and `end` are IMAGEs, `keep` and `noise` as for `given_frames`.

    Raises:
        ValueError: see `given_frames`; or the VAE is not Mochi's.
    """
    require_mochi_vae(vae)
    held = not getattr(model.model, "has_frame_levels", False)
    given = given_frames(lambda frames: encode_frames(vae, frames), size, start, end, keep=keep, held=held, **noise)
    if held:
        model = model.clone()
        model.set_model_denoise_mask_function(released)
    mask = given.levels.view(1, 1, -1, 1, 1)  # (1, 1, T, 1, 1), the host stretches it over a frame
    latent = {"samples": given.latents.to(mm.intermediate_device()), "noise_mask": mask}
    return model, latent, 0 if start is None else kept_frames(len(start), keep)


def released(sigma: Tensor, denoise_mask: Tensor, extra_options: dict[str, Any]) -> Tensor:  # noqa: ARG001 - the host's
    """What is denoised at the noise level `sigma` (B,), which is above 0: whatever it has fallen to.

    In a schedule from 1 to 0, that is the host's Differential Diffusion (arXiv 2306.00950).
    """
    return (denoise_mask >= sigma[0]).to(denoise_mask)


def latent_mask(mask: Tensor, pixels: Tensor) -> Tensor:
    """A MASK (F or 1, H, W) for IMAGE frames (F, H, W, C) as the mask (1, 1, T, H / 8, W / 8) of their latents.

    A latent is denoised if any of the pixels and frames in it is: pooled by maximum over 8 x 8 pixels and 1, 6, 6 ... frames.

    Raises:
        ValueError: the mask has another number of frames.
    """
    frames, height, width = pixels.shape[-4:-1]
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()  # (F, 1, H, W)
    if len(mask) not in (1, frames):
        raise ValueError(
            f"The mask has {len(mask)} frames and the video {frames}; give one mask for all frames, or one for each."
        )
    if mask.shape[2:] != (height, width):
        mask = F.interpolate(mask, (height, width), mode="nearest-exact")
    # Cropped as the frames are: some at the end, and a margin.
    whole = crop_frames(mask.expand(frames, -1, -1, -1).movedim(1, -1))[..., 0]  # (6k + 1, H, W)
    video = torch.cat([whole[:1].expand(TEMPORAL_COMPRESSION - 1, -1, -1), whole])[None, None]
    pooled = F.max_pool3d(video, (TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION, SPATIAL_COMPRESSION))
    assert pooled.shape[2] == frames_to_latents(len(whole))
    return pooled
