"""Weights stored in 8 bits or fewer, the linear layer that computes with them, and their quantisers.

A quantised weight keeps its stored form in memory, on any device. `QuantizedLinear` dequantises it for each matrix product, or
multiplies in fp8 if requested. Only linear layers keep weights quantised: embeddings, convolutions and norms are small, and
sensitive to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import block_floats, columns, dequantize
from .fp8 import FP8, FP8_MAX, linear_rowwise, quantize_rows, safe_scale, supports_scaled_mm, unsupported_reason
from .ggml import quantize_q4_0

FP8_ROWWISE = "fp8_rowwise"


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (rows, columns) in its stored form: values * scale, where values are plain numbers or blocks of them.

    It may also hold a convolution kernel while a file is read; kernels are dequantised on loading.
    """

    values: Tensor
    """(rows, columns) float8 or int8; with a `block_type`, (rows, bytes per row) uint8."""
    scale: Tensor | None = None
    """Factor of `values`, float32: one number for the whole matrix, or (rows, 1); None means 1."""
    block_type: str | None = None
    """Layout of the blocks, a key of `blocks.BLOCK_TYPES`; None if `values` are plain numbers."""
    input_scale: Tensor | None = None
    """Divisor of the inputs that the file suggests to hosts that multiply in fp8; `QuantizedLinear` does not use it."""
    exact_product: bool = True
    """Whether a host that could multiply in fp8 or int8 should dequantise the weight instead."""
    fp8_product: bool = False
    """Whether the layer also quantises its input and multiplies in fp8; needs float8_e4m3fn with a scale per row."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dequantised matrix; ValueError if blocks do not fill its rows."""
        rows, stored = self.values.shape
        return rows, columns(stored, self.block_type) if self.block_type else stored

    def scale_per_row(self) -> Tensor:
        """`scale` as (rows, 1)."""
        scale = torch.ones(()) if self.scale is None else self.scale
        return scale.expand(len(self.values), 1)

    def floats(self) -> list[Tensor]:
        """All tensors of the stored form that can contain NaN or infinity."""
        values = block_floats(self.values, self.block_type) if self.block_type else [self.values]
        return [tensor for tensor in (*values, self.scale, self.input_scale) if tensor is not None]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantised matrix (rows, columns), computed in float32 and rounded once to `dtype`."""
        values = dequantize(self.values, self.block_type) if self.block_type else self.values
        return values.to(dtype) if self.scale is None else (values.to(torch.float32) * self.scale).to(dtype)


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised weight; it computes in the dtype of its input.

    Even with `fp8_product`, the weight is dequantised on devices that cannot multiply in fp8 with a scale per row.
    """

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block_type, self.fp8_product = weight.block_type, weight.fp8_product
        self.values: Tensor
        self.scale: Tensor | None
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> QuantizedWeight:
        """The weight in its stored form, sharing the layer's buffers."""
        return QuantizedWeight(self.values, self.scale, self.block_type, fp8_product=self.fp8_product)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as an ordinary matrix (out_features, in_features)."""
        return self.weight.dequantized(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.fp8_product and self.scale is not None and unsupported_reason(x.device) is None:
            return linear_rowwise(x, self.values, self.scale, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized(x.dtype), bias)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight of any shape to float8_e4m3fn values and one float32 scale; values * scale approximates it.

    The largest magnitude maps to `FP8_MAX`; the relative error is at most 1/16 for all but the tiniest weights.
    """
    scale = safe_scale(weight.abs().amax().float() / FP8_MAX)
    return (weight.float() / scale).to(FP8), scale


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix (rows, columns) to int8 values in [-127, 127] and float32 scales (rows, 1)."""
    scale = safe_scale(weight.abs().amax(dim=1, keepdim=True).float() / 127)
    return (weight.float() / scale).round().to(torch.int8), scale


def quantize_fp8_rowwise(weight: Tensor) -> QuantizedWeight:
    """Quantise a matrix (rows, columns) to float8_e4m3fn with a float32 scale per row, for products in fp8.

    Raises:
        ValueError: the number of rows or columns is not a multiple of 16, as GPUs need to multiply in fp8.
    """
    if not supports_scaled_mm(weight.shape):
        rows, columns = weight.shape
        raise ValueError(
            f"A {rows} x {columns} weight cannot be multiplied in fp8, which needs multiples of 16; use fp8 or int8."
        )
    return QuantizedWeight(*quantize_rows(weight), exact_product=False, fp8_product=True)


QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "fp8": lambda weight: QuantizedWeight(*quantize_fp8(weight)),
    FP8_ROWWISE: quantize_fp8_rowwise,
    "int8": lambda weight: QuantizedWeight(*quantize_int8(weight)),
    "q4_0": lambda weight: QuantizedWeight(quantize_q4_0(weight), block_type="Q4_0"),
}
"""Quantisers of a matrix (rows, columns), by their names in `load_transformer(quantize=...)`."""
