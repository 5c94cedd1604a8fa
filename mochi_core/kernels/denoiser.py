"""The denoiser's kernels as PyTorch operators: their arguments, results and launch grids.

B samples, N visual and L text tokens, K heads of D features; W is the width of a stream. Streams may be slices along their
first two axes. Modulations (B, W) may be slices of wider ones, or have a single row for all samples.
"""

# Annotations are not postponed: custom_op infers its schema from them, and PyTorch 2.4 cannot parse strings.

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .launch import dense, launch, next_power_of_two, warps

SWIGLU_BLOCK = 1024
"""Output values per program of `swiglu`."""
HEADS_BLOCK = 8
"""Heads of one token per program of `joint_heads`."""
FP8 = torch.float8_e4m3fn
"""The dtype of all fp8 matrix products and weights stored in fp8."""


@custom_op("mochi::modulated_norm", mutates_args=())
def modulated_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * (1 + scale) in the shape and dtype of `x` (B, N, W); `scale` (B, W)."""
    from . import triton_denoiser as kernels  # Triton is large, and may be missing

    _check(x, scale)
    x, scale, out = dense(x), dense(scale), _like_x(x)
    launch(kernels.modulated_norm, _per_token(x), x, scale, out, *_steps(x), _step(scale), EPS=eps, **_width(x))
    return out


@custom_op("mochi::gated_residual", mutates_args=())
def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, eps: float) -> Tensor:
    """x + rms_norm(branch) * tanh(gate) in the dtype of `x`; `x` and `branch` (B, N, W), `gate` (B, W)."""
    out = _like_x(x)
    _gated_residual(x, branch, gate, None, (out, None), eps)
    return out


@custom_op("mochi::gated_residual_norm", mutates_args=())
def gated_residual_norm(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and its `modulated_norm` by `scale` (B, W), computed before the sum is rounded."""
    out, normed = _like_x(x), _like_x(x)
    _gated_residual(x, branch, gate, scale, (out, normed), eps)
    return out, normed


def _gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor | None, outs: tuple[Tensor, Tensor | None], eps: float
) -> None:
    from . import triton_denoiser as kernels

    _check(x, gate, *(() if scale is None else (scale,)), branch=branch)
    x, branch, gate, scale = dense(x), dense(branch), dense(gate), None if scale is None else dense(scale)
    launch(
        kernels.gated_residual, _per_token(x), x, branch, gate, scale, *outs,
        *_steps(x), *branch.stride()[:2], _step(gate), 0 if scale is None else _step(scale),
        EPS=eps, NORM=scale is not None, **_width(x),
    )  # fmt: skip


@custom_op("mochi::swiglu", mutates_args=())
def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) * value of `packed` (B, N, 2 * H), gate first, to (B, N, H)."""
    from . import triton_denoiser as kernels

    packed, out = dense(packed), _halved(packed)
    hidden = out.shape[-1]
    grid = (*_per_token(packed), -(-hidden // SWIGLU_BLOCK))
    constants = {"WIDTH": hidden, "BLOCK": SWIGLU_BLOCK, "num_warps": 4}
    launch(kernels.swiglu, grid, packed, out, *_steps(packed), **constants)
    return out


@custom_op("mochi::final_norm", mutates_args=())
def final_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift in the shape and dtype of `x` (B, N, W); `shift` and `scale` (B, W)."""
    from . import triton_denoiser as kernels

    _check(x, shift, scale)
    x, shift, scale, out = dense(x), dense(shift), dense(scale), _like_x(x)
    steps = *_steps(x), _step(shift), _step(scale)
    launch(kernels.final_norm, _per_token(x), x, shift, scale, out, *steps, EPS=eps, **_width(x))
    return out


