"""Quantised weights as the host's own quantised tensors, so that the host casts, patches, offloads and multiplies them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import comfy.float
import comfy.memory_management
import comfy.model_management
import comfy.utils
import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, TensorCoreFP8Layout, register_layout_class
from torch import nn

from ...mochi_core.checkpoints import (
    Checkpoint,
    LazyStateDict,
    checked_when_read,
    from_state_dict,
    open_checkpoint,
    select_part,
)
from ...mochi_core.checkpoints.names.quantized import BLOCK_FORMAT, ROWWISE_FORMAT, STORED_AS
from ...mochi_core.quantization import fp8
from ...mochi_core.quantization.weights import QuantizedWeight
from .other_files import naming_loaders

BLOCK_LAYOUT, ROWWISE_LAYOUT = "MochiBlockLayout", "MochiFP8RowwiseLayout"
OWN_LAYOUTS = (BLOCK_LAYOUT, ROWWISE_LAYOUT)
HOST_SUFFIXES = (".safetensors", ".sft")
HOST_FORMATS = {dtype: name for name, dtype in STORED_AS.items()}


class BlockLayout(QuantizedLayout):
    """Blocks, (rows, bytes per row) uint8, all times `scale`; dequantised in float32 and rounded once to `orig_dtype`."""

    @dataclass(frozen=True)
    class Params:
        block_type: str
        orig_dtype: torch.dtype
        orig_shape: tuple[int, ...]
        scale: torch.Tensor | None = None

        def to_device(self, device):
            return self if self.scale is None else replace(self, scale=self.scale.to(device))

        def clone(self):
            return self if self.scale is None else replace(self, scale=self.scale.clone())

        def copy_from(self, src, non_blocking=False):
            object.__setattr__(self, "block_type", src.block_type)
            if self.scale is not None:
                self.scale.copy_(src.scale, non_blocking=non_blocking)

    @classmethod
    def dequantize(cls, qdata, params):
        return QuantizedWeight(qdata, params.scale, params.block_type).dequantized(params.orig_dtype)

    @classmethod
    def quantize(cls, tensor, **kwargs):
        raise NotImplementedError("A block-quantised weight is kept in full precision once it is patched.")

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return tuple(cls.state_dict_tensors(qtensor._qdata, qtensor._params).values())

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata} | ({} if params.scale is None else {"_scale": params.scale})


class RowwiseLayout(QuantizedLayout):
    """A matrix in float8_e4m3fn with a float32 scale per row; the layout of weights and, during the product, of inputs."""

    Params = TensorCoreFP8Layout.Params  # pyright: ignore[reportAttributeAccessIssue] - missing where comfy_kitchen is a stub

    @classmethod
    def quantize(cls, tensor, stochastic_rounding=0, **_):
        """`stochastic_rounding` is a seed or 0; patched weights come with a seed, so that small changes survive rounding."""
        qdata, scale = fp8.quantize_rows(tensor)
        if stochastic_rounding:
            qdata = comfy.float.stochastic_rounding(tensor / scale, fp8.FP8, seed=stochastic_rounding)
        return qdata, cls.Params(scale, tensor.dtype, tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        return QuantizedWeight(qdata, params.scale).dequantized(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale}


register_layout_class(BLOCK_LAYOUT, BlockLayout)
register_layout_class(ROWWISE_LAYOUT, RowwiseLayout)


def read_part(path: str, part: str) -> Checkpoint:
    """One part of a file, like `select_part(open_checkpoint(path), part)`; errors about other files name the right loader.

    Safetensors files are mapped by the host instead: its dynamic memory management needs its own mapping.

    Raises:
        ValueError: the file holds no such part, or cannot be read.
    """
    file = open_checkpoint(path)  # a broken file gets our message, before the host reads it
    if file.path.suffix.lower() in HOST_SUFFIXES:
        (opened,) = file.files
        state_dict: Any = comfy.utils.load_torch_file(str(file.path), safe_load=True)
        mapped = from_state_dict(state_dict)
        guarded = {name: tensor.guarded(opened.check_while_loading) for name, tensor in mapped.items()}
        file = file.with_tensors(file.tensors | guarded)
    with naming_loaders():
        found = select_part(file, part)
    # With the host's dynamic memory, weights are read on first use: nothing may touch them all now.
    return found if comfy.memory_management.aimdo_enabled else checked_when_read(found)


def by_layer(tensors: LazyStateDict) -> Iterator[tuple[str, LazyStateDict]]:
    """Yields each layer: its name, and its tensors under their full names.

    Each layer's converted tensors can be copied or kept before the next are made, so that they are never held twice.
    """
    for layer, names in groupby(sorted(tensors, key=_owner), key=_owner):
        yield layer, {name: tensors[name] for name in names}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def attributes_only(module: nn.Module, state_dict: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of a state dict of `module` that are its parameters and buffers; the scales of quantised layers are not.

    The host looks up an attribute for every entry when it merges models.
    """
    places = {prefix + name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {name: value for name, value in state_dict.items() if name in places}


def is_quantized(checkpoint: Checkpoint) -> bool:
    return any(tensor.quantized is not None for tensor in checkpoint.tensors.values())


def host_weights(tensors: LazyStateDict, module: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict for the host's quantised operations; only linear layers of `module` can be quantised."""
    weights = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if tensor.quantized is not None and isinstance(module.get_submodule(layer), nn.Linear):
            weights |= _host_entries(layer, tensor.quantized())
        else:
            weights[name] = tensor.read()
    return weights


def _host_entries(layer: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    if weight.block_type:
        params = BlockLayout.Params(weight.block_type, torch.float32, weight.shape, weight.scale)
        return {f"{layer}.weight": QuantizedTensor(weight.values, BLOCK_LAYOUT, params)}
    if weight.fp8_product:
        params = RowwiseLayout.Params(weight.scale, torch.float32, weight.shape)
        return {f"{layer}.weight": QuantizedTensor(weight.values, ROWWISE_LAYOUT, params)}
    note = {"format": HOST_FORMATS[weight.values.dtype], "full_precision_matrix_mult": weight.exact_product}
    entries = {
        "weight": weight.values,
        "weight_scale": torch.ones(()) if weight.scale is None else weight.scale,
        "input_scale": weight.input_scale,
        "comfy_quant": torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8),
    }
    return {f"{layer}.{leaf}": tensor for leaf, tensor in entries.items() if tensor is not None}


def quantized_operations(operations: type) -> type:
    """A subclass of the host's mixed-precision operations whose linear layers support the layouts of this module.

    `quant_format` is set for both layouts, because the host saves weights under it. With `RowwiseLayout` the host also quantises
    inputs, and the layer multiplies in fp8. A layer that is to multiply in full precision dequantises its weight, so that the
    host's int8 product, which rounds the input, is never used.
    """

    class Operations(operations):
        class Linear(operations.Linear):
            def _load_from_state_dict(self, state_dict, prefix, *args):
                name = prefix + "weight"
                given = state_dict.get(name)
                if _layout(given) not in OWN_LAYOUTS:
                    return super()._load_from_state_dict(state_dict, prefix, *args)
                # In inference mode, in which nodes run, the host's own cast would dequantise it.
                super()._load_from_state_dict(state_dict | {name: torch.empty(0)}, prefix, *args)
                self.weight = nn.Parameter(_on(given, **self.factory_kwargs), requires_grad=False)
                if _layout(given) == BLOCK_LAYOUT:
                    self.quant_format = BLOCK_FORMAT + given._params.block_type
                else:
                    self.quant_format, self.layout_type = ROWWISE_FORMAT, ROWWISE_LAYOUT
                    self._full_precision_mm = rowwise_unsupported_reason() is not None

            def _forward(self, input, weight, bias):
                if _layout(input) == _layout(weight) == ROWWISE_LAYOUT:
                    operands = (*RowwiseLayout.get_plain_tensors(input), *RowwiseLayout.get_plain_tensors(weight))
                    return fp8.multiply_rowwise(*operands, bias).to(input.dtype)
                exact = self._full_precision_mm and isinstance(weight, QuantizedTensor)
                return super()._forward(input, weight.dequantize() if exact else weight, bias)

    return Operations


def describe_matmul(network: nn.Module) -> str:
    """A clause for the console on how a network multiplies fp8 weights with row-wise scales; empty if it has none."""
    if not any(getattr(layer, "layout_type", None) == ROWWISE_LAYOUT for layer in network.modules()):
        return ""
    reason = rowwise_unsupported_reason()
    if reason is None:
        return ", products in fp8"
    return f"; weights are dequantised, because this device cannot multiply in fp8 ({reason})"


def rowwise_unsupported_reason() -> str | None:
    """Reason why the host's compute device cannot multiply in fp8 with row-wise scales, or None if it can."""
    return fp8.unsupported_reason(comfy.model_management.get_torch_device())


def _on(weight: QuantizedTensor, device: torch.device | None, dtype: torch.dtype) -> QuantizedTensor:
    """`weight` on `device` (None: where it is), to be dequantised to `dtype`."""
    device = device or weight._qdata.device
    params = replace(weight._params.to_device(device), orig_dtype=dtype)
    return QuantizedTensor(weight._qdata.to(device), weight._layout_cls, params)


def _layout(tensor: torch.Tensor) -> str | None:
    return getattr(tensor, "_layout_cls", None)
