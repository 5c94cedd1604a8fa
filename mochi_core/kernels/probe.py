"""Small trial calls of every operator on a device, each compared with a few lines of plain PyTorch.

Compilers, drivers and cards differ in what they support: a kernel that does not work must be found before a run, not during it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autoencoder, denoiser

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest error for values around 1, by dtype."""
EPS = 1e-6
HEADS, HEAD_DIM = 3, 128
Found = Iterator[tuple[str, Tensor, Tensor]]
"""Names of operators, their results, and the expected results in float32."""


def probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels in trial calls with tensors of that dtype, as a clause; None if nothing is."""
    for calls in (_of_streams, _of_heads, _of_frames):
        for name, found, expected in calls(device, dtype):
            error = (found.float() - expected).abs().max().item()
            if not error <= TOLERANCE[dtype]:
                return f"{name} gave a wrong result, off by {error:.2g}"
    return None


def _values(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Pseudo-random numbers from -1 to 1, exact in `dtype`."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 0.7).sin().view(shape).to(device, dtype)


def _rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()


def _of_streams(device: torch.device, dtype: torch.dtype) -> Found:
    x, branch = _values(device, dtype, 2, 2, 3, 96)
    scale, gate, shift = _values(device, dtype, 3, 2, 96)
    plain_x, plain_branch, plain_scale, plain_gate, plain_shift = (t.float() for t in (x, branch, scale, gate, shift))
    factor, gated = 1 + plain_scale[:, None], plain_x + _rms(plain_branch) * plain_gate[:, None].tanh()
    yield "modulated_norm", denoiser.modulated_norm(x, scale, EPS), _rms(plain_x) * factor
    yield "gated_residual", denoiser.gated_residual(x, branch, gate, EPS), gated
    total, normed = denoiser.gated_residual_norm(x, branch, gate, scale, EPS)
    yield "gated_residual_norm", total, gated
    yield "gated_residual_norm", normed, _rms(gated) * factor
    left, right = plain_x.chunk(2, dim=-1)
    yield "swiglu", denoiser.swiglu(x), F.silu(left) * right
    expected = F.layer_norm(plain_x, (96,), eps=EPS) * factor + plain_shift[:, None]
    yield "final_norm", denoiser.final_norm(x, shift, scale, EPS), expected
    values, factors = (found.cpu() for found in denoiser.quantize_rows(x.flatten(0, 1)))
    rows = x.flatten(0, 1).cpu()  # on the CPU, where PyTorch can always convert to fp8
    factor = rows.abs().amax(dim=1, keepdim=True).float() / torch.finfo(values.dtype).max
    yield "quantize_rows", values.float() * factors, (rows / factors).to(values.dtype).float() * factor


def _of_heads(device: torch.device, dtype: torch.dtype) -> Found:
    """Two frames of two tokens each, and one text token."""
    visual, text = (_values(device, dtype, 1, count, 3 * HEADS * HEAD_DIM) for count in (4, 1))
    weight = 1 + _values(device, torch.float32, HEAD_DIM) / 2
    angles = _values(device, torch.float32, 4, HEADS, HEAD_DIM // 2)
    frames, spatial = torch.polar(torch.ones_like(angles), angles).chunk(2)
    found = denoiser.joint_heads(
        visual, text, weight, weight, weight, weight, torch.view_as_real(frames), torch.view_as_real(spatial), EPS
    )
    x, y = (packed.float().unflatten(-1, (3, HEADS, HEAD_DIM)) for packed in (visual, text))
    turns = (frames[:, None] * spatial).flatten(0, 1)
    for i in range(2):
        pairs = torch.view_as_complex((_rms(x[:, :, i]) * weight).unflatten(-1, (-1, 2)))
        rotated = torch.view_as_real(pairs * turns).flatten(-2)
        yield "joint_heads", found[i], torch.cat((rotated, _rms(y[:, :, i]) * weight), dim=1)
    yield "joint_heads", found[2], torch.cat((x[:, :, 2], y[:, :, 2]), dim=1)


def _of_frames(device: torch.device, dtype: torch.dtype) -> Found:
    """One frame alone, then after two earlier ones; the last two frames are kept."""
    x, past = _values(device, dtype, 1, 4, 1, 6, 5), _values(device, dtype, 1, 4, 2, 6, 5)
    weight, bias = _values(device, dtype, 2, 4)
    statistics = *autoencoder.merge_sums(autoencoder.frame_sums(x), 2, 30), weight, bias, EPS
    now = F.silu(F.group_norm(x[:, :, 0].float(), 2, weight.float(), bias.float(), EPS))[:, :, None]
    for before in (None, past):
        found = autoencoder.norm_silu_pad(x, before, *statistics, True, True, kept := torch.empty_like(past))
        frames = torch.cat((now.expand(-1, -1, 2, -1, -1) if before is None else before.float(), now), dim=2)
        yield "norm_silu_pad", found, F.pad(frames, (1, 1, 1, 1, 0, 0), mode="replicate")
        yield "norm_silu_pad", kept, frames[:, :, -2:]
