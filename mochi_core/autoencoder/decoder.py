"""The half of the autoencoder that makes video from latents. Parameter names are those of Genmo's checkpoints."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import AsymmVAEConfig
from .layers import ResBlock, block_footprint
from .streaming import Cache, Footprint, Layer, Plan, by_strips

RGB = 3


class DecoderStage(nn.Module):
    """Residual blocks, then a projection whose channels unfold into time and space."""

    def __init__(
        self, channels: tuple[int, int], num_blocks: int, expansion: tuple[int, int], *, ops: Any, **factory: Any
    ) -> None:
        super().__init__()
        self.temporal_expansion, self.spatial_expansion = expansion
        unfolded = channels[1] * self.temporal_expansion * self.spatial_expansion**2
        self.growth = unfolded / channels[0]
        self.blocks = nn.ModuleList(ResBlock(channels[0], ops=ops, **factory) for _ in range(num_blocks))
        self.proj = ops.Linear(channels[0], unfolded, **factory)

    def flattened(self) -> list[Layer]:
        return [*(Layer(block) for block in self.blocks), Layer(self.unfold, self.growth)]

    def unfold(self, x: Tensor, cache: Cache, plan: Plan) -> tuple[Tensor, Cache]:
        s = self.spatial_expansion

        def unfolded(rows: Tensor) -> Tensor:
            pattern = "b t h w (c st sh sw) -> b c (t st) (h sh) (w sw)"
            return rearrange(self.proj(rows.movedim(1, -1)), pattern, st=self.temporal_expansion, sh=s, sw=s)

        x = by_strips(plan.strips(x, self.growth), lambda rows: unfolded(x[..., rows, :]), scale=s)
        # The first latent frame holds one video frame: what the others unfold into, it has too much.
        return (x[:, :, self.temporal_expansion - 1 :] if cache is None else x), ()


class Decoder(nn.Module):
    def __init__(self, config: AsymmVAEConfig, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.config = config
        widths, counts = config.decoder_channels, config.decoder_blocks
        expansions = zip(config.temporal_expansions, config.spatial_expansions, strict=True)
        first = ops.Conv3d(config.latent_channels, widths[0], kernel_size=1, **factory)
        head = nn.ModuleList([first, *(ResBlock(widths[0], ops=ops, **factory) for _ in range(counts[0]))])
        stages = [
            DecoderStage((widths[i], widths[i + 1]), counts[i + 1], expansion, ops=ops, **factory)
            for i, expansion in enumerate(expansions)
        ]
        tail = nn.ModuleList(ResBlock(widths[-1], ops=ops, **factory) for _ in range(counts[-1]))
        self.blocks = nn.ModuleList([head, *stages, tail])
        self.output_proj = ops.Linear(widths[-1], RGB, **factory)

    def flattened(self) -> list[Layer]:
        """Latents (B, 12, T, H, W) to video (B, 3, F, 8H, 8W)."""
        (_, *head), *stages, tail = self.blocks  # pyright: ignore[reportGeneralTypeIssues]
        return [
            Layer(self._enter, self.config.decoder_channels[0] / self.config.latent_channels),
            *(Layer(block) for block in head),
            *(layer for stage in stages for layer in stage.flattened()),  # pyright: ignore[reportCallIssue]
            *(Layer(block) for block in tail),  # pyright: ignore[reportGeneralTypeIssues]
            Layer(self._leave),
        ]

    def _enter(self, x: Tensor, _: Cache, plan: Plan) -> tuple[Tensor, Cache]:
        first = self.blocks[0][0]  # pyright: ignore[reportIndexIssue]
        growth = self.config.decoder_channels[0] / self.config.latent_channels
        return by_strips(plan.strips(x, growth), lambda rows: first(x[..., rows, :])), ()

    def _leave(self, x: Tensor, _: Cache, plan: Plan) -> tuple[Tensor, Cache]:
        def pixels(rows: Tensor) -> Tensor:
            return self.output_proj(F.silu(rows).movedim(1, -1)).movedim(-1, 1)

        return by_strips(plan.strips(x), lambda rows: pixels(x[..., rows, :])), ()

    def footprint(self, height: int, width: int, itemsize: int) -> Footprint:
        """Of latents with `height` rows and `width` columns, whatever their number."""
        config, cells = self.config, height * width
        head, *counts = config.decoder_blocks
        cached, widest, waiting = head * config.decoder_channels[0] * cells, 0, 0
        expansions = (1, *config.temporal_expansions), (*config.spatial_expansions, 1)
        for channels, count, time, space in zip(config.decoder_channels, counts, *expansions, strict=True):
            frame = channels * cells
            cached, widest, waiting = cached + count * frame, max(widest, frame), waiting + time * frame
            cells *= space**2
        return block_footprint(cached, widest, waiting, itemsize)
