"""Tensors that have not been read yet, and files of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..quantization.ggml import BLOCK_TYPES, columns
from ..quantization.weights import QuantizedWeight


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of what is stored."""
    read: Callable[[], Tensor]
    quantized: Callable[[], QuantizedWeight] | None = None
    """For a quantised weight, reads its stored form; `read` then widens it."""
    block_type: str | None = None
    """For GGML blocks, which (see `ggml.BLOCK_TYPES`)."""

    @property
    def form(self) -> str:
        """What people call the stored form: bfloat16, float8_e4m3fn, Q4_0 ..."""
        return self.block_type or str(self.dtype).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        """Of what is stored."""
        count = math.prod(self.shape)
        if self.block_type is None:
            return count * self.dtype.itemsize
        block = BLOCK_TYPES[self.block_type]
        return count // block.weights * block.bytes


LazyStateDict = dict[str, LazyTensor]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file or folder, and the file's own notes."""

    path: Path
    tensors: LazyStateDict
    metadata: dict[str, str]


def from_state_dict(state_dict: Mapping[str, Tensor]) -> LazyStateDict:
    """Tensors that are already in memory, seen the same way."""
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in state_dict.items()
    }


def quantized_weight(shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], QuantizedWeight]) -> LazyTensor:
    """A weight stored quantised, as `dtype`: `read` gives its stored form, from which the plain one is computed."""
    return LazyTensor(shape, dtype, lambda: read().dequantized(), read)


def ggml_weight(stored: LazyTensor, block_type: str) -> LazyTensor:
    """(rows, bytes of a row) uint8 as the matrix that it stands for."""
    shape = (stored.shape[0], columns(stored.shape[1], block_type))
    weight = quantized_weight(shape, stored.dtype, lambda: QuantizedWeight(stored.read(), block_type=block_type))
    return replace(weight, block_type=block_type)
