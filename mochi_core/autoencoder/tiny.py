"""TAEM1, Ollin Boer Bohan's tiny autoencoder for Mochi 1 (madebyollin/taem1, MIT): the decoder, for previews.

It imitates Mochi's decoder with 9.8 million weights instead of 362 million, so its videos are only approximate. Names and
arithmetic are those of taem1.py in its repository: frames are convolved one by one, and a `MemoryBlock` also sees its input
for the previous frame. The network takes latents in DiT space and returns pixels in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TinyVAEConfig
from ..geometry import latents_to_frames
from ..ops import Ops
from .latents import latents_problem, normalize_latents

BOUND = 3.0
"""Latents are limited to (-BOUND, BOUND) by a hyperbolic tangent: `Clamp` in taem1.py."""
FIRST_FRAMES = 5
"""Frames dropped from those of the first latent: it stands for one frame, but the decoder makes six per latent."""


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / BOUND) * BOUND


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the previous one, with a residual connection."""

    def __init__(self, width: int, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            ops.Conv2d(2 * width, width, 3, padding=1, **factory),
            nn.ReLU(),
            ops.Conv2d(width, width, 3, padding=1, **factory),
            nn.ReLU(),
            ops.Conv2d(width, width, 3, padding=1, **factory),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """`x` and the previous frame of each, both (frames, width, H, W), to the same shape."""
        return torch.relu(self.conv(torch.cat((x, past), dim=1)) + x)


class TimeGrowth(nn.Module):
    """A 1x1 convolution that turns each frame into `factor` frames."""

    def __init__(self, width: int, factor: int, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.conv = ops.Conv2d(width, factor * width, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(frames, width, H, W) to (factor * frames, width, H, W)."""
        return self.conv(x).unflatten(1, (-1, x.shape[1])).flatten(0, 1)


class TinyDecoder(nn.Module):
    """The decoder of TAEM1."""

    def __init__(
        self,
        config: TinyVAEConfig = TinyVAEConfig(),  # noqa: B008 - frozen
        *,
        ops: Ops = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = config.decoder_channels
        layers: list[nn.Module] = [
            Clamp(),
            ops.Conv2d(config.latent_channels, widths[0], 3, padding=1, **factory),
            nn.ReLU(),
        ]
        for width, following, growth in zip(widths[:-1], widths[1:], config.temporal_expansions, strict=True):
            layers += [MemoryBlock(width, ops=ops, **factory) for _ in range(config.blocks)]
            layers += [nn.Upsample(scale_factor=2), TimeGrowth(width, growth, ops=ops, **factory)]
            layers.append(ops.Conv2d(width, following, 3, padding=1, bias=False, **factory))
        layers += [nn.ReLU(), ops.Conv2d(widths[-1], 3, 3, padding=1, **factory)]
        self.decoder = nn.Sequential(*layers)
        self.last_memory = max(i for i, layer in enumerate(layers) if isinstance(layer, MemoryBlock))
        """Index of the last layer that sees frames other than its own."""

    def decoded_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(B, 12, T, H, W) to (B, 3, 6 * (T - 1) + 1, 8 * H, 8 * W)."""
        batch, _, num_latents, height, width = shape
        return batch, 3, latents_to_frames(num_latents), 8 * height, 8 * width

    @torch.no_grad()
    def decode(self, latents: Tensor, on_progress: Callable[[int, int], object] = lambda *_: None) -> Tensor:
        """VAE-space latents (B, 12, T, H, W) to video (B, 3, F, 8 * H, 8 * W), float32 in about [0, 1], on their device.

        Decodes one latent frame at a time: memory beyond the video itself does not grow with its length.

        Raises:
            ValueError: these are not Mochi latents.
        """
        if problem := latents_problem(latents):
            raise ValueError(problem)
        dtype = next(self.parameters()).dtype
        frames = normalize_latents(latents).to(dtype).transpose(1, 2)  # (B, T, 12, H, W)
        video = torch.empty(self.decoded_shape(latents.shape), device=latents.device)
        for b, clip in enumerate(frames):
            pasts: dict[int, Tensor] = {}
            for t in range(len(clip)):
                made = self._decode_frames(clip[t : t + 1], pasts).transpose(0, 1)  # (3, 6, 8 * H, 8 * W)
                start = latents_to_frames(t) if t else 0
                video[b, :, start : latents_to_frames(t + 1)] = made if t else made[:, FIRST_FRAMES:]
                on_progress(b * len(clip) + t + 1, len(frames) * len(clip))
        return video

    @torch.no_grad()
    def last_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """For each frame of DiT-space latents (12, T, H, W), its last video frame, (3, 8 * H, 8 * W) in about [0, 1].

        The other five are skipped once no later layer needs them, which is where frames are largest.
        """
        pasts: dict[int, Tensor] = {}
        for frame in latents.to(next(self.parameters()).dtype).unbind(1):
            yield self._decode_frames(frame[None], pasts, last_only=True)[0]

    def _decode_frames(self, x: Tensor, pasts: dict[int, Tensor], last_only: bool = False) -> Tensor:
        """Latent frames (t, 12, H, W) to (6 * t, 3, 8 * H, 8 * W), or the last of them; updates `pasts`.

        `pasts` maps the index of each memory block to its last input frame.
        """
        for i, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                before = pasts.get(i, torch.zeros_like(x[:1]))
                pasts[i] = x[-1:]
                x = layer(x, torch.cat((before, x[:-1])))
            else:
                x = layer(x)
            if last_only and i >= self.last_memory:
                x = x[-1:]
        return x
