"""Matrix products in fp8: float8_e4m3fn operands with a float32 scale per row, float32 accumulation, bfloat16 results.

The input is also quantised, row by row on the fly, which changes the result more than a quantised weight alone.
"""

from __future__ import annotations

from functools import cache
from warnings import warn

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.denoiser import FP8

FP8_MAX = torch.finfo(FP8).max
ALIGNMENT = 16
"""Rows and columns of a weight must be multiples of this: PyTorch's `scaled_mm` rejects other sizes on CUDA devices."""
QUANTIZE_ROW_CHUNK = {"cpu": 2048, "default": 8192}
"""Rows that `quantize_rows` processes at a time, by device type, to keep its float32 intermediates small; more on a GPU, where
every kernel launch costs."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) to float8_e4m3fn values (N, K) and float32 scales (N, 1) that map each row's largest magnitude to `FP8_MAX`."""
    if kernels.fused(x):
        return kernels.quantize_rows(x)
    if torch.compiler.is_compiling():  # fused code has no intermediates, and every loop length would recompile
        return _quantize(x)
    values, scale = x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
    rows = QUANTIZE_ROW_CHUNK.get(x.device.type, QUANTIZE_ROW_CHUNK["default"])
    for start in range(0, len(x), rows):
        chunk = slice(start, start + rows)
        values[chunk], scale[chunk] = _quantize(x[chunk])
    return values, scale


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = safe_scale(x.abs().amax(dim=1, keepdim=True).float() / FP8_MAX)
    return (x / scale).to(FP8), scale


def supports_scaled_mm(shape: tuple[int, ...]) -> bool:
    """Whether `scaled_mm` can multiply by a weight of this shape on GPUs: a matrix with both sizes multiples of 16."""
    return len(shape) == 2 and not any(size % ALIGNMENT for size in shape)


def safe_scale(scale: Tensor) -> Tensor:
    """Scales to divide by: 1 in place of 0, the scale of all-zero values."""
    return torch.where(scale == 0, 1.0, scale)


def linear_rowwise(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in fp8: `x` (..., K), `weight` (M, K) float8_e4m3fn, `scale` (M, 1) to (..., M) in the dtype of `x`."""
    out = multiply_rowwise(*quantize_rows(x.flatten(0, -2)), weight, scale, bias)
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


def multiply_rowwise(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x * x_scale) @ (weight * scale).T + bias in bfloat16, the only output dtype that all devices support.

    `x` (N, K) and `weight` (M, K) are float8_e4m3fn, their scales (N, 1) and (M, 1) float32; the result is (N, M).
    """
    if not len(x):  # an empty prompt; older PyTorch rejects it on GPUs
        return scale.new_empty(0, len(weight), dtype=torch.bfloat16)
    bias = None if bias is None else bias.to(torch.bfloat16)
    if hasattr(F, "scaled_mm"):  # since PyTorch 2.10
        row = F.ScalingType.RowWise
        return F.scaled_mm(x, weight.t(), x_scale, row, scale.t(), row, bias=bias, output_dtype=torch.bfloat16)
    older = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return older(x, weight.t(), x_scale, scale.t(), bias=bias, out_dtype=torch.bfloat16)


@torch.compiler.assume_constant_result
def unsupported_reason(device: torch.device) -> str | None:
    """Why `scaled_mm` with row-wise scales fails on `device`, or None if it works.

    Each device is probed once, with a 16x16 product; a failure is also reported in a warning.
    """
    return _probe(device)


@cache
def _probe(device: torch.device) -> str | None:
    try:
        values, scale = quantize_rows(torch.ones(ALIGNMENT, ALIGNMENT, device=device))
        multiply_rowwise(values, scale, values, scale)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        warn(
            f"{device} cannot multiply in fp8 with a scale per row, so weights are dequantised instead: {reason}",
            stacklevel=2,
        )
        return reason
    return None
