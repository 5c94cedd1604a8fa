"""Products in fp8: either matrix has a float32 scale per row, sums are float32, results bfloat16.

The rows of the input are quantised when they come, so unlike a quantised weight alone this changes the result on both sides.
"""

from __future__ import annotations

from functools import cache
from warnings import warn

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
ALIGNMENT = 16
"""Rows and columns of a weight have to be multiples of this many."""
ROWS = 2048
"""Rows that are quantised at a time, so that little is held in float32."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) to float8_e4m3fn values and the float32 scales (N, 1) that bring each row's largest to the end of the range."""
    if torch.compiler.is_compiling():  # which holds nothing in between, and would compile anew for every other loop
        return _quantize(x)
    values, scale = x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
    for start in range(0, len(x), ROWS):
        some = slice(start, start + ROWS)
        values[some], scale[some] = _quantize(x[some])
    return values, scale


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = nonzero(x.abs().amax(dim=1, keepdim=True).float() / LARGEST)
    return (x / scale).to(FP8), scale


def can_multiply(shape: tuple[int, ...]) -> bool:
    """Whether there are GPUs that multiply by a weight of this shape."""
    return len(shape) == 2 and not any(size % ALIGNMENT for size in shape)


def nonzero(scale: Tensor) -> Tensor:
    """What is all zero gets the scale 1."""
    return torch.where(scale == 0, 1.0, scale)


def linear_rowwise(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` (..., K), `weight` (M, K) float8_e4m3fn, `scale` (M, 1) to (..., M) in the dtype of `x`."""
    out = multiply_rowwise(*quantize_rows(x.flatten(0, -2)), weight, scale, bias)
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


def multiply_rowwise(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, K) and (M, K) float8_e4m3fn with their scales (N, 1) and (M, 1) to (N, M) bfloat16, the one dtype of all devices."""
    if not len(x):  # a prompt without text; GPUs of older PyTorch refuse it
        return scale.new_empty(0, len(weight), dtype=torch.bfloat16)
    bias = None if bias is None else bias.to(torch.bfloat16)
    if hasattr(F, "scaled_mm"):  # since PyTorch 2.10
        row = F.ScalingType.RowWise
        return F.scaled_mm(x, weight.t(), x_scale, row, scale.t(), row, bias=bias, output_dtype=torch.bfloat16)
    older = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return older(x, weight.t(), x_scale, scale.t(), bias=bias, out_dtype=torch.bfloat16)


@torch.compiler.assume_constant_result
def refusal(device: torch.device) -> str | None:
    """Why such products cannot be had on a device, or None; the device itself is asked, once, and a warning says no."""
    return _refusal(device)


@cache
def _refusal(device: torch.device) -> str | None:
    try:
        values, scale = quantize_rows(torch.ones(ALIGNMENT, ALIGNMENT, device=device))
        multiply_rowwise(values, scale, values, scale)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        warn(
            f"{device} cannot multiply in fp8 with a scale per row, so weights are widened instead: {reason}",
            stacklevel=2,
        )
        return reason
    return None
