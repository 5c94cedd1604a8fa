"""The two scalings of the latents.

The autoencoder works in VAE space, the denoiser in DiT space: VAE space = DiT space * std + mean, per channel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..geometry import LATENT_CHANNELS

# Source: genmoai/mochi, src/genmo/mochi_preview/vae/vae_stats.py; the same in the config.json of diffusers' AutoencoderKLMochi
# and in ComfyUI's latent_formats.Mochi.
LATENTS_MEAN = (
    -0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561,
    0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976,
    -0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285,
)  # fmt: skip
LATENTS_STD = (
    0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592,
    0.8244560132752793, 0.917259975397747, 0.9294154431013696, 1.3720942357788521,
    0.881393668867029, 0.9168315692124348, 0.9185249279345552, 0.9274757570805041,
)  # fmt: skip


def shape_problem(shape: Sequence[int], channels: int = LATENT_CHANNELS) -> str | None:
    """Error message if this is not a shape of Mochi latents, (B, 12, T, H, W) with no dimension empty, else None."""
    if len(shape) == 5 and shape[1] == channels and 0 not in shape:
        return None
    return f"latents have shape {(*shape,)}, but Mochi's are (batch, {channels}, T, H, W) with at least one of each."


def latents_problem(latents: Tensor, channels: int = LATENT_CHANNELS) -> str | None:
    """Error message if `latents` are not finite floats of shape (B, 12, T, H, W) with no dimension empty, else None.

    A single non-finite value spreads to the whole video, in the denoiser as in the autoencoder.
    """
    if problem := shape_problem(latents.shape, channels):
        return problem
    if not latents.is_floating_point():
        return f"latents are {str(latents.dtype).removeprefix('torch.')}, but must be floating point, such as float32."
    if bad := latents.numel() - int(latents.isfinite().sum()):
        return (
            f"latents contain {bad} infinite or NaN values out of {latents.numel()}, which would spoil the whole "
            "video; make them again, in bf16 or fp32 if it was fp16."
        )
    return None


def normalize_latents(latents: Tensor) -> Tensor:
    """VAE space to DiT space, (B, 12, T, H, W)."""
    mean, std = _statistics(latents)
    return (latents - mean) / std


def denormalize_latents(latents: Tensor) -> Tensor:
    """DiT space to VAE space, (B, 12, T, H, W)."""
    mean, std = _statistics(latents)
    return latents * std + mean


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, len(LATENTS_MEAN), 1, 1, 1)
    return like.new_tensor(LATENTS_MEAN).view(shape), like.new_tensor(LATENTS_STD).view(shape)
