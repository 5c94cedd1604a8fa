"""Images and masks as the LATENT that sampling starts from.

Weights with a noise level for each frame receive them through `frame_levels`. With any others, the host's inpainting holds the
given frames, and a function of the MODEL releases each frame of the mask once the noise has fallen to its value.
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
from .sampling import checked_mask
from .vae import checked_frames, crop_frames, encode_frames, require_mochi_vae


def image_to_video(
    model, vae, size: VideoSize, start: Tensor | None, end: Tensor | None, keep: int, **noise: float
) -> tuple[Any, dict[str, Any], int]:
    """A MODEL and a LATENT for any sampler, and the number of frames of `start` that the video begins with.

    `start` and `end` are IMAGEs; `keep` and `noise` are as in `given_frames`.

    Raises:
        ValueError: see `given_frames` and `checked_frames`; or the VAE is not Mochi's.
    """
    require_mochi_vae(vae)
    for frames in (start, end):
        if frames is not None:
            checked_frames(frames)
    held = not getattr(model.model, "has_frame_levels", False)
    given = given_frames(lambda frames: encode_frames(vae, frames), size, start, end, keep=keep, held=held, **noise)
    if held:
        model = model.clone()
        model.set_model_denoise_mask_function(released)
    mask = given.levels.view(1, 1, -1, 1, 1)  # (1, 1, T, 1, 1), the host expands it over each frame
    latent = {"samples": given.latents.to(mm.intermediate_device()), "noise_mask": mask}
    return model, latent, 0 if start is None else kept_frames(len(start), keep)


def released(sigma: Tensor, denoise_mask: Tensor, extra_options: dict[str, Any]) -> Tensor:  # noqa: ARG001 - the host's
    """The part to denoise at noise level `sigma` (B,) > 0: wherever the noise has fallen to the mask's value.

    In a schedule from 1 to 0, this equals the host's Differential Diffusion (arXiv 2306.00950).
    """
    return (denoise_mask >= sigma[0]).to(denoise_mask)


def with_kept_parts(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *arguments, **named
):
    """Wraps a run of the host's sampler that stops above noise level 0, or continues from there without noise of its own.

    The first run returns the parts that its mask keeps as in the given picture, which is how the second takes its input anyway;
    the second adds noise of its own seed there. With equal seeds, the two together make the video of a single run. The host
    itself passes on the noisy state, which the second run would keep to the end.
    """
    if denoise_mask is None or latent_image is None:
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *arguments, **named)
    release = extra_args["model_options"].get("denoise_mask_function")

    def kept(sigma: Tensor) -> Tensor:
        never = denoise_mask <= 0
        if release is None:
            return never
        return never | (release(sigma.view(1), denoise_mask, {"model": guider, "sigmas": sigmas}) <= 0)

    if sigmas[0] > 0 and not noise.any():
        generator = torch.Generator().manual_seed(extra_args.get("seed") or 0)
        noise = torch.randn(noise.shape, generator=generator).to(noise) * kept(sigmas[0])
    made = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *arguments, **named)
    return torch.where(kept(sigmas[-1]), latent_image.to(made), made) if sigmas[-1] > 0 else made


def latent_mask(mask: Tensor, pixels: Tensor) -> Tensor:
    """A MASK (F or 1, H, W) for IMAGE frames (F, H, W, C) as the mask (1, 1, T, H / 8, W / 8) of their latents.

    A latent is denoised if any of the pixels and frames in it is: pooled by maximum over 8 x 8 pixels and 1, 6, 6 ... frames.

    Raises:
        ValueError: the mask has another number of frames, or none, or values that are not numbers.
    """
    frames, height, width = checked_frames(pixels).shape[-4:-1]
    mask = checked_mask(mask)
    mask = mask.reshape(-1, 1, *mask.shape[-2:])  # (F, 1, H, W)
    if len(mask) not in (1, frames):
        raise ValueError(
            f"The mask has {len(mask)} frames and the video {frames}; give one mask for all frames, or one for each."
        )
    if mask.shape[2:] != (height, width):
        mask = F.interpolate(mask, (height, width), mode="nearest-exact")
    # Cropped like the frames: at the end of the clip, and at the margins.
    whole = crop_frames(mask.expand(frames, -1, -1, -1).movedim(1, -1))[..., 0]  # (6k + 1, H, W)
    video = torch.cat([whole[:1].expand(TEMPORAL_COMPRESSION - 1, -1, -1), whole])[None, None]
    pooled = F.max_pool3d(video, (TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION, SPATIAL_COMPRESSION))
    assert pooled.shape[2] == frames_to_latents(len(whole))
    return pooled
