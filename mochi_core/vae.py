"""AsymmVAE, the autoencoder of Mochi 1: 8 x 8 pixels and 6 frames per latent.

Module and parameter names are those of Genmo's checkpoints. Video is (B, 3, F, 8H, 8W) with F = 6(T - 1) + 1, nominally in
[-1, 1]; latents are (B, 12, T, H, W) in VAE space (see latents.py).

The decoder is causal in time, so `decode` streams: frames pass through in small groups, every convolution carries its last
two input frames to the next group, and the result equals that of one pass over the whole clip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .causal import NORM_GROUPS, ResBlock, ResBlockCache, causal_conv, frame_norm
from .config import AsymmVAEConfig

RGB = 3
FOURIER_EXPONENTS = (6, 7)
FOURIER_CHANNELS = RGB * (1 + 2 * len(FOURIER_EXPONENTS))
LOGVAR_RANGE = (-30.0, 20.0)
# One latent frame's worth: fewer frames are slower (weights are read anew for each group), more cost memory.
FRAMES_AT_ONCE = 6

StageCache = list[ResBlockCache] | None


def res_blocks(blocks: nn.ModuleList | list[nn.Module], x: Tensor, cache: StageCache) -> tuple[Tensor, StageCache]:
    """Run residual blocks one after the other."""
    caches = []
    for i, block in enumerate(blocks):
        x, block_cache = block(x, cache[i] if cache else None)
        caches.append(block_cache)
    return x, caches


class DecoderStage(nn.Module):
    """Residual blocks, then a projection whose channels unfold into time and space."""

    def __init__(
        self, channels: tuple[int, int], num_blocks: int, expansion: tuple[int, int], *, ops: Any, **factory: Any
    ) -> None:
        super().__init__()
        self.temporal_expansion, self.spatial_expansion = expansion
        unfolded = channels[1] * self.temporal_expansion * self.spatial_expansion**2
        self.blocks = nn.ModuleList(ResBlock(channels[0], ops=ops, **factory) for _ in range(num_blocks))
        self.proj = ops.Linear(channels[0], unfolded, **factory)

    def forward(self, x: Tensor, cache: StageCache) -> tuple[Tensor, StageCache]:
        starts_clip = cache is None
        x, cache = res_blocks(self.blocks, x, cache)
        s = self.spatial_expansion
        pattern = "b t h w (c st sh sw) -> b c (t st) (h sh) (w sw)"
        x = rearrange(self.proj(x.movedim(1, -1)), pattern, st=self.temporal_expansion, sh=s, sw=s)
        # The first latent frame holds one video frame: what the others unfold into, it has too much.
        return (x[:, :, self.temporal_expansion - 1 :] if starts_clip else x), cache


class Decoder(nn.Module):
    def __init__(self, config: AsymmVAEConfig, *, ops: Any, **factory: Any) -> None:
        super().__init__()
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

    def stream(self, latents: Tensor, frames_at_once: int) -> Iterator[Tensor]:
        """Decode (B, 12, T, H, W) and yield (B, 3, f, 8H, 8W) pieces in order.

        Every stage takes at most `frames_at_once` frames, and hands them on before it takes the next, so the wide
        activations near the pixels exist for a few frames only.
        """
        yield from self._stream(latents, [None] * len(self.blocks), 0, frames_at_once)

    def _stream(self, x: Tensor, caches: list[StageCache], stage: int, frames_at_once: int) -> Iterator[Tensor]:
        if stage == len(self.blocks):
            yield self.output_proj(F.silu(x).movedim(1, -1)).movedim(-1, 1)
            return
        for frames in x.split(frames_at_once, dim=2):
            out, caches[stage] = self._stage(stage, frames, caches[stage])
            yield from self._stream(out, caches, stage + 1, frames_at_once)

    def _stage(self, stage: int, x: Tensor, cache: StageCache) -> tuple[Tensor, StageCache]:
        blocks = self.blocks[stage]
        if isinstance(blocks, DecoderStage):
            return blocks(x, cache)
        assert isinstance(blocks, nn.ModuleList)
        if stage == 0:
            return res_blocks(list(blocks)[1:], blocks[0](x), cache)
        return res_blocks(blocks, x, cache)


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

    def forward(self, x: Tensor) -> Tensor:
        down, *blocks = self.layers
        x, _ = causal_conv(down, x, None)  # pyright: ignore[reportArgumentType]
        return res_blocks(blocks, x, None)[0]


class Encoder(nn.Module):
    def __init__(self, config: AsymmVAEConfig, *, ops: Any, **factory: Any) -> None:
        super().__init__()
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

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Fourier features (B, 15, F, 8H, 8W) to mean and log-variance, each (B, 12, T, H, W)."""
        first, *layers = self.layers
        x = first(features.movedim(1, -1)).movedim(-1, 1)  # (B, C, F, 8H, 8W)
        for layer in layers:
            x = layer(x)[0] if isinstance(layer, ResBlock) else layer(x)  # (B, C, T, H, W) in the end
        x = F.silu(frame_norm(self.output_norm, x))
        mean, logvar = self.output_proj(x.movedim(1, -1)).movedim(-1, 1).chunk(2, dim=1)
        return mean, logvar


