"""The encoder half of the autoencoder: video to latents. Parameter names are those of Genmo's checkpoints."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import AsymmVAEConfig
from ..ops import Ops
from .layers import NORM_GROUPS, RGB, ResBlock, frame_norm, pointwise

# Source: genmoai/mochi, src/genmo/mochi_preview/vae/models.py (add_fourier_features, start 6, stop 8).
FOURIER_EXPONENTS = (6, 7)
FOURIER_CHANNELS = RGB * (1 + 2 * len(FOURIER_EXPONENTS))


def fourier_features(video: Tensor) -> Tensor:
    """(B, 3, F, H, W) to (B, 15, F, H, W), at least in float32: the pixels, then their sines, then their cosines.

    At 2^6 and 2^7 cycles per unit, a pixel rounded to 16 bits has lost all phase information.
    """
    video = video.to(torch.promote_types(video.dtype, torch.float32))
    # Python numbers, not a tensor: copying one to a GPU would wait until all work queued there is done.
    angles = [video * (2.0**exponent * 2 * math.pi) for exponent in FOURIER_EXPONENTS]
    angles = rearrange(angles, "k b c f h w -> b (c k) f h w")
    return torch.cat((video, angles.sin(), angles.cos()), dim=1)


class EncoderStage(nn.Module):
    """A strided convolution, then residual blocks."""

    def __init__(
        self, channels: tuple[int, int], reduction: tuple[int, int], num_blocks: int, head_dim: int | None, *,
        ops: Ops, **factory: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        kernel = (reduction[0], reduction[1], reduction[1])
        down = ops.Conv3d(*channels, kernel_size=kernel, stride=kernel, **factory)
        blocks = (ResBlock(channels[1], head_dim, ops=ops, **factory) for _ in range(num_blocks))
        self.layers = nn.ModuleList([down, *blocks])

    @property
    def down(self) -> nn.Conv3d:
        """The strided convolution; its kernel and its stride are (t, s, s)."""
        return cast("nn.Conv3d", self.layers[0])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, t(T - 1) + 1, sH, sW) to (B, C', T, H, W), where t and s are the temporal and spatial reductions."""
        _, *blocks = self.layers
        before = self.down.kernel_size[0] - 1
        x = F.pad(x, (0, 0, 0, 0, before, 0), mode="replicate")  # (B, C, tT, sH, sW)
        x = self.down(x)  # (B, C', T, H, W)
        for block in blocks:
            x = block(x)  # (B, C', T, H, W)
        return x


class Encoder(nn.Module):
    """Video to latent moments, plain and differentiable; `AsymmVAE.encode` gives the same result in bounded memory."""

    def __init__(self, config: AsymmVAEConfig, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.config = config
        widths, counts = config.encoder_channels, config.encoder_blocks
        head_dims = [config.attention_head_dim if has else None for has in config.encoder_attention]
        reductions = zip(config.temporal_reductions, config.spatial_reductions, strict=True)

        def blocks(width: int, place: int) -> list[ResBlock]:
            return [ResBlock(width, head_dims[place], ops=ops, **factory) for _ in range(counts[place])]

        stages = [
            EncoderStage((widths[i], widths[i + 1]), reduction, counts[i + 1], head_dims[i + 1], ops=ops, **factory)
            for i, reduction in enumerate(reductions)
        ]
        proj_in = ops.Linear(FOURIER_CHANNELS, widths[0], **factory)
        self.layers = nn.ModuleList([proj_in, *blocks(widths[0], 0), *stages, *blocks(widths[-1], -1)])
        self.output_norm = ops.GroupNorm(NORM_GROUPS, widths[-1], **factory)
        self.output_proj = ops.Linear(widths[-1], 2 * config.latent_channels, bias=False, **factory)

    def forward(self, video: Tensor) -> Tensor:
        """Video (B, 3, 6(T - 1) + 1, 8H, 8W) in [-1, 1] to moments (B, 2 * 12, T, H, W): means, then log-variances.

        Pass video in float32 whatever the dtype of the weights; see `fourier_features`.
        """
        proj_in, *blocks_and_stages = self.layers
        features = fourier_features(video).to(self.output_norm.weight.dtype)  # (B, 15, 6T - 5, 8H, 8W)
        x = pointwise(proj_in, features)  # (B, 64, 6T - 5, 8H, 8W)
        for layer in blocks_and_stages:
            x = layer(x)  # stages: (B, 128, 6T - 5, 4H, 4W), (B, 256, 3T - 2, 2H, 2W), (B, 384, T, H, W)
        x = F.silu(frame_norm(self.output_norm, x))  # (B, 384, T, H, W)
        return pointwise(self.output_proj, x)  # (B, 24, T, H, W)
