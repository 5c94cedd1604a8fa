"""Apply LoRAs to a denoiser.

Each LoRA adds to the output of its linear layers and leaves their weights unchanged, so weights may have any dtype or be
quantised. Biases, norms and the few other parameters are small: LoRAs change their values, and the originals are kept. After
removal the denoiser computes what it did before, bit for bit.
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

from ..quantization.weights import QuantizedLinear
from ..transformer.model import AsymmDiT
from .files import LoraDelta, ParameterDelta, read_lora


class Lora:
    """A LoRA applied to a denoiser. `strength` may be set at any time; `remove` takes the LoRA out.

    Raises:
        ValueError: the strength is not finite.
    """

    def __init__(self, dit: AsymmDiT, deltas: Iterable[LoraDelta | ParameterDelta], strength: float) -> None:
        self._strength = finite_strength(strength)
        self._parts: list[LoraLayer | ParameterChange] = []
        try:
            for delta in deltas:
                self._parts.append(_attached(dit, delta))
            self.strength = strength
        except BaseException:  # the caller gets no handle with which to detach the parts already attached
            self.remove()
            raise

    @property
    def strength(self) -> float:
        """Factor of the LoRA's change to each weight: 0 is off, 1 as trained. Setting a non-finite value raises ValueError."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = finite_strength(value)
        for part in self._parts:
            part.set_strength(value)

    def remove(self) -> None:
        """Take the LoRA out of the denoiser and free its memory; other LoRAs stay. A second call does nothing."""
        for part in self._parts:
            part.detach()
        self._parts = []


def load_lora(dit: AsymmDiT, path: str | Path, strength: float = 1.0) -> Lora:
    """Apply a LoRA file in any known format to a denoiser, in place; the changes of several LoRAs add up.

    The `strength` of the returned `Lora` can be changed at any time, and its `remove` restores the denoiser exactly.
    A warning lists names in the file for which Mochi has no layer. Blocks compiled by means other than
    `AsymmDiT.compile_blocks` must be recompiled.

    Raises:
        ValueError: the file is not a LoRA for this denoiser, or `strength` is not finite.
        FileNotFoundError: there is no such file.
    """
    finite_strength(strength)  # before the file is read
    file = read_lora(path, dit.config)
    if left_out := file.report():
        warn(left_out, stacklevel=2)
    return Lora(dit, file.deltas, strength)


def fuse_loras(dit: AsymmDiT) -> None:
    """Merge all LoRAs of a denoiser into its weights, in float32 and rounded once, and remove their layers.

    A step then costs the same as without LoRAs. Rounding to the weights' dtype loses precision that unfused LoRAs keep.

    Raises:
        ValueError: a weight is quantised, and would lose more precision; nothing is changed then.
    """
    changed = [(name, layer) for name, layer in dit.named_modules() if hasattr(layer, "lora")]
    for name, layer in changed:
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is quantised, so a LoRA cannot be fused into it; use the LoRA without fusing.")
    for _, layer in changed:
        weight = cast(nn.Parameter, layer.weight)
        # Not in place: the weight may be mapped from a file.
        weight.data = _adapters(layer).changed(weight.float()).to(weight.dtype)
        _adapters(layer).hook.remove()
        del layer.lora
    for layer in dit.modules():
        for parameter in list(layer.__dict__.get("lora_parameters", {}).values()):
            parameter.fuse()


def finite_strength(strength: float) -> float:
    """Return `strength`; ValueError if it is not finite."""
    if not math.isfinite(strength):
        raise ValueError(f"The strength of a LoRA is {strength}, but must be finite; 1 is as trained.")
    return strength


