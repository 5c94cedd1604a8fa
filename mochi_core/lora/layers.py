"""LoRAs inside a denoiser.

What a LoRA changes is added to the output of its layer, so the layer's weight may have any dtype or be quantised, and stays
what it is: without the LoRA the denoiser is again what it was, bit for bit.
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
from .files import LoraUpdate, read_lora


class Lora:
    """A LoRA inside a denoiser. `strength` can be set at any time; `remove` takes the LoRA out."""

    def __init__(self, dit: AsymmDiT, updates: Iterable[LoraUpdate], strength: float) -> None:
        layers = [(dit.get_submodule(update.layer), update) for update in updates]
        self._branches = [(layer, Branch(layer, update, dit.dtype)) for layer, update in layers]
        for layer, branch in self._branches:
            _attach(layer, branch)
        self.strength = strength

    @property
    def strength(self) -> float:
        """0 is off, 1 as trained; a DoRA is blended in between, and any value is possible."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = _finite(value)
        for _, branch in self._branches:
            branch.strength = value

    def remove(self) -> None:
        for layer, branch in self._branches:
            _detach(layer, branch)
        self._branches = []


def load_lora(dit: AsymmDiT, path: str | Path, strength: float = 1.0) -> Lora:
    """Put a LoRA file of any known kind into a denoiser; several add up.

    The result's `strength` can be changed at any time, and its `remove` leaves the denoiser exactly as it was. Names
    without a place in Mochi are reported in a warning. Blocks compiled by other means than `AsymmDiT.compile_blocks` have
    to be compiled again.

    Raises:
        ValueError: the file is no LoRA for this denoiser, or `strength` is not finite.
        FileNotFoundError: there is no such file.
    """
    _finite(strength)
    file = read_lora(path, dit.config)
    if file.unmatched:
        warn(file.unmatched, stacklevel=2)
    return Lora(dit, file.updates, strength)


def _finite(strength: float) -> float:
    if not math.isfinite(strength):
        raise ValueError(f"The strength of a LoRA is {strength}, but must be a number; 1 is as trained.")
    return strength


class Branch(nn.Module):
    """One update beside its layer: it moves with the layer, but is not in its state dict."""

    def __init__(self, layer: nn.Module, update: LoraUpdate, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = update.rows
        self.strength = 1.0
        device = next(chain(layer.parameters(), layer.buffers())).device
        down, up = (factor.to(device, torch.float32) for factor in (update.down, update.up))
        up, gain = update.scale * up, None
        if update.magnitude is not None:
            weight = _dense_weight(layer)
            lengths = torch.linalg.vector_norm(weight[slice(*self.rows)] + up @ down, dim=1)
            stretch = update.magnitude.to(lengths) / lengths
            up, gain = stretch[:, None] * up, torch.zeros_like(weight[:, 0])
            gain[slice(*self.rows)] = stretch - 1
        self.down: Tensor
        self.up: Tensor
        self.gain: Tensor | None
        self.register_buffer("down", down.to(dtype), persistent=False)
        self.register_buffer("up", up.to(dtype), persistent=False)
        self.register_buffer("gain", None if gain is None else gain.to(dtype), persistent=False)


class Branches(nn.ModuleList):
    """All updates beside one layer. Each is relative to the layer's own weight, so their order does not matter."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hook = layer.register_forward_hook(_change_output)

    def forward(self, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
        """`x` (..., columns) and the layer's `out` (..., rows), which is overwritten, to the changed output."""
        active = [branch for branch in cast(list[Branch], list(self)) if branch.strength]
        if not active or not out.numel():
            return out
        gains = [branch.strength * branch.gain for branch in active if branch.gain is not None]
        if gains:
            out = out + torch.stack(gains).sum(dim=0) * (out if bias is None else out - bias)
        x, rows = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for branch in active:
            # In place: of the largest layers' outputs there is no room for a second one.
            rows[:, slice(*branch.rows)].addmm_(x @ branch.down.T, branch.up.T, alpha=branch.strength)
        return out


def _change_output(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    return _branches(layer)(inputs[0], out, layer.bias)


def _branches(layer: nn.Module) -> Branches:
    return cast(Branches, layer.lora)


def _attach(layer: nn.Module, branch: Branch) -> None:
    if not hasattr(layer, "lora"):
        layer.lora = Branches(layer)
    _branches(layer).append(branch)


def _detach(layer: nn.Module, branch: Branch) -> None:
    branches = _branches(layer)
    del branches[list(branches).index(branch)]
    if not len(branches):
        branches.hook.remove()
        del layer.lora


def _dense_weight(layer: nn.Module) -> Tensor:
    """A layer's weight (rows, columns) in float32; quantised layers have `dequantized`, quantised tensors `dequantize`."""
    dequantized = getattr(layer, "dequantized", None) or cast(Tensor, layer.weight).dequantize
    return dequantized()