def fourier_features(video: Tensor) -> Tensor:
    """(B, 3, F, H, W) to (B, 15, F, H, W), at least in float32: the pixels, then their sines, then their cosines.

    The frequencies 2^6 and 2^7 turns per unit leave nothing of a pixel that was rounded to 16 bits.
    """
    video = video.to(torch.promote_types(video.dtype, torch.float32))
    turns = video.new_tensor([2.0**exponent for exponent in FOURIER_EXPONENTS]) * (2 * math.pi)
    angles = rearrange(video[..., None] * turns, "b c f h w k -> b (c k) f h w")
    return torch.cat((video, angles.sin(), angles.cos()), dim=1)


@dataclass(frozen=True)
class Posterior:
    """What the encoder knows of the latents, in VAE space: a Gaussian per value."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents; the noise is made on the CPU in float32, so that a seed means the same on every device."""
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean)
        return self.mean + noise * (0.5 * self.logvar.clamp(*LOGVAR_RANGE)).exp()


class AsymmVAE(nn.Module):
    """Encoder and decoder; a file may bring only one of them."""

    def __init__(
        self,
        config: AsymmVAEConfig = AsymmVAEConfig(),  # noqa: B008 - frozen
        *,
        ops: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        encoder: bool = True,
        decoder: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype or torch.get_default_dtype()
        factory = {"ops": ops, "device": device, "dtype": dtype}
        self.encoder = Encoder(config, **factory) if encoder else None
        self.decoder = Decoder(config, **factory) if decoder else None

    def decode(self, latents: Tensor, *, frames_at_once: int = FRAMES_AT_ONCE) -> Tensor:
        """Latents (B, 12, T, H, W) to video (B, 3, 6(T - 1) + 1, 8H, 8W), not clamped, on the device of `latents`.

        Raises:
            ValueError: the model has no decoder, or `latents` has another shape.
        """
        pieces = [piece.to(latents.device) for piece in self.decode_stream(latents, frames_at_once=frames_at_once)]
        return torch.cat(pieces, dim=2)

    def decode_stream(self, latents: Tensor, *, frames_at_once: int = FRAMES_AT_ONCE) -> Iterator[Tensor]:
        """As `decode`, but yields (B, 3, f, 8H, 8W) pieces as they are finished, on the device of the model."""
        decoder = self.check_decoder(latents)
        device = next(decoder.parameters()).device
        return decoder.stream(latents.to(device, self.dtype), frames_at_once)

    def encode(self, video: Tensor) -> Posterior:
        """Video (B, 3, 6k + 1, 8H, 8W) in [-1, 1] to the `Posterior` of its latents, on the device of `video`.

        Raises:
            ValueError: the model has no encoder, or the video's size does not fit it.
        """
        encoder = self.check_encoder(video)
        device = next(encoder.parameters()).device
        mean, logvar = encoder(fourier_features(video.to(device)).to(self.dtype))
        return Posterior(mean.to(video.device), logvar.to(video.device))

    def check_decoder(self, latents: Tensor) -> Decoder:
        """The decoder, if there is one and `latents` fit it; ValueError otherwise."""
        if self.decoder is None:
            raise ValueError(
                "This autoencoder has no decoder; load a file that has one, such as mochi_vae.safetensors."
            )
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; the decoder needs (batch, {channels}, T, H, W)."
            )
        return self.decoder

    def check_encoder(self, video: Tensor) -> Encoder:
        """The encoder, if there is one and `video` fits it; ValueError otherwise."""
        if self.encoder is None:
            raise ValueError(
                "This autoencoder has no encoder; load a file that has one, such as mochi_vae.safetensors."
            )
        if video.ndim != 5 or video.shape[1] != RGB:
            raise ValueError(
                f"video has shape {tuple(video.shape)}; the encoder needs (batch, 3, frames, height, width)."
            )
        frames, height, width = video.shape[2:]
        temporal, spatial = math.prod(self.config.temporal_reductions), math.prod(self.config.spatial_reductions)
        if frames % temporal != 1 % temporal:
            raise ValueError(f"video has {frames} frames; the encoder needs {temporal}k + 1, such as {temporal + 1}.")
        if height % spatial or width % spatial:
            raise ValueError(f"video is {width} x {height} pixels; the encoder needs multiples of {spatial}.")
        return self.encoder
