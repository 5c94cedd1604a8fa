"""AsymmVAE, Mochi 1's autoencoder: 8 x 8 pixels and 6 frames per latent.

Video is (B, 3, F, 8H, 8W) with F = 6(T - 1) + 1, nominally in [-1, 1]; latents are (B, 12, T, H, W) in VAE space (see
latents.py). Both halves are causal in time and stream: memory depends on the frame size, and the result equals that of one
pass over the whole clip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import AsymmVAEConfig
from ..mapped_files import check_mapped_files
from ..ops import Ops
from .decoder import Decoder
from .encoder import Encoder
from .latents import latents_problem, shape_problem
from .layers import RGB
from .memory import decoder_memory_estimate, encoder_memory_estimate, encoder_progress_units
from .plan import CPU, GIB, MemoryEstimate, Plan, free_memory
from .steps import decoder_steps, encoder_steps
from .streaming import OomRetry, OutOfMemory, Step, release_pinned_memory, stream

# Source: diffusers, models/autoencoders/vae.py (DiagonalGaussianDistribution).
LOGVAR_RANGE = (-30.0, 20.0)

OnProgress = Callable[[int, int], object]
"""Called before every step with the frames done and the total; raise an exception in it to stop."""


@dataclass(frozen=True)
class Posterior:
    """Distribution of the latents in VAE space, one Gaussian per value; both tensors are (B, 12, T, H, W)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Split an `Encoder`'s output (B, 2 * 12, T, H, W)."""
        return cls(*moments.chunk(2, dim=1))

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents; the noise is generated on the CPU in float32, so that a seed gives the same on every device."""
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean)
        return self.mean + noise * (0.5 * self.logvar.clamp(*LOGVAR_RANGE)).exp()


class AsymmVAE(nn.Module):
    """Encoder and decoder; either may be missing, as in a file that holds only one.

    `encode` and `decode` stream without gradients; `forward`, `encoder(video)` and `decoder(latents)` are the plain network,
    with gradients and all frames of a layer at once.
    """

    def __init__(
        self,
        config: AsymmVAEConfig = AsymmVAEConfig(),  # noqa: B008 - frozen
        *,
        ops: Ops = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        encoder: bool = True,
        decoder: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, ops=ops, device=device, dtype=dtype) if encoder else None
        self.decoder = Decoder(config, ops=ops, device=device, dtype=dtype) if decoder else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which `encode` and `decode` compute; overridden by a subclass whose layers cast weights."""
        return next(self.parameters()).dtype

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct video (B, 3, 6k + 1, 8H, 8W) in [-1, 1] from the means of its latents; plain, with gradients."""
        means = Posterior.from_moments(self.check_encoder(video)(video)).mean
        return self.check_decoder(means.shape)(means)

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
            memory_limit: bytes to use on the device besides weights and output; None for all that is free. It does not change the
                video; a lower limit is slower, and a few whole frames are held in any case.
            on_progress: called often with the finished and the total frames; raise an exception in it to stop.
            out: write into this tensor, on any device, instead of a new one.
            device: where to compute; by default where the weights are.

        Raises:
            ValueError: the model has no decoder, or `latents` has the wrong shape, an empty dimension or non-finite values.
            OutOfMemory: not even one row of a frame at a time fits.
        """
        self.check_decoder(latents.shape)
        if out is None:
            out = torch.empty(self.decoded_shape(latents.shape), dtype=self.dtype, device=latents.device)
        for i, one in enumerate(latents.split(1)):
            done = 0
            for piece in self.decode_stream(one, memory_limit, _of_one(on_progress, i, len(latents)), device):
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
        """Yield the decoded video in pieces (B, 3, f, 8H, 8W) as they are finished, on the device that computes them.

        Arguments and errors are those of `decode`.
        """
        decoder = self.check_decoder(latents.shape)
        if problem := latents_problem(latents, self.config.latent_channels):
            raise ValueError(problem)
        height, width = latents.shape[3:]
        # For memory, a batch of n is one latent whose values are n times as large.
        estimate = decoder_memory_estimate(self.config, height, width, len(latents) * self.dtype.itemsize)
        on_step = _on_step(on_progress, self.decoded_shape(latents.shape)[2])
        device = device or self._home()
        return _stream_clip(latents.to(self.dtype), decoder_steps(decoder), estimate, memory_limit, on_step, device)

    def encode(
        self,
        video: Tensor,
        memory_limit: int | None = None,
        on_progress: OnProgress | None = None,
        device: torch.device | None = None,
    ) -> Posterior:
        """Video (B, 3, 6k + 1, 8H, 8W) in [-1, 1] to the `Posterior` of its latents, on the device of `video`.

        Arguments are those of `decode`, but `on_progress` also counts the frames before every attention layer. Temporal attention
        needs a layer's features of all frames at once; they are collected in main memory if the device has no room for them.

        Raises:
            ValueError: the model has no encoder, or the video's size does not fit it.
            OutOfMemory: not even one row of a frame at a time fits.
        """
        steps = self.encoder_steps(self.check_encoder(video))
        frames, height, width = video.shape[2:]
        estimate = encoder_memory_estimate(self.config, frames, height, width, self.dtype.itemsize)
        units, parts = encoder_progress_units(self.config, frames), []
        for i, one in enumerate(video.split(1)):
            on_step = _on_step(_of_one(on_progress, i, len(video)), units)
            pieces = _stream_clip(one, steps, estimate, memory_limit, on_step, device or self._home())
            parts.append(torch.cat([piece.to(video.device) for piece in pieces], dim=2))
        return Posterior.from_moments(torch.cat(parts))

    def _home(self) -> torch.device:
        return next(self.parameters()).device

    def encoder_steps(self, encoder: Encoder) -> list[Step]:
        """The steps that `encode` runs a video through."""
        return encoder_steps(encoder, self.dtype)

    def decoded_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int, int]:
        """Shape (B, 3, F, 8H, 8W) of the video decoded from latents (B, 12, T, H, W)."""
        batch, _, latents, height, width = shape
        frames = math.prod(self.config.temporal_expansions) * (latents - 1) + 1
        scale = math.prod(self.config.spatial_expansions)
        return batch, RGB, frames, height * scale, width * scale

    def check_decoder(self, shape: Sequence[int]) -> Decoder:
        """The decoder; ValueError if there is none or latents of that shape do not fit it."""
        if self.decoder is None:
            raise ValueError(
                "This autoencoder has no decoder; load a file that has one, such as mochi_vae.safetensors."
            )
        check_mapped_files(self)
        if problem := shape_problem(shape, self.config.latent_channels):
            raise ValueError(problem)
        return self.decoder

    def check_encoder(self, video: Tensor) -> Encoder:
        """The encoder; ValueError if there is none or `video` does not fit it."""
        if self.encoder is None:
            raise ValueError(
                "This autoencoder has no encoder; load a file that has one, such as mochi_vae.safetensors."
            )
        check_mapped_files(self)
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


