"""Train a small autoencoder on procedural clips."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...autoencoder.encoder import EncoderStage
from ...autoencoder.latents import LATENTS_MEAN, LATENTS_STD, normalize_latents
from ...autoencoder.layers import RGB, ResBlock
from ...autoencoder.model import LOGVAR_RANGE, AsymmVAE, Posterior
from ...config import AsymmVAEConfig
from ..prepare import to_model_range
from .shapes import draw, random_clip, random_colors

# No blocks at full size: with 32 channels in 32 groups, a frame of one colour has no variance to divide by.
CONFIG = AsymmVAEConfig(
    decoder_channels=(96, 96, 64, 32),
    decoder_blocks=(1, 1, 2, 2, 0),
    encoder_channels=(32, 64, 64, 96),
    encoder_blocks=(0, 1, 1, 1, 1),
    encoder_attention=(False, False, False, True, True),
)
KL_WEIGHT = 5e-5
"""Twice the variance of a 32 dB error, over the 96 values that become one latent: the weight in a variational bound."""
STATISTICS_WEIGHT = 0.01
FIRST_LOGVAR = -6.0
MEAN_SILU = 0.2066
"""Mean of silu(x) for a standard normal x."""
ONE_BEFORE_SILU = 1.2784645
"""The x where silu(x) is 1."""
CROP = 32


@torch.no_grad()
def new_vae() -> AsymmVAE:
    """An autoencoder initialised with magnitude-preserving direct paths and residual blocks that add nothing.

    Its latents also start with little noise: pure noise would be ignored, and nothing would then make it less noisy.
    """
    vae = AsymmVAE(CONFIG)
    encoder: Any = vae.encoder
    decoder: Any = vae.decoder
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.norms_and_convs()[-1].weight)
    stages = [stage for stage in encoder.layers if isinstance(stage, EncoderStage)]
    straight = [
        *(stage.down for stage in stages),
        decoder.blocks[0][0],
        *(stage.proj for stage in decoder.blocks[1:-1]),
    ]
    for layer in [*straight, decoder.output_proj]:
        nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    for layer in [encoder.layers[0], *straight[: len(stages)]]:
        # A norm removes what is the same everywhere, unless there is something else to compare it with.
        nn.init.normal_(layer.bias, std=0.5)
    pixels, sines = encoder.layers[0].weight.tensor_split((RGB,), dim=1)
    pixels.normal_(std=RGB**-0.5)
    sines.zero_()
    mean, logvar = encoder.output_proj.weight.chunk(2)
    mean.normal_(std=mean.shape[1] ** -0.5)
    logvar.fill_(FIRST_LOGVAR / (logvar.shape[1] * MEAN_SILU))
    return vae


def posterior_of(vae: AsymmVAE, video: Tensor) -> Posterior:
    """The posterior of video (B, 3, 6k + 1, 8H, 8W) in [-1, 1], in float32 and with gradients."""
    return Posterior.from_moments(vae.check_encoder(video)(video).float())


def decoded(vae: AsymmVAE, latents: Tensor) -> Tensor:
    """Video (B, 3, 6(T - 1) + 1, 8H, 8W) from latents (B, 12, T, H, W) in VAE space, in float32 and with gradients."""
    return vae.check_decoder(latents.shape)(latents).float()


def loss(vae: AsymmVAE, video: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error, plus divergence from the prior and from the statistics of Mochi's latents, as a scalar."""
    posterior = posterior_of(vae, video)
    logvar = posterior.logvar.clamp(*LOGVAR_RANGE)
    error = F.mse_loss(decoded(vae, posterior.sample(generator)), video)
    divergence = 0.5 * (posterior.mean.square() + logvar.exp() - 1 - logvar).mean()
    latents = normalize_latents(posterior.mean)
    off = channel_means(latents).square().mean() + channel_deviations(latents).log().square().mean()
    return error + KL_WEIGHT * divergence + STATISTICS_WEIGHT * off


@torch.no_grad()
def standardize(vae: AsymmVAE, video: Tensor) -> None:
    """Give the latents of `video` exactly the statistics of Mochi's, and make the decoder undo the change.

    The encoder's last layer has no bias, so the feature that matters least to the latents is sacrificed and becomes a constant.
    """
    encoder: Any = vae.encoder
    decoder: Any = vae.decoder
    norm, last, first = encoder.output_norm, encoder.output_proj.weight, decoder.blocks[0][0]
    least = int((last[: CONFIG.latent_channels].norm(dim=0) * norm.weight.abs()).argmin())
    norm.weight[least], norm.bias[least] = 0, ONE_BEFORE_SILU
    means, deviations = (f(posterior_of(vae, video).mean) for f in (channel_means, channel_deviations))
    wanted_means, wanted_deviations = (means.new_tensor(values) for values in (LATENTS_MEAN, LATENTS_STD))
    scale = wanted_deviations / deviations
    shift = wanted_means - scale * means
    mean_rows, logvar_rows = last.chunk(2)
    mean_rows *= scale[:, None]
    mean_rows[:, least] += shift
    logvar_rows[:, least] += 2 * scale.log()
    weight = first.weight / scale.view(1, -1, 1, 1, 1)
    first.bias -= (weight.flatten(1) * shift).sum(dim=1)
    first.weight.copy_(weight)


def channel_means(latents: Tensor) -> Tensor:
    """(B, 12, T, H, W) to (12,)."""
    return latents.mean(dim=(0, 2, 3, 4))


def channel_deviations(latents: Tensor) -> Tensor:
    """(B, 12, T, H, W) to (12,)."""
    return latents.std(dim=(0, 2, 3, 4))


def decoder_loss(vae: AsymmVAE, video: Tensor) -> Tensor:
    """Squared error with gradients for the decoder only."""
    with torch.no_grad():
        latents = posterior_of(vae, video).mean
    return F.mse_loss(decoded(vae, latents), video)


def captioned_batch(rng: np.random.Generator, count: int, width: int = 64) -> Tensor:
    """Whole clips (count, 3, 13, 64, width) like those that a denoiser will make."""
    return to_video([draw(random_clip(rng, width / 64)[0], 13, 64, width) for _ in range(count)])


def batch(rng: np.random.Generator) -> Tensor:
    """Clips (B, 3, F, H, W) in [-1, 1] in any colours: the starts of small crops, and sometimes whole clips."""
    if rng.random() < 0.2:
        return to_video([draw(random_colors(rng), 13, 64, 64) for _ in range(2)])
    return to_video([_crop(rng) for _ in range(8)])


def to_video(clips: list[np.ndarray[Any, Any]]) -> Tensor:
    """uint8 clips (F, H, W, 3) to (B, 3, F, H, W) in [-1, 1]."""
    return torch.cat([to_model_range(clip) for clip in clips])


def _crop(rng: np.random.Generator) -> np.ndarray:
    top, left = rng.integers(0, 64 - CROP + 1, 2).tolist()
    window = slice(top, top + CROP), slice(left, left + CROP)
    # The first frames of a 13-frame clip, so that shapes move at the same speed as there.
    return draw(random_colors(rng), 13, 64, 64, window)[:7]
