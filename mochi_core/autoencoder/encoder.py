"""The half of the autoencoder that makes latents from video. Parameter names are those of Genmo's checkpoints."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import AsymmVAEConfig
from .layers import NORM_GROUPS, ResBlock, block_footprint, frame_norm, strided_conv
from .streaming import Cache, ClipLayer, Footprint, Layer, Plan, by_strips

RGB = 3
FOURIER_EXPONENTS = (6, 7)
FOURIER_CHANNELS = RGB * (1 + 2 * len(FOURIER_EXPONENTS))


def fourier_features(video: Tensor) -> Tensor:
    """(B, 3, F, H, W) to (B, 15, F, H, W), at least in float32: the pixels, then their sines, then their cosines.

    The frequencies 2^6 and 2^7 turns per unit leave nothing of a pixel that was rounded to 16 bits.
    """
    video = video.to(torch.promote_types(video.dtype, torch.float32))
    turns = video.new_tensor([2.0**exponent for exponent in FOURIER_EXPONENTS]) * (2 * math.pi)
    angles = rearrange(video[..., None] * turns, "b c f h w k -> b (c k) f h w")
    return torch.cat((video, angles.sin(), angles.cos()), dim=1)


class Place(NamedTuple):
    """Residual blocks of one width, and what they work on."""

    channels: int
    blocks: int
    attends: bool
    reduction: int
    """Frames that become one after these blocks."""
    cells: int
    """Values of one channel of one frame."""
    frames: int


class EncoderStage(nn.Module):
    """A strided convolution, then residual blocks."""

    def __init__(
        self, channels: tuple[int, int], reduction: tuple[int, int], num_blocks: int, head_dim: int | None, *,
        ops: Any, **factory: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        kernel = (reduction[0], reduction[1], reduction[1])
        down = ops.Conv3d(*channels, kernel_size=kernel, stride=kernel, **factory)
        blocks = (ResBlock(channels[1], head_dim, ops=ops, **factory) for _ in range(num_blocks))
        self.layers = nn.ModuleList([down, *blocks])

    def flattened(self) -> list[Layer | ClipLayer]:
        _, *blocks = self.layers
        return [Layer(self.reduce), *(layer for block in blocks for layer in block.flattened())]  # pyright: ignore[reportCallIssue]

    def reduce(self, x: Tensor, cache: Cache, plan: Plan) -> tuple[Tensor, Cache]:
        down = self.layers[0]
        x, past = strided_conv(down, x, cache[0] if cache else None, plan)  # pyright: ignore[reportArgumentType]
        return x, (past,)


class Encoder(nn.Module):
    def __init__(self, config: AsymmVAEConfig, *, ops: Any, dtype: torch.dtype, **factory: Any) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        factory["dtype"] = dtype
        widths, counts = config.encoder_channels, config.encoder_blocks
        head_dims = [config.attention_head_dim if has else None for has in config.encoder_attention]
        reductions = zip(config.temporal_reductions, config.spatial_reductions, strict=True)

        def blocks(width: int, place: int) -> list[ResBlock]:
            return [ResBlock(width, head_dims[place], ops=ops, **factory) for _ in range(counts[place])]

        stages = [
            EncoderStage((widths[i], widths[i + 1]), reduction, counts[i + 1], head_dims[i + 1], ops=ops, **factory)
            for i, reduction in enumerate(reductions)
        ]
        first = ops.Linear(FOURIER_CHANNELS, widths[0], **factory)
        self.layers = nn.ModuleList([first, *blocks(widths[0], 0), *stages, *blocks(widths[-1], -1)])
        self.output_norm = ops.GroupNorm(NORM_GROUPS, widths[-1], **factory)
        self.output_proj = ops.Linear(widths[-1], 2 * config.latent_channels, bias=False, **factory)

    def flattened(self) -> list[Layer | ClipLayer]:
        """Video (B, 3, F, 8H, 8W), at least in float32, to mean and log-variance, (B, 2 * 12, T, H, W)."""
        _, *layers = self.layers
        inner = [flat for layer in layers for flat in layer.flattened()]  # pyright: ignore[reportCallIssue]
        return [Layer(self._enter, self.config.encoder_channels[0] / RGB), *inner, Layer(self._leave)]

    def _enter(self, x: Tensor, _: Cache, plan: Plan) -> tuple[Tensor, Cache]:
        def embedded(rows: slice) -> Tensor:
            features = fourier_features(x[..., rows, :]).to(self.dtype)
            return self.layers[0](features.movedim(1, -1)).movedim(-1, 1)

        return by_strips(plan.strips(x, self.config.encoder_channels[0] / RGB), embedded), ()

    def _leave(self, x: Tensor, _: Cache, plan: Plan) -> tuple[Tensor, Cache]:
        strips = plan.strips(x)
        normed = frame_norm(self.output_norm, x, strips)

        def moments(rows: slice) -> Tensor:
            return self.output_proj(F.silu(normed(rows)).movedim(1, -1)).movedim(-1, 1)

        return by_strips(strips, moments), ()

    def footprint(self, frames: int, height: int, width: int, itemsize: int) -> Footprint:
        """Of a video; a clip that gathers for temporal attention grows with its length."""
        cached = widest = waiting = gathered = 0
        for place in self._places(frames, height, width):
            frame = place.channels * place.cells
            # Where a clip gathers behind every block, the caches of the block before are gone.
            cached, widest = cached + (1 if place.attends else place.blocks) * frame, max(widest, frame)
            waiting, gathered = waiting + place.reduction * frame, max(gathered, place.attends * frame * place.frames)
        convolutions = block_footprint(cached, widest, waiting, itemsize)
        return convolutions._replace(caches=convolutions.caches + gathered * itemsize)

    def work(self, frames: int) -> int:
        """Frames in front of all layers that see the whole clip, and latent frames at the end."""
        places = self._places(frames, 1, 1)
        return sum(place.blocks * place.attends * place.frames for place in places) + places[-1].frames

    def _places(self, frames: int, height: int, width: int) -> list[Place]:
        config, places, cells = self.config, [], height * width
        widths = (*config.encoder_channels, config.encoder_channels[-1])
        reductions = (*config.temporal_reductions, 1, 1), (*config.spatial_reductions, 1, 1)
        rows = zip(widths, config.encoder_blocks, config.encoder_attention, *reductions, strict=True)
        for channels, blocks, attends, time, space in rows:
            places.append(Place(channels, blocks, attends, time, cells, frames))
            cells, frames = cells // space**2, (frames - 1) // time + 1
        return places
