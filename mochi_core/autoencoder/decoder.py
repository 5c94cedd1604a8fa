"""The decoder half of the autoencoder: latents to video. Parameter names are those of Genmo's checkpoints."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import AsymmVAEConfig
from ..ops import Ops
from .layers import RGB, ResBlock, pointwise


class DecoderStage(nn.Module):
    """Residual blocks, then a projection whose channels unfold into time and space."""

    def __init__(
        self, channels: tuple[int, int], num_blocks: int, expansion: tuple[int, int], *, ops: Ops, **factory: Any
    ) -> None:
        super().__init__()
        self.temporal_expansion, self.spatial_expansion = expansion
        unfolded = channels[1] * self.temporal_expansion * self.spatial_expansion**2
        self.expansion = unfolded / channels[0]  # output values of the projection per input value
        self.blocks = nn.Sequential(*(ResBlock(channels[0], ops=ops, **factory) for _ in range(num_blocks)))
        self.proj = ops.Linear(channels[0], unfolded, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, C', t(T - 1) + 1, sH, sW), where t and s are the temporal and spatial expansions."""
        x = self.blocks(x)  # (B, C, T, H, W)
        x = self.unfold(x)  # (B, C', tT, sH, sW)
        return x[:, :, self.surplus :]  # (B, C', t(T - 1) + 1, sH, sW)

    def unfold(self, x: Tensor) -> Tensor:
        """Project, then move channels into time and space: (B, C, T, H, W) to (B, C', tT, sH, sW)."""
        t, s = self.temporal_expansion, self.spatial_expansion
        pattern = "b t h w (c st sh sw) -> b c (t st) (h sh) (w sw)"
        return rearrange(self.proj(x.movedim(1, -1)), pattern, st=t, sh=s, sw=s)

    @property
    def surplus(self) -> int:
        """Frames to drop at the start of a clip: the first latent frame stands for one video frame alone."""
        return self.temporal_expansion - 1


class Decoder(nn.Module):
    """Latents to video, plain and differentiable; `AsymmVAE.decode` gives the same result in bounded memory."""

    def __init__(self, config: AsymmVAEConfig, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.config = config
        widths, counts = config.decoder_channels, config.decoder_blocks
        expansions = zip(config.temporal_expansions, config.spatial_expansions, strict=True)
        conv_in = ops.Conv3d(config.latent_channels, widths[0], kernel_size=1, **factory)
        head = nn.Sequential(conv_in, *(ResBlock(widths[0], ops=ops, **factory) for _ in range(counts[0])))
        stages = [
            DecoderStage((widths[i], widths[i + 1]), counts[i + 1], expansion, ops=ops, **factory)
            for i, expansion in enumerate(expansions)
        ]
        tail = nn.Sequential(*(ResBlock(widths[-1], ops=ops, **factory) for _ in range(counts[-1])))
        self.blocks = nn.ModuleList([head, *stages, tail])
        self.output_proj = ops.Linear(widths[-1], RGB, **factory)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, 12, T, H, W) in VAE space to video (B, 3, 6(T - 1) + 1, 8H, 8W), not clamped."""
        head, *stages, tail = self.blocks
        x = head(latents)  # (B, 768, T, H, W)
        for stage in stages:
            x = stage(x)  # (B, 512, 3T - 2, 2H, 2W), (B, 256, 6T - 5, 4H, 4W), (B, 128, 6T - 5, 8H, 8W)
        x = F.silu(tail(x))  # (B, 128, 6T - 5, 8H, 8W)
        return pointwise(self.output_proj, x)  # (B, 3, 6T - 5, 8H, 8W)