def _stream_clip(
    x: Tensor,
    steps: Sequence[Step],
    estimate: MemoryEstimate,
    memory_limit: int | None,
    on_step: Callable[[int], object],
    device: torch.device,
) -> Iterator[Tensor]:
    """Run a clip through the steps and yield pieces of the result in order."""
    limit = free_memory(device) if memory_limit is None else memory_limit
    retry = OomRetry(estimate.choose_plan(limit, device), on_step)
    try:
        yield from stream(steps, [x], retry)
    except OutOfMemory as error:
        needed = estimate.peak_bytes(Plan(device, CPU, 1))
        raise OutOfMemory(_shortage(x.shape, needed, limit, str(error))) from error
    finally:
        if retry.plan.cache_device != device:
            release_pinned_memory()
    on_step(retry.finished)


def _shortage(shape: Sequence[int], needed: int, available: int, reason: str) -> str:
    """Error message for a clip of that shape that did not fit; `needed` and `available` are bytes."""
    request = re.search(r"allocate (\d[\d.]* \w+)", reason)
    asked = f", and {request[1]} could not be allocated" if request else ""
    missing = f", {(needed - available) / GIB:.2f} GiB more than is free" if needed > available else ""
    unit = "pixels" if shape[1] == RGB else "latents"
    return (
        f"Out of memory: frames of {shape[3]} x {shape[4]} {unit} need {needed / GIB:.2f} GiB besides the weights even one row "
        f"at a time{missing}{asked}; make the video smaller or close other programs that use the device."
    )


def _on_step(on_progress: OnProgress | None, units: int) -> Callable[[int], object]:
    """Adapt a caller's `on_progress` to `OomRetry.on_step`, which is called with the frames finished."""
    return (lambda finished: on_progress(finished, units)) if on_progress else (lambda _: None)


def _of_one(on_progress: OnProgress | None, index: int, count: int) -> OnProgress | None:
    """Progress callback for one video of a batch."""
    return on_progress and (lambda done, total: on_progress(index * total + done, count * total))
