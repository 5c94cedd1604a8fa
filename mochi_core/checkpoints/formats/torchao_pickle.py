"""torch.save files with weights quantised by torchao, read without torchao and without running any of its code.

Such a file refers to torchao's classes. Stand-ins replace them that only hold their tensors; these are then named as in torchao's
safetensors files, which `names.torchao` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TENSOR_CLASSES = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
SETTINGS = (
    "torchao.quantization.quantize_.common.kernel_preference.KernelPreference",
    "torchao.quantization.quantize_.workflows.int8.int8_tensor.QuantizeTensorToInt8Kwargs",
    "torchao.quantization.quantize_.workflows.float8.float8_tensor.QuantizeTensorToFloat8Kwargs",
    "torchao.quantization.granularity.PerRow",
    "torchao.quantization.granularity.PerTensor",
    "torchao.quantization.granularity.PerAxis",
    "torchao.quantization.granularity.PerGroup",
    "torchao.quantization.quant_primitives.MappingType",
    "torchao.float8.inference.Float8MMConfig",
)


class SavedTensor(Tensor):
    """Holds the attributes of a quantised tensor; supports no operations."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise TypeError(f"{cls.__name__} supports no operations; read its parts instead.")


class SavedSetting:
    """How a tensor was quantised; not needed to read it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


@contextmanager
def torchao_stand_ins() -> Iterator[None]:
    """Make PyTorch's restricted unpickler substitute stand-ins for torchao's classes."""
    tensors: list[Any] = [(type(name, (SavedTensor,), {}), f"torchao.quantization.{name}") for name in TENSOR_CLASSES]
    with torch.serialization.safe_globals([*tensors, *((SavedSetting, name) for name in SETTINGS)]):
        yield


def flattened(content: Any) -> tuple[Any, dict[str, str]]:
    """A state dict with torchao's tensors replaced by their parts, and metadata with their types.

    In a process that has imported torchao, the tensors are torchao's own. Anything but a dict is returned unchanged.
    """
    if not isinstance(content, dict):
        return content, {}
    flat, metadata = {}, {}
    for name, value in content.items():
        if not isinstance(name, str) or type(value).__name__ not in TENSOR_CLASSES:
            flat[name] = value
            continue
        layer, _, leaf = name.rpartition(".")
        stem = f"{layer}._{leaf}" if layer else f"_{leaf}"
        flat |= {f"{stem}_{part}": tensor for part, tensor in vars(value).items() if isinstance(tensor, Tensor)}
        metadata[name] = json.dumps({"_type": type(value).__name__})
    return flat, metadata