def dora_scale(changed: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's factor for each row of a weight: magnitude / row length (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    `changed` (rows, columns) is the weight including the low-rank change, `magnitude` (rows,) the trained lengths.
    """
    return magnitude.to(changed) / torch.linalg.vector_norm(changed, dim=1)


def _attached(dit: AsymmDiT, delta: LoraDelta | ParameterDelta) -> LoraLayer | ParameterChange:
    """Attach one delta to the denoiser with strength 1."""
    parameter = delta.parameter if isinstance(delta, ParameterDelta) else f"{delta.layer}.weight"
    owner, _, leaf = parameter.rpartition(".")
    layer = dit.get_submodule(owner)
    if leaf == "weight" and isinstance(layer, nn.Linear | QuantizedLinear):
        return LoraLayer(layer, delta, dit.dtype)
    return ParameterChange(layer, leaf, delta)


class LoraLayer(nn.Module):
    """One delta attached to its linear layer: buffers that move with the layer but are not in its state dict.

    `up` is None where `down` changes the whole weight. With DoRA, the row factors are multiplied into `up`, and
    `dora_scale_minus_1` (rows of the layer,) is the multiple of the layer's own output, without its bias, that they add; it is
    zero for rows that the delta does not change.
    """

    def __init__(self, layer: nn.Module, delta: LoraDelta | ParameterDelta, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = delta.rows
        self.strength = 1.0
        device = next(chain(layer.parameters(), layer.buffers())).device
        up, minus_1 = None, None
        if isinstance(delta, ParameterDelta):
            down = delta.change.to(device, torch.float32)
        else:
            down, up = (factor.to(device, torch.float32) for factor in (delta.down, delta.up))
            up = delta.scale * up
            if delta.magnitude is not None:
                weight = _dense_weight(layer)
                scale = dora_scale(weight[slice(*self.rows)] + up @ down, delta.magnitude)
                up, minus_1 = scale[:, None] * up, torch.zeros_like(weight[:, 0])
                minus_1[slice(*self.rows)] = scale - 1
        self.down: Tensor
        self.up: Tensor | None
        self.dora_scale_minus_1: Tensor | None
        for name, value in (("down", down), ("up", up), ("dora_scale_minus_1", minus_1)):
            self.register_buffer(name, None if value is None else value.to(dtype), persistent=False)
        self._layer = (layer,)  # in a tuple, so that it is not registered as a submodule
        _attach(layer, self)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the delta applied to `x` (N, columns) to `out` (N, rows of the layer)."""
        x, factor = (x, self.down) if self.up is None else (x @ self.down.T, self.up)
        # In place: there may be no memory for a second tensor as large as the largest layers' outputs.
        out[:, slice(*self.rows)].addmm_(x, factor.T, alpha=self.strength)

    def set_strength(self, strength: float) -> None:
        self.strength = strength

    def detach(self) -> None:
        _detach(*self._layer, self)


class LoraAdapters(nn.ModuleList):
    """All `LoraLayer`s of one linear layer; each is relative to the layer's own weight, so their order does not matter."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hook = layer.register_forward_hook(_lora_hook)

    def forward(self, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
        """The changed output from the layer's input `x` (..., columns) and output `out` (..., rows), which may be overwritten."""
        active = [lora_layer for lora_layer in cast(list[LoraLayer], list(self)) if lora_layer.strength]
        if not active or not out.numel():
            return out
        scales = [lora.strength * lora.dora_scale_minus_1 for lora in active if lora.dora_scale_minus_1 is not None]
        if scales:
            out = out + torch.stack(scales).sum(dim=0) * (out if bias is None else out - bias)
        x, rows = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for lora_layer in active:
            lora_layer.add_to(rows, x)
        return out

    def changed(self, weight: Tensor) -> Tensor:
        """The layer's `weight` (rows, columns) in float32 with all changes applied."""
        total = weight.clone()
        for lora_layer in cast(list[LoraLayer], list(self)):
            if (scale := lora_layer.dora_scale_minus_1) is not None:
                total += lora_layer.strength * scale.float()[:, None] * weight
            down, up = lora_layer.down.float(), lora_layer.up
            total[slice(*lora_layer.rows)] += lora_layer.strength * (down if up is None else up.float() @ down)
        return total


def _lora_hook(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    return _adapters(layer)(inputs[0], out, layer.bias)


def _adapters(layer: nn.Module) -> LoraAdapters:
    return cast(LoraAdapters, layer.lora)


def _attach(layer: nn.Module, lora_layer: LoraLayer) -> None:
    if not hasattr(layer, "lora"):
        layer.lora = LoraAdapters(layer)
    _adapters(layer).append(lora_layer)


def _detach(layer: nn.Module, lora_layer: LoraLayer) -> None:
    if not hasattr(layer, "lora") or lora_layer not in _adapters(layer):  # fused
        return
    adapters = _adapters(layer)
    del adapters[list(adapters).index(lora_layer)]
    if not len(adapters):
        adapters.hook.remove()
        del layer.lora


def _dense_weight(layer: nn.Module) -> Tensor:
    """A layer's weight (rows, columns) in float32; quantised layers have `dequantized`, plain tensors `dequantize`."""
    dequantized = getattr(layer, "dequantized", None) or cast(Tensor, layer.weight).dequantize
    return dequantized()


class ParameterChange:
    """One delta of a parameter other than a linear layer's weight: it is added to the parameter's values."""

    def __init__(self, layer: nn.Module, leaf: str, delta: LoraDelta | ParameterDelta) -> None:
        self.rows, self.strength = delta.rows, 1.0
        changed = layer.__dict__.setdefault("lora_parameters", {})
        self._parameter: ChangedParameter = changed.get(leaf) or ChangedParameter(layer, leaf)
        self.change = delta.change if isinstance(delta, ParameterDelta) else self._product(delta)
        changed[leaf] = self._parameter  # last, so that a failed change leaves nothing behind
        self._parameter.changes.append(self)

    def _product(self, delta: LoraDelta) -> Tensor:
        """The low-rank change to a convolution as a matrix (rows, columns), including DoRA's rescaling if there is any."""
        change = delta.scale * delta.up.float() @ delta.down.float()
        if delta.magnitude is None:
            return change
        weight = self._parameter.original[slice(*self.rows)].float().flatten(1).to(change)
        return dora_scale(weight + change, delta.magnitude)[:, None] * (weight + change) - weight

    def set_strength(self, strength: float) -> None:
        if self in self._parameter.changes:  # not fused
            self.strength = strength
            self._parameter.update()

    def detach(self) -> None:
        if self in self._parameter.changes:  # not fused
            self._parameter.changes.remove(self)
            self._parameter.update()


class ChangedParameter:
    """A parameter's original value, and all changes that LoRAs add to it."""

    def __init__(self, layer: nn.Module, leaf: str) -> None:
        self.layer, self.leaf = layer, leaf
        self.original: Tensor = getattr(layer, leaf).data
        self.changes: list[ParameterChange] = []

    def update(self) -> None:
        """Set the parameter to its original plus all changes, summed in float32 and rounded once, on its current device."""
        parameter: nn.Parameter = getattr(self.layer, self.leaf)
        active = [change for change in self.changes if change.strength]
        value = self.original.float().clone() if active else self.original
        for change in active:
            some = value[slice(*change.rows)]
            some += change.strength * change.change.to(some).reshape(some.shape)
        parameter.data = value.to(parameter.device, parameter.dtype)
        if not self.changes:
            self.layer.__dict__["lora_parameters"].pop(self.leaf, None)

    def fuse(self) -> None:
        """Make the changes permanent: the current value becomes the original."""
        self.original = getattr(self.layer, self.leaf).data
        self.changes.clear()
        self.update()
