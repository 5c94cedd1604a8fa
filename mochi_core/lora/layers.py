"""LoRAs applied to a denoiser.

Each LoRA adds to the output of its linear layers and leaves their weights alone, so weights may have any dtype or be
quantised, and after removal the denoiser computes what it did before, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import cast
from warnings import warn

import torch
from torch import Tensor, nn

from ..transformer.model import AsymmDiT
from .files import LoraDelta, read_lora


class Lora:
    """A LoRA applied to a denoiser. `strength` may be set at any time; `remove` takes the LoRA out."""

    def __init__(self, dit: AsymmDiT, deltas: Iterable[LoraDelta], strength: float) -> None:
        layers = [(dit.get_submodule(delta.layer), delta) for delta in deltas]
        self._lora_layers = [(layer, LoraLayer(layer, delta, dit.dtype)) for layer, delta in layers]
        for layer, lora_layer in self._lora_layers:
            _attach(layer, lora_layer)
        self.strength = strength

    @property
    def strength(self) -> float:
        """Factor of the LoRA's change to each weight: 0 is off, 1 as trained; ValueError if it is set to no finite number."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = _finite(value)
        for _, lora_layer in self._lora_layers:
            lora_layer.strength = value

    def remove(self) -> None:
        """Take the LoRA out of the denoiser and free its memory; other LoRAs stay. A second call does nothing."""
        for layer, lora_layer in self._lora_layers:
            _detach(layer, lora_layer)
        self._lora_layers = []


def load_lora(dit: AsymmDiT, path: str | Path, strength: float = 1.0) -> Lora:
    """Apply a LoRA file of any known kind to a denoiser, in place; the changes of several LoRAs add up.

    The `strength` of the returned `Lora` can be changed at any time, and its `remove` leaves the denoiser exactly as it was.
    Names in the file that Mochi has no layer for are reported in a warning. Blocks that were compiled by other means than
    `AsymmDiT.compile_blocks` have to be compiled again.

    Raises:
        ValueError: the file is no LoRA for this denoiser, or `strength` is not finite.
        FileNotFoundError: there is no such file.
    """
    _finite(strength)  # before the file is read
    file = read_lora(path, dit.config)
    if file.unmatched:
        warn(file.unmatched, stacklevel=2)
    return Lora(dit, file.deltas, strength)


def _finite(strength: float) -> float:
    if not math.isfinite(strength):
        raise ValueError(f"The strength of a LoRA is {strength}, but must be a number; 1 is as trained.")
    return strength


def dora_scale(changed: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's factor for each row of a weight: magnitude / length of the row (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    `changed` (rows, columns) is the weight with the low-rank change, `magnitude` (rows,) the trained lengths.
    """
    return magnitude.to(changed) / torch.linalg.vector_norm(changed, dim=1)


class LoraLayer(nn.Module):
    """One `LoraDelta` beside its linear layer: buffers that move with the layer but are not in its state dict.

    With DoRA, the row factors are multiplied into `up`, and `dora_scale_minus_1` (rows of the layer,) is what they add to the
    layer's own output; it is zero for rows that the delta does not change.
    """

    def __init__(self, layer: nn.Module, delta: LoraDelta, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = delta.rows
        self.strength = 1.0
        device = next(chain(layer.parameters(), layer.buffers())).device
        down, up = (factor.to(device, torch.float32) for factor in (delta.down, delta.up))
        up, minus_1 = delta.scale * up, None
        if delta.magnitude is not None:
            weight = _dense_weight(layer)
            scale = dora_scale(weight[slice(*self.rows)] + up @ down, delta.magnitude)
            up, minus_1 = scale[:, None] * up, torch.zeros_like(weight[:, 0])
            minus_1[slice(*self.rows)] = scale - 1
        self.down: Tensor
        self.up: Tensor
        self.dora_scale_minus_1: Tensor | None
        self.register_buffer("down", down.to(dtype), persistent=False)
        self.register_buffer("up", up.to(dtype), persistent=False)
        self.register_buffer("dora_scale_minus_1", None if minus_1 is None else minus_1.to(dtype), persistent=False)


class LoraAdapters(nn.ModuleList):
    """All `LoraLayer`s beside one linear layer; each is relative to the layer's own weight, so their order does not matter."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hook = layer.register_forward_hook(_lora_hook)

    def forward(self, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's input `x` (..., columns) and output `out` (..., rows), which is overwritten, to the changed output."""
        active = [lora_layer for lora_layer in cast(list[LoraLayer], list(self)) if lora_layer.strength]
        if not active or not out.numel():
            return out
        scales = [lora.strength * lora.dora_scale_minus_1 for lora in active if lora.dora_scale_minus_1 is not None]
        if scales:
            out = out + torch.stack(scales).sum(dim=0) * (out if bias is None else out - bias)
        x, rows = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for lora_layer in active:
            # In place, because the outputs of the largest layers leave no room for a second tensor of their size.
            rows[:, slice(*lora_layer.rows)].addmm_(x @ lora_layer.down.T, lora_layer.up.T, alpha=lora_layer.strength)
        return out


def _lora_hook(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    return _adapters(layer)(inputs[0], out, layer.bias)


def _adapters(layer: nn.Module) -> LoraAdapters:
    return cast(LoraAdapters, layer.lora)


def _attach(layer: nn.Module, lora_layer: LoraLayer) -> None:
    if not hasattr(layer, "lora"):
        layer.lora = LoraAdapters(layer)
    _adapters(layer).append(lora_layer)


def _detach(layer: nn.Module, lora_layer: LoraLayer) -> None:
    adapters = _adapters(layer)
    del adapters[list(adapters).index(lora_layer)]
    if not len(adapters):
        adapters.hook.remove()
        del layer.lora


def _dense_weight(layer: nn.Module) -> Tensor:
    """A layer's weight (rows, columns) in float32; quantised layers have `dequantized`, plain tensors `dequantize`."""
    dequantized = getattr(layer, "dequantized", None) or cast(Tensor, layer.weight).dequantize
    return dequantized()
