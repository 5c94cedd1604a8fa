"""The autoencoder's kernels as PyTorch operators: their arguments, results and launch grids.

Clips are (B, C, T, H, W); they may be slices along any axis but the last. G is the number of groups of a norm.
"""

# Annotations are not postponed: custom_op infers its schema from them, and PyTorch 2.4 cannot parse strings.

import torch
from torch import Tensor
from torch.library import custom_op

from .launch import dense, launch, warps

BLOCK = 2048
"""Pixels of one channel of one frame per program."""
PAST = 2
"""Frames that precede the input of a convolution over three frames."""


@custom_op("mochi::frame_sums", mutates_args=())
def frame_sums(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations of each channel of each frame of `x`, in pieces: (B, T, C, pieces, 2) float32."""
    from . import triton_autoencoder as kernels

    x, out = dense(x), _sums(x)
    batch, channels, frames, height, width = x.shape
    grid = (batch * frames * channels, out.shape[3])
    sizes = channels, frames, height * width, *x.stride()[:4], width
    launch(kernels.frame_sums, grid, x, out, *sizes, BLOCK=BLOCK, num_warps=warps(BLOCK))
    return out


@custom_op("mochi::merge_sums", mutates_args=())
def merge_sums(sums: Tensor, groups: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, G, T) of each channel group from the result of `frame_sums`, for frames of `pixels` pixels."""
    from . import triton_autoencoder as kernels

    mean, variance = _statistics(sums, groups)
    batch, frames, channels, pieces, _ = sums.shape
    grid = (batch * frames * groups,)
    constants = {"MEMBERS": channels // groups * pieces, "BLOCK": 256, "PIECE": BLOCK, "num_warps": 4}
    launch(kernels.merge_sums, grid, sums, mean, variance, frames, groups, pieces, pixels, **constants)
    return mean, variance


@custom_op("mochi::norm_silu_pad", mutates_args=("kept",))
def norm_silu_pad(
    x: Tensor, past: Tensor | None, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float,
    above: bool, below: bool, kept: Tensor,
) -> Tensor:  # fmt: skip
    """silu(group_norm(x)) of `x` (B, C, T, H, W) with given statistics, after two earlier frames and padded for a convolution.

    Args:
        past: (B, C, 2, H, W), the previous two input frames of the convolution; None repeats the first frame.
        mean, variance: (B, G, T) float32.
        weight, bias: (C,), those of the norm.
        above, below: whether to replicate the border there, as is done left and right. Where it is not, the outermost row of `x`
            belongs to a neighbouring strip.
        kept: (B, C, 2, H or less, W), receives the last two frames of the result without padding and neighbouring rows.

    Returns:
        (B, C, 2 + T, above + H + below, W + 2).
    """
    from . import triton_autoencoder as kernels

    x, out = dense(x), _padded(x, above, below)
    batch, channels, frames, height, width = x.shape
    own = height - (not above) - (not below)
    for given, rows in ((past, height), (kept, own)):
        if given is not None and (given.shape != (batch, channels, PAST, rows, width) or given.device != x.device):
            raise ValueError(
                f"Two frames of {(*given.shape,)} on {given.device} do not fit {(*x.shape,)} on {x.device}."
            )
    before = None if past is None else dense(past)
    pixels = out.shape[3] * out.shape[4]
    launch(
        kernels.norm_silu_pad, (batch * channels * out.shape[2], -(-pixels // BLOCK)),
        x, before, mean, variance, weight, bias, out, kept,
        channels, frames, height, width, mean.shape[1], int(above), own, pixels,
        *x.stride()[:4], *_steps(before), *kept.stride()[:4],
        EPS=eps, HAS_PAST=past is not None, BLOCK=BLOCK, num_warps=warps(BLOCK),
    )  # fmt: skip
    return out


def _sums(x: Tensor) -> Tensor:
    batch, channels, frames, height, width = x.shape
    return x.new_empty(batch, frames, channels, -(-height * width // BLOCK), 2, dtype=torch.float32)


def _statistics(sums: Tensor, groups: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = len(sums), groups, sums.shape[1]
    return sums.new_empty(shape), sums.new_empty(shape)


def _padded(x: Tensor, above: bool, below: bool) -> Tensor:
    batch, channels, frames, height, width = x.shape
    return x.new_empty(batch, channels, PAST + frames, above + height + below, width + 2)


frame_sums.register_fake(_sums)
merge_sums.register_fake(_statistics)
norm_silu_pad.register_fake(lambda x, *rest: _padded(x, *rest[-3:-1]))


def _steps(x: Tensor | None) -> tuple[int, ...]:
    """Strides of samples, channels, frames and rows."""
    return (0,) * 4 if x is None else x.stride()[:4]
