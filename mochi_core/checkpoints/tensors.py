"""Tensors that have not been read yet, and the opened files that hold them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..mapped_files import FileState
from ..quantization.blocks import BLOCK_TYPES, columns
from ..quantization.weights import QuantizedWeight
from ..shown import sentence, shown

T = TypeVar("T")
FLOATS = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip
"""Dtypes that unquantised weights may have."""
QUANTIZATION = "_quantization_metadata"
"""Metadata key under which a file states the formats of its quantised layers."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file: shape and dtype are known, values are read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """The dtype in the file, or the one given to `map`; uint8 for blocks."""
    read: Callable[[], Tensor]
    """Reads the values, dequantised to float32 for a quantised weight; they may share memory with the file, so do not write
    to them, and clone what must outlive it."""
    quantized: Callable[[], QuantizedWeight] | None = None
    """Reads a quantised weight in its stored form; None for other tensors."""
    block_type: str | None = None
    """The type of the stored blocks, a name in `blocks.BLOCK_TYPES`; None for other tensors."""

    @property
    def stored_dtype(self) -> str:
        """The name of the dtype or block type in the file: bfloat16, float8_e4m3fn, Q4_0 ..."""
        return self.block_type or str(self.dtype).removeprefix("torch.")

    @property
    def is_float(self) -> bool:
        """Whether `read` gives values that a weight can have: not bool, integers, complex numbers or pure exponents (e8m0)."""
        return self.quantized is not None or self.block_type is not None or self.dtype in FLOATS

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        if self.block_type is None:
            return self.numel * self.dtype.itemsize
        block = BLOCK_TYPES[self.block_type]
        return self.numel // block.weights * block.bytes

    def map(
        self,
        change: Callable[[Tensor], Tensor],
        change_quantized: Callable[[QuantizedWeight], QuantizedWeight] | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> LazyTensor:
        """Apply `change` when the tensor is read; `shape` and `dtype` are those of the result, if they differ.

        `change_quantized` does the same to the stored form of a quantised weight; without it the result is not quantised.
        """
        quantized = self.quantized
        return LazyTensor(
            self.shape if shape is None else shape,
            dtype or self.dtype,
            lambda: change(self.read()),
            (lambda: change_quantized(quantized())) if quantized and change_quantized else None,
            None if dtype else self.block_type,
        )

    def guarded(self, check: Callable[[], None]) -> LazyTensor:
        """The same tensor, with `check` called before it is read in either form."""

        def after_check(read: Callable[[], T]) -> Callable[[], T]:
            return lambda: (check(), read())[1]

        return replace(self, read=after_check(self.read), quantized=self.quantized and after_check(self.quantized))


LazyStateDict = dict[str, LazyTensor]


@dataclass(frozen=True)
class Checkpoint:
    """An opened weights file or folder, whose errors state its name."""

    name: str
    """Name in errors: the name of a file, the path of a folder, or "a and b" for two merged files."""
    path: Path
    """The file; the first of several merged ones."""
    tensors: LazyStateDict
    metadata: dict[str, str] = field(default_factory=dict)
    files: tuple[FileState, ...] = ()
    """State, on opening, of all the files that hold the tensors."""

    def with_tensors(self, tensors: LazyStateDict) -> Checkpoint:
        """The same file with other tensors, such as renamed ones."""
        return replace(self, tensors=tensors)

    def error(self, problem: str) -> ValueError:
        """The error to raise for a problem with the file, such as "holds no tensors.", on one line."""
        return ValueError(sentence(f"{self.name} {problem}"))

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Re-raise any ValueError from the body as `error("does not fit Mochi: ...")`."""
        try:
            yield
        except ValueError as error:
            # Without the cause, whose text a traceback would show unescaped.
            raise self.error(f"does not fit Mochi: {error}") from None

    def main_dtype(self) -> tuple[torch.dtype, str | None]:
        """`dtype` and `block_type` of most of the weights."""
        counts = Counter[tuple[torch.dtype, str | None]]()
        for tensor in self.tensors.values():
            counts[tensor.dtype, tensor.block_type] += tensor.numel
        return counts.most_common(1)[0][0]


def merge(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Merge the tensors of several files; ValueError if two files hold the same tensor."""
    first, *others = checkpoints
    merged = replace(first, name=" and ".join(file.name for file in checkpoints))
    for file in others:
        if twice := sorted(merged.tensors.keys() & file.tensors.keys()):
            raise merged.error(f"both hold {shown(twice[0])}; give each half of the autoencoder once.")
        merged = replace(
            merged,
            tensors=merged.tensors | file.tensors,
            metadata=merged.metadata | file.metadata,
            files=merged.files + file.files,
        )
    return merged


def from_state_dict(state_dict: Mapping[str, Tensor]) -> LazyStateDict:
    """Wrap tensors that are already in memory as lazy ones."""
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in state_dict.items()
    }


def quantized_weight(shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], QuantizedWeight]) -> LazyTensor:
    """A weight whose stored form `read` returns; `dtype` is its dtype in the file."""
    return LazyTensor(shape, dtype, lambda: read().dequantized(), read)


def block_weight(stored: LazyTensor, block_type: str, scale: LazyTensor | None = None) -> LazyTensor:
    """A matrix whose blocks are stored as (rows, bytes per row) uint8, times `scale`: one number, or one per row."""
    shape = (stored.shape[0], columns(stored.shape[1], block_type))

    def read() -> QuantizedWeight:
        factor = None if scale is None else scale.read().float().reshape(() if scale.numel == 1 else (-1, 1))
        return QuantizedWeight(stored.read(), factor, block_type)

    return replace(quantized_weight(shape, stored.dtype, read), block_type=block_type)
