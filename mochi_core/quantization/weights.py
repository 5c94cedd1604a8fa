"""Weights of eight bits and fewer, and the layer that uses them.

A quantised weight stays in its stored form in memory, on whatever device; the layer widens it for the moment of its
matrix product, or multiplies in fp8 where that is asked for. Embeddings, convolutions and norms are never kept quantised:
they are small, and they matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fp8 import FP8, LARGEST, can_multiply, linear_rowwise, nonzero, quantize_rows, refusal
from .ggml import columns, dequantize, halves, quantize_q4_0

FP8_ROWWISE = "fp8_rowwise"


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (rows, columns) in its stored form: values * scale, or GGML blocks.

    Kernels of convolutions can be stored so, too; only to be widened when they are loaded.
    """

    values: Tensor
    """(rows, columns) float8 or int8; with a `block_type`, (rows, bytes of a row) uint8."""
    scale: Tensor | None = None
    """float32, one number for the whole matrix, or (rows, 1); None is 1."""
    block_type: str | None = None
    """A name in `ggml.BLOCK_TYPES`."""
    input_scale: Tensor | None = None
    """What the file proposes to divide inputs by, for hosts that multiply in fp8; the layer here multiplies exactly."""
    exact_product: bool = True
    """Whether even such hosts should widen the weight instead."""
    fp8_product: bool = False
    """Whether the layer quantises its input, too, and multiplies in fp8; for float8_e4m3fn with a scale per row."""

    @property
    def shape(self) -> tuple[int, int]:
        rows, stored = self.values.shape
        return rows, columns(stored, self.block_type) if self.block_type else stored

    def scale_per_row(self) -> Tensor:
        """(rows, 1)."""
        scale = torch.ones(()) if self.scale is None else self.scale
        return scale.expand(len(self.values), 1)

    def floats(self) -> list[Tensor]:
        """Everything in it that can be NaN or infinite."""
        values = halves(self.values, self.block_type) if self.block_type else self.values
        return [tensor for tensor in (values, self.scale, self.input_scale) if tensor is not None]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, columns), computed in float32 and rounded once."""
        if self.block_type:
            return dequantize(self.values, self.block_type).to(dtype)
        if self.scale is None:
            return self.values.to(dtype)
        return (self.values.to(torch.float32) * self.scale).to(dtype)


class QuantizedLinear(nn.Module):
    """A linear layer over a quantised weight, in the dtype of its input.

    With `fp8_product`, a device that cannot multiply so gets the exact product with the widened weight.
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
        return QuantizedWeight(self.values, self.scale, self.block_type, fp8_product=self.fp8_product)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as an ordinary matrix (out_features, in_features)."""
        return self.weight.dequantized(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8_product and self.scale is not None and refusal(x.device) is None:
            return linear_rowwise(x, self.values, self.scale, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized(x.dtype), bias)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn values and the one float32 scale that brings the largest to the end of the range.

    weight = values * scale, with a relative error of at most 1/16 for all but the tiniest weights.
    """
    scale = nonzero(weight.abs().amax().float() / LARGEST)
    return (weight.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and one float32 scale per row, (rows, 1)."""
    scale = nonzero(weight.abs().amax(dim=1, keepdim=True).float() / 127)
    return (weight.float() / scale).round().to(torch.int8), scale


def quantize_fp8_rowwise(weight: Tensor) -> QuantizedWeight:
    """float8_e4m3fn values and one float32 scale per row, to be multiplied in fp8.

    Raises:
        ValueError: a size that GPUs cannot multiply so.
    """
    if not can_multiply(weight.shape):
        rows, columns = weight.shape
        raise ValueError(
            f"A weight of {rows} x {columns} cannot be multiplied in fp8, where sizes are multiples of 16; use fp8 or int8."
        )
    return QuantizedWeight(*quantize_rows(weight), fp8_product=True)


QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "fp8": lambda weight: QuantizedWeight(*quantize_fp8(weight)),
    FP8_ROWWISE: quantize_fp8_rowwise,
    "int8": lambda weight: QuantizedWeight(*quantize_int8(weight)),
    "q4_0": lambda weight: QuantizedWeight(quantize_q4_0(weight), block_type="Q4_0"),
}
"""How a (rows, columns) weight can be quantised while it is loaded."""
