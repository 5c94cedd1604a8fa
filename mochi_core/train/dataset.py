"""Prepared clips: one safetensors file each, with the outputs of the autoencoder and the text encoder.

The batch of a step depends only on the seed and the step, so that an interrupted training resumes with the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..autoencoder.latents import normalize_latents
from ..autoencoder.model import Posterior
from ..checkpoints import LazyTensor, from_state_dict, open_checkpoint
from ..checkpoints.formats.writer import write_safetensors
from .levels import draw_levels

SUFFIX = ".safetensors"
NAMES = {"mean", "logvar", "embeds"}
Example = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""(latents, embeds, mask, sigma, noise), the arguments of `velocity_loss`."""
# Separate streams of random numbers for the order of the clips and for the noise.
ORDER, NOISE = 0, 1


@dataclass(frozen=True)
class Clip:
    """One prepared clip; nothing is read before it is used."""

    mean: LazyTensor
    """(12, T, H, W) in VAE space, as is `logvar`."""
    logvar: LazyTensor
    embeds: LazyTensor
    """(valid tokens, text_width) text features."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mean.shape


def write_clip(path: Path, posterior: Posterior, embeds: Tensor, notes: dict[str, str]) -> None:
    """Write one clip; `posterior` has a batch of one, `embeds` is (valid tokens, text_width)."""
    tensors = {"mean": posterior.mean[0].cpu(), "logvar": posterior.logvar[0].cpu(), "embeds": embeds.cpu()}
    write_safetensors(path, from_state_dict(tensors), notes)


def open_dataset(folder: Path, text_width: int) -> list[Clip]:
    """The clips in a folder filled by `prepare`.

    Raises:
        ValueError: there are none, or they are for a model with another text encoder.
    """
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        raise ValueError(f"There are no clips in {folder}; make them with: python -m mochi_core.train prepare.")
    return [_open_clip(path, text_width) for path in paths]


def _open_clip(path: Path, text_width: int) -> Clip:
    tensors = open_checkpoint(path).tensors
    if set(tensors) != NAMES:
        raise ValueError(f"{path} is not a clip; keep only files written by `prepare` in a dataset's folder.")
    clip = Clip(**tensors)
    if clip.embeds.shape[1] != text_width:
        raise ValueError(
            f"{path} was prepared with a text encoder of width {clip.embeds.shape[1]}, but the transformer takes "
            f"{text_width}; prepare it with the transformer's own."
        )
    return clip


def batch_at(clips: Sequence[Clip], batch_size: int, seed: int, index: int) -> list[Clip]:
    """Batch number `index` since training began; all its clips have the same size.

    In every epoch, each clip occurs once, in a new order; if the clips of a size do not fill the last batch, it is smaller.
    """
    sizes = [[clip for clip in clips if clip.shape == shape] for shape in sorted({clip.shape for clip in clips})]
    round_length = sum(-(-len(group) // batch_size) for group in sizes)
    rng = np.random.default_rng((seed, ORDER, index // round_length))
    batches = []
    for group in sizes:
        shuffled = [group[i] for i in rng.permutation(len(group))]
        batches += [shuffled[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return batches[rng.permutation(round_length)[index % round_length]]


def example(clips: Sequence[Clip], caption_dropout: float, seed: int, index: int, frame_levels: float = 0.0) -> Example:
    """Draw latents, noise levels, noise and dropped captions for a batch; `index` as for `batch_at`.

    `frame_levels` is the fraction of clips with per-frame noise levels; above 0 the levels are (B, T), else (B,).
    """
    entropy = np.random.SeedSequence((seed, NOISE, index)).generate_state(1)
    generator = torch.Generator().manual_seed(int(entropy[0]))
    mean, logvar = (torch.stack([getattr(clip, name).read().float() for clip in clips]) for name in ("mean", "logvar"))
    latents = normalize_latents(Posterior(mean, logvar).sample(generator))
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.rand(len(clips), generator=generator)
    kept = torch.rand(len(clips), generator=generator) >= caption_dropout
    embeds = torch.nn.utils.rnn.pad_sequence([clip.embeds.read().float() for clip in clips], batch_first=True)
    lengths = torch.tensor([clip.embeds.shape[0] for clip in clips])
    mask = (torch.arange(embeds.shape[1]) < lengths[:, None]) & kept[:, None]
    if frame_levels > 0:
        by_frame = draw_levels(sigma, latents.shape[2], generator)
        chosen = torch.rand(len(clips), generator=generator) < frame_levels
        sigma = torch.where(chosen[:, None], by_frame, sigma[:, None])
    return latents, embeds, mask, sigma, noise
