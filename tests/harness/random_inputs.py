"""Random inputs for the tiny denoiser and for single layers, the same in every run."""

import torch

from mochi_core import linear_quadratic_schedule
from tests.harness.tiny_models import DIT


def inputs(lengths, size=(2, 6, 8), seed=0, tokens=16):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(lengths), 12, *size, generator=generator)
    embeds = torch.randn(len(lengths), tokens, DIT.text_width, generator=generator)
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    sigma = torch.linspace(0.9, 0.3, len(lengths))
    return latents, sigma, embeds, mask


def prompt(length, seed=0, batch=1):
    embeds = torch.randn(batch, 16, DIT.text_width, generator=torch.Generator().manual_seed(seed))
    return embeds, (torch.arange(16) < length).expand(batch, -1)


NOISE = torch.randn(1, 12, 2, 4, 4, generator=torch.Generator().manual_seed(7))
SIGMAS = linear_quadratic_schedule(5)


def batch():
    latents, sigma, embeds, mask = inputs([5, 0])  # the second caption is dropped
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    return latents, embeds, mask, sigma, noise


def velocity(dit):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 12, 2, 8, 8, generator=generator)
    embeds = torch.randn(1, 16, dit.config.text_width, generator=generator)
    return dit(latents, torch.tensor([0.6]), embeds, torch.arange(16)[None] < 9)


def gaussian(rows=48, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