@custom_op("mochi::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (N, K) to float8_e4m3fn values (N, K) and float32 scales (N, 1), which map each row's largest magnitude to 448."""
    from . import triton_denoiser as kernels

    x, (values, scale) = dense(x), _quantized(x)
    block = next_power_of_two(x.shape[1])
    constants = {"WIDTH": x.shape[1], "BLOCK": block, "LARGEST": torch.finfo(FP8).max, "num_warps": warps(block)}
    launch(kernels.quantize_rows, (len(x),), x, values.view(torch.uint8), scale, x.stride(0), **constants)
    return values, scale


@custom_op("mochi::joint_heads", mutates_args=())
def joint_heads(
    visual: Tensor,
    text: Tensor,
    q_norm_x: Tensor,
    k_norm_x: Tensor,
    q_norm_y: Tensor,
    k_norm_y: Tensor,
    frames: Tensor,
    spatial: Tensor,
    eps: float,
    skipped: int = 0,
) -> Tensor:
    """q, k and v of both streams, (3, B, N + L, K, D), with q and k normed and the visual ones rotated.

    Args:
        visual, text: (B, N, 3 * K * D) and (B, L, 3 * K * D), the packed q, k and v of each stream.
        q_norm_x, k_norm_x, q_norm_y, k_norm_y: (D,), weights of the norms.
        frames, spatial: (T, K, D / 2, 2) and (patches, K, D / 2, 2) float32, the factors of the rotations, see `Rope`.
        eps: added to the mean square of a head.
        skipped: leading tokens of the first frame missing from `visual`, which may also end within the last frame.
    """
    from . import triton_denoiser as kernels

    visual, text, out = dense(visual), dense(text), _joint(visual, text, frames)
    _, batch, tokens, heads, head_dim = out.shape
    packed, norms = 3 * heads * head_dim, (q_norm_x, k_norm_x, q_norm_y, k_norm_y)
    past_last = len(frames) * len(spatial) - skipped - visual.shape[1]  # missing tokens of the last frame
    fits = min(skipped, past_last) >= 0 and max(skipped, past_last) < len(spatial)
    if not fits or not visual.shape[2] == text.shape[2] == packed:
        raise ValueError(
            f"Tokens {(*visual.shape,)} and {(*text.shape,)} do not fit a rotary table of {(*frames.shape,)}."
        )
    if len(text) != batch or any(norm.shape != (head_dim,) or not norm.is_contiguous() for norm in norms):
        raise ValueError(
            f"Norm weights must be contiguous ({head_dim},), and both streams must have the same number of samples."
        )
    _check_devices(visual, text, *norms, frames, spatial)
    block = min(HEADS_BLOCK, next_power_of_two(heads))
    features = next_power_of_two(head_dim)
    launch(
        kernels.joint_heads, (batch * tokens, -(-heads // block)),
        visual, text, q_norm_x, k_norm_x, q_norm_y, k_norm_y, frames.contiguous(), spatial.contiguous(), out,
        tokens, visual.shape[1], len(frames), len(spatial), skipped, *visual.stride()[:2], *text.stride()[:2], out.stride(0),
        HEADS=heads, HEAD_DIM=head_dim, EPS=eps, BLOCK=block, FEATURES=features, num_warps=warps(block * features),
    )  # fmt: skip
    return out


def _like_x(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _halved(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)


def _joint(visual: Tensor, text: Tensor, frames: Tensor) -> Tensor:
    """An empty (3, B, N + L, K, D)."""
    heads, half = frames.shape[1:3]
    return visual.new_empty(3, len(visual), visual.shape[1] + text.shape[1], heads, 2 * half)


for operator in (modulated_norm, gated_residual, final_norm):
    operator.register_fake(_like_x)
gated_residual_norm.register_fake(lambda x, *_: (_like_x(x), _like_x(x)))
swiglu.register_fake(_halved)
quantize_rows.register_fake(_quantized)
joint_heads.register_fake(lambda visual, text, *rest: _joint(visual, text, rest[4]))


def _check(x: Tensor, *modulations: Tensor, branch: Tensor | None = None) -> None:
    """Check shapes and devices: the kernels do not, and would read past the end of a tensor that is too small."""
    if any(m.shape not in ((len(x), x.shape[-1]), (1, x.shape[-1])) for m in modulations):
        raise ValueError(f"Modulations {[(*m.shape,) for m in modulations]} do not fit tokens {(*x.shape,)}.")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"A branch of {(*branch.shape,)} does not fit a stream of {(*x.shape,)}.")
    _check_devices(x, *modulations, *(() if branch is None else (branch,)))


def _check_devices(first: Tensor, *others: Tensor) -> None:
    if any(other.device != first.device for other in others):
        raise ValueError(
            f"Tensors are on {sorted({str(t.device) for t in (first, *others)})}; all must be on one device."
        )


def _per_token(x: Tensor) -> tuple[int]:
    return (x.shape[0] * x.shape[1],)


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Tokens per sample, and the strides of samples and tokens."""
    return x.shape[1], x.stride(0), x.stride(1)


def _step(modulation: Tensor) -> int:
    """Stride of a modulation's samples; 0 if it has one row for all."""
    return 0 if len(modulation) == 1 else modulation.stride(0)


def _width(x: Tensor) -> dict[str, Any]:
    block = next_power_of_two(x.shape[-1])
    return {"WIDTH": x.shape[-1], "BLOCK": block, "num_warps": warps(block)}
