"""Random weights for any module, scaled so that signals neither vanish nor explode."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Set norm weights to around 1, small biases, and everything else scaled to keep the variance."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * (parameter[0].numel() ** -0.5) if parameter.ndim > 1 else 0.1 * noise)
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm | nn.RMSNorm):
            assert layer.weight is not None
            layer.weight.add_(1)
