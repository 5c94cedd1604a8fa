"""A small data set, and the configuration of a short training."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from mochi_core import AsymmDiT, Posterior
from mochi_core.train.config import Config, parse
from mochi_core.train.dataset import batch_at, example, open_dataset, write_clip
from mochi_core.train.objective import velocity_loss
from tests.harness.tiny_models import TEXT_WIDTH, random_dit

SHAPES = ((2, 4, 6), (2, 4, 6), (2, 4, 6), (1, 6, 4), (1, 6, 4))
"""(T, H, W) of each clip's latents, in two sizes."""


def write_dataset(folder: Path, text_width: int = TEXT_WIDTH) -> Path:
    """Write clips whose latents can be learned: each channel has one value everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    for i, shape in enumerate(SHAPES):
        mean = torch.randn(1, 12, 1, 1, 1, generator=generator).expand(1, 12, *shape).contiguous()
        embeds = torch.randn(3 + i, text_width, generator=generator)
        write_clip(folder / f"clip{i}.mp4.safetensors", Posterior(mean, torch.full_like(mean, -4.0)), embeds, {})
    return folder


def write_transformer(path: Path) -> Path:
    """Write a random transformer in float32, so that nothing is rounded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_dit().state_dict(), path)
    return path


def config(folder: Path, **keys: object) -> Config:
    """A training of six steps on the data set and the transformer in `folder`, which are written if missing."""
    transformer, dataset = folder / "dit.safetensors", folder / "dataset"
    if not transformer.exists():
        write_transformer(transformer)
        write_dataset(dataset)
    basic = {"transformer": str(transformer), "dataset": str(dataset), "output": str(folder / "out")}
    quick = {"steps": 6, "warmup_steps": 2, "learning_rate": 3e-3, "batch_size": 2, "dtype": "fp32", "save_every": 3}
    return parse(Config, {**basic, **quick, **keys})


@torch.no_grad()
def fixed_loss(dit: AsymmDiT, dataset: Path) -> float:
    """Mean loss over twelve fixed batches with fixed noise."""
    clips = open_dataset(dataset, dit.config.text_width)
    losses = [velocity_loss(dit, *example(batch_at(clips, 2, 99, i), 0.1, 99, i)) for i in range(12)]
    return torch.stack(losses).mean().item()
