"""Per-frame noise levels, to train weights that make videos from given frames.

Pusa (arXiv 2507.16116) draws the level of every frame independently. When a video is made from an image, the given frames have a
level near 0 and all others share one: so here a third of the clips are as in Pusa, a third have first frames given, and a third
a first and a last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEPT, MOST_NOISE = 0.5, 0.4
"""Fraction of given frames without noise; the others' largest fraction of the new frames' level (Pusa publishes 0 to 0.4)."""


def draw_levels(sigma: Tensor, num_latents: int, generator: torch.Generator) -> Tensor:
    """Per-frame noise levels (B, T) for clips whose new frames have the levels `sigma` (B,)."""
    chosen = torch.randint(3, sigma.shape, generator=generator).tolist()
    return torch.stack([_levels(i, level, num_latents, generator) for i, level in zip(chosen, sigma, strict=True)])


def _levels(kind: int, level: Tensor, num_latents: int, generator: torch.Generator) -> Tensor:
    if kind == 0:
        return torch.rand(num_latents, generator=generator)
    shares = torch.ones(num_latents)
    if kind == 1 and num_latents > 1:
        given = int(torch.randint(1, num_latents, (), generator=generator))
        shares[:given] = _share_of_given(generator)
    elif kind == 2 and num_latents > 2:
        shares[0], shares[-1] = _share_of_given(generator), _share_of_given(generator)
    return shares * level


def _share_of_given(generator: torch.Generator) -> float:
    kept, share = torch.rand(2, generator=generator).tolist()
    return 0.0 if kept < KEPT else MOST_NOISE * share
