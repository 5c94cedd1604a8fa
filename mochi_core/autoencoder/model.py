"""AsymmVAE, the autoencoder of Mochi 1: 8 x 8 pixels and 6 frames per latent.

Video is (B, 3, F, 8H, 8W) with F = 6(T - 1) + 1, nominally in [-1, 1]; latents are (B, 12, T, H, W) in VAE space (see
latents.py). Both halves are causal in time and stream: memory depends on the size of a frame, and the result equals that
of one pass over the whole clip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AsymmVAEConfig
from .decoder import Decoder
from .encoder import RGB, Encoder
from .streaming import CPU, GIB, ClipLayer, Footprint, Layer, Layers, OutOfMemory, Plan, Runner, free_memory, stream

LOGVAR_RANGE = (-30.0, 20.0)

OnProgress = Callable[[int, int], object]
"""Called with the work done and the whole of it, in frames, before every layer; what it raises ends the work."""


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

    def decode(
        self,
        latents: Tensor,
        memory_limit: int | None = None,
        on_progress: OnProgress | None = None,
        *,
        out: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Latents (B, 12, T, H, W) to video (B, 3, 6(T - 1) + 1, 8H, 8W), not clamped, on the device of `latents`.

        Args:
            memory_limit: bytes to use on the device besides weights and output; None for what is free. The video is the same
                with any; less is slower, and some whole frames are held in any case.
            on_progress: called often, with finished and all frames; what it raises ends the decode.
            out: write into this tensor, on any device, instead of a new one.
            device: where to work; by default where the weights are.

        Raises:
            ValueError: the model has no decoder, or `latents` has another shape.
            OutOfMemory: not even one row of a frame at a time fits.
        """
        self.check_decoder(latents.shape)
        if out is None:
            out = torch.empty(self.decoded_shape(latents.shape), dtype=self.dtype, device=latents.device)
        for i, one in enumerate(latents.split(1)):
            done = 0
            for piece in self.decode_stream(one, memory_limit, _part(on_progress, i, len(latents)), device):
                out[i : i + 1, :, done : done + piece.shape[2]] = piece
                done += piece.shape[2]
        return out

    def decode_stream(
        self,
        latents: Tensor,
        memory_limit: int | None = None,
        on_progress: OnProgress | None = None,
        device: torch.device | None = None,
    ) -> Iterator[Tensor]:
        """As `decode`, but yields (B, 3, f, 8H, 8W) pieces as they are finished, on the device where it works."""
        decoder = self.check_decoder(latents.shape)
        height, width = latents.shape[3:]
        footprint = decoder.footprint(height, width, len(latents) * self.dtype.itemsize)
        work = self.decoded_shape(latents.shape)[2]
        job = Job(latents.to(self.dtype), footprint, work, memory_limit, device or self._home())
        return job.run(decoder.flattened(), on_progress)

    def encode(
        self,
        video: Tensor,
        memory_limit: int | None = None,
        on_progress: OnProgress | None = None,
        device: torch.device | None = None,
    ) -> Posterior:
        """Video (B, 3, 6k + 1, 8H, 8W) in [-1, 1] to the `Posterior` of its latents, on the device of `video`.

        The arguments are those of `decode`. Attention in time needs the features of all frames of one layer at a time; they
        gather in main memory if the device has no room for them.

        Raises:
            ValueError: the model has no encoder, or the video's size does not fit it.
            OutOfMemory: not even one row of a frame at a time fits.
        """
        self.check_encoder(video)
        parts = []
        for i, one in enumerate(video.split(1)):
            pieces = self._encode_stream(one, memory_limit, _part(on_progress, i, len(video)), device or self._home())
            parts.append(torch.cat([piece.to(video.device) for piece in pieces], dim=2))
        return Posterior(*torch.cat(parts).chunk(2, dim=1))

    def _encode_stream(
        self, video: Tensor, memory_limit: int | None, on_progress: OnProgress | None, device: torch.device
    ) -> Iterator[Tensor]:
        encoder = self.check_encoder(video)
        frames, height, width = video.shape[2:]
        footprint = encoder.footprint(frames, height, width, self.dtype.itemsize)
        job = Job(video, footprint, encoder.work(frames), memory_limit, device)
        return job.run(self.encoder_layers(encoder), on_progress)

    def _home(self) -> torch.device:
        return next(self.parameters()).device

    def encoder_layers(self, encoder: Encoder) -> list[Layer | ClipLayer]:
        """What `encode` sends a video through."""
        return encoder.flattened()

    def decoded_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int, int]:
        """(B, 3, F, 8H, 8W) of the video of latents (B, 12, T, H, W)."""
        batch, _, latents, height, width = shape
        frames = math.prod(self.config.temporal_expansions) * (latents - 1) + 1
        scale = math.prod(self.config.spatial_expansions)
        return batch, RGB, frames, height * scale, width * scale

    def check_decoder(self, shape: Sequence[int]) -> Decoder:
        """The decoder, if there is one and latents of that shape fit it; ValueError otherwise."""
        if self.decoder is None:
            raise ValueError(
                "This autoencoder has no decoder; load a file that has one, such as mochi_vae.safetensors."
            )
        channels = self.config.latent_channels
        if len(shape) != 5 or shape[1] != channels:
            raise ValueError(f"latents have shape {tuple(shape)}; the decoder needs (batch, {channels}, T, H, W).")
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


@dataclass(frozen=True)
class Job:
    """A clip on its way through one half of the autoencoder."""

    x: Tensor
    footprint: Footprint
    work: int
    """In frames."""
    memory_limit: int | None
    device: torch.device

    def run(self, layers: Layers, on_progress: OnProgress | None) -> Iterator[Tensor]:
        """Pieces of what the layers make of the clip, in order."""
        limit = free_memory(self.device) if self.memory_limit is None else self.memory_limit
        report = on_progress or (lambda *_: None)
        runner = Runner(self.footprint.plan(limit, self.device), lambda finished: report(finished, self.work))
        try:
            yield from stream(layers, [self.x], runner)
        except OutOfMemory as error:
            raise OutOfMemory(self._shortage(limit, str(error))) from error
        report(self.work, self.work)

    def _shortage(self, available: int, reason: str) -> str:
        request = re.search(r"allocate (\d[\d.]* \w+)", reason)
        asked = f", and {request[1]} could not be had" if request else ""
        needed, (height, width) = self.footprint.needs(Plan(self.device, CPU, 1)), self.x.shape[3:]
        missing = f", {(needed - available) / GIB:.2f} GiB more than there is" if needed > available else ""
        unit = "pixels" if self.x.shape[1] == RGB else "latents"
        return (
            f"Out of memory: frames of {height} x {width} {unit} need {needed / GIB:.2f} GiB besides the weights even one row "
            f"at a time{missing}{asked}; make the video smaller or close what else uses the device."
        )


def _part(on_progress: OnProgress | None, index: int, count: int) -> OnProgress | None:
    """Progress of one video of several."""
    return on_progress and (lambda done, total: on_progress(index * total + done, count * total))
