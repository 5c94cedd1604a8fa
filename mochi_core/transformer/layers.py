"""Small parts of the denoiser: norms and gates in float32, embedders, feed-forward, output layer.

Every layer treats tokens independently, so that they can be divided among the members of a group; only attention relates them.
Modules build their layers from an `Ops` namespace, torch.nn by default, so that a host can supply its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import kernels
from ..ops import Ops

NORM_EPS = 1e-6
"""Added to mean squares and variances in norms without a weight: the default of `modulated_rmsnorm` and
`residual_tanh_gated_rmsnorm`, and the LayerNorm before the output, in Genmo's joint_model/."""
TIMESTEP_SCALE = 1000.0
"""Timestep of clean data: `timestep_scale` in Genmo's configuration of the denoiser, pipelines.py."""
TIMESTEP_PERIOD = 10000.0
"""Longest period of the timestep's sinusoids, over 2 pi: `max_period` of `timestep_embedding`, Genmo's joint_model/layers.py."""
TOKEN_CHUNK = {"cpu": 256}
"""Tokens at a time in norms, gates and rotations, by device type: as many as fit in a CPU's caches in float32."""
DEFAULT_TOKEN_CHUNK = 24576
"""Tokens at a time on other devices, where every kernel launch costs: float32 copies of this many need no more memory than
attention for 163 frames of 848x480."""
FEED_FORWARD_TOKEN_CHUNK = 16384
"""Tokens at a time in a feed-forward: many, because a layer may have to fetch or dequantise its weight on each call."""

Function = TypeVar("Function", bound=Callable[..., Any])


def token_chunk(x: Tensor, default: int = DEFAULT_TOKEN_CHUNK) -> int:
    """How many tokens of each sample of `x` (B, L, ...) to process at a time, so that little is held in float32.

    `default` is for devices that `TOKEN_CHUNK` does not list. When compiling it is all tokens, because a compiler fuses the
    operations and so has no intermediates.
    """
    if torch.compiler.is_compiling():
        return x.shape[1]
    return max(1, TOKEN_CHUNK.get(x.device.type, default) // x.shape[0])


def apply_chunked(function: Callable[..., Tensor], *tensors: Tensor, tokens: int | None = None) -> Tensor:
    """function(*tensors) in the shape and dtype of the first, (B, L, D), for a function that treats tokens independently.

    The function may return a wider dtype.

    It is given at most `tokens` tokens of the whole batch at a time, by default `token_chunk` of each sample, to keep its
    intermediates small. With gradients it is called once: they would keep all intermediates, and copy everything per chunk.
    """
    batch, length = tensors[0].shape[:2]
    chunk = token_chunk(tensors[0]) if tokens is None else max(1, tokens // batch)
    if length <= chunk or _have_gradient(*tensors):
        return function(*tensors).to(tensors[0].dtype)
    out = torch.empty_like(tensors[0])
    for start in range(0, length, chunk):
        some = slice(start, start + chunk)
        out[:, some] = function(*(tensor[:, some] for tensor in tensors))
    return out


def _have_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def rms_norm(x: Tensor) -> Tensor:
    """RMS norm without weight over the last axis, computed and returned in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)


def scaled_rms_norm(x: Tensor, factor: Tensor) -> Tensor:
    """rms_norm(x) * factor in float32; `x` (B, L, D), `factor` (B, D) float32, or (1, D) for all samples."""
    if len(factor) > 1 or x.device.type == "cpu":
        return rms_norm(x) * factor[:, None]
    # As the norm's weight, which saves a kernel. A CPU gains nothing.
    return F.rms_norm(x.float(), x.shape[-1:], factor[0], eps=NORM_EPS)


def by_frame(streams: int) -> Callable[[Function], Function]:
    """Let a function of `streams` tensors (B, L, D) and modulations (B, D) also accept per-frame modulations (B or 1, T, D).

    Tokens are ordered by frame: each frame of L / T tokens becomes a sample with its own modulation.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def modulated(*arguments: Any) -> Any:
            if arguments[-1].ndim == 2:
                return function(*arguments)
            batch, frames = len(arguments[0]), arguments[-1].shape[1]
            tokens = (x.unflatten(1, (frames, -1)).flatten(0, 1) for x in arguments[:streams])  # (B * T, L / T, D)
            rows = (m.expand(batch, -1, -1).flatten(0, 1) for m in arguments[streams:])  # (B * T, D)
            out: Any = function(*tokens, *rows)
            joined = [x.unflatten(0, (batch, frames)).flatten(1, 2) for x in (out if isinstance(out, tuple) else [out])]
            return tuple(joined) if isinstance(out, tuple) else joined[0]

        return cast(Function, modulated)

    return decorate


@by_frame(streams=1)
def modulated_norm(x: Tensor, scale: Tensor) -> Tensor:
    """rms_norm(x) * (1 + scale) in the dtype of `x` (B, L, D); `scale` (B, D)."""
    if kernels.fused(x, scale):
        return kernels.modulated_norm(x, scale, NORM_EPS)
    factor = 1 + scale.float()
    return apply_chunked(lambda x: scaled_rms_norm(x, factor), x)


@by_frame(streams=2)
def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + rms_norm(branch) * tanh(gate), rounded once; `x` and `branch` (B, L, D), `gate` (B, D)."""
    if kernels.fused(x, branch, gate):
        return kernels.gated_residual(x, branch, gate, NORM_EPS)
    gate = gate.float().tanh()
    if x.device.type == "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return apply_chunked(lambda x, branch: torch.addcmul(x.float(), rms_norm(branch), gate[:, None]), x, branch)
    out = torch.empty_like(x)
    for start in range(0, x.shape[1], token_chunk(x)):
        some = slice(start, start + token_chunk(x))
        torch.add(x[:, some], scaled_rms_norm(branch[:, some], gate), out=out[:, some])  # without a float32 copy of x
    return out


@by_frame(streams=2)
def gated_residual_norm(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gated residual, and its modulated norm for the next layer; shapes as in `gated_residual` and `modulated_norm`."""
    if kernels.fused(x, branch, gate, scale):
        return kernels.gated_residual_norm(x, branch, gate, scale, NORM_EPS)
    x = gated_residual(x, branch, gate)
    return x, modulated_norm(x, scale)


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) * value of `packed` (B, L, 2 * H), gate first, to (B, L, H)."""
    if kernels.fused(packed):
        return kernels.swiglu(packed)
    return apply_chunked(lambda gate, value: F.silu(gate).mul_(value), *packed.chunk(2, dim=-1))


@by_frame(streams=1)
def final_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift in the dtype of `x` (B, L, D), rounded once; `shift` and `scale` (B, D)."""
    if kernels.fused(x, shift, scale):
        return kernels.final_norm(x, shift, scale, NORM_EPS)
    shift, factor = shift.float(), 1 + scale.float()

    def modulated(x: Tensor) -> Tensor:
        if len(factor) == len(shift) == 1 and x.device.type != "cpu":
            return F.layer_norm(x.float(), x.shape[-1:], factor[0], shift[0], eps=NORM_EPS)
        return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS) * factor[:, None] + shift[:, None]

    return apply_chunked(modulated, x)


class PatchEmbed(nn.Module):
    """One token per patch of each latent frame, ordered by frame, row, column."""

    def __init__(self, channels: int, patch_size: int, width: int, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.proj = ops.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size, **factory)

    def forward(self, latents: Tensor) -> Tensor:
        """`latents` (B, C, T, H, W) to (B, N, width)."""
        num_latents = latents.shape[2]
        frames = rearrange(latents, "b c t h w -> (b t) c h w")
        patches = self.proj(frames)  # (B * T, width, H / patch, W / patch)
        return rearrange(patches, "(b t) d h w -> b (t h w) d", t=num_latents)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, cosines first, through a two-layer MLP."""

    def __init__(self, features: int, width: int, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(ops.Linear(features, width, **factory), nn.SiLU(), ops.Linear(width, width, **factory))

    def forward(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """`sigma` (...), noise levels in [0, 1], to (..., width) in `dtype`; the sinusoids are always float32."""
        timestep = (1 - sigma.float()) * TIMESTEP_SCALE
        half = self.features // 2
        exponents = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = timestep[..., None] * torch.exp(-math.log(TIMESTEP_PERIOD) * exponents)  # (..., features / 2)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))


class AttentionPool(nn.Module):
    """One vector per prompt, by attention with a single query: the mean token attends to itself and all tokens."""

    def __init__(self, text_width: int, num_heads: int, width: int, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_kv = ops.Linear(text_width, 2 * text_width, **factory)
        self.to_q = ops.Linear(text_width, text_width, **factory)
        self.to_out = ops.Linear(text_width, width, **factory)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """`tokens` (B, L, text_width), zero where `mask` (B, L) is False, to (B, width). L may be 0."""
        count = mask.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (tokens.float().sum(dim=1) / count).to(tokens.dtype)[:, None]  # (B, 1, text_width)
        keys = torch.cat((mean, tokens), dim=1)  # (B, 1 + L, text_width)
        valid = F.pad(mask, (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + L)
        k, v = rearrange(self.to_kv(keys), "b l (kv h d) -> kv b h l d", kv=2, h=self.num_heads)
        q = rearrange(self.to_q(mean), "b l (h d) -> b h l d", h=self.num_heads)  # (B, heads, 1, head_dim)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=valid)  # (B, heads, 1, head_dim)
        return self.to_out(pooled.flatten(1))


class FeedForward(nn.Module):
    """w2(swiglu(w1(x)))."""

    def __init__(self, width: int, hidden: int, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.w1 = ops.Linear(width, 2 * hidden, bias=False, **factory)
        self.w2 = ops.Linear(hidden, width, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, L, width) to the same shape."""
        # The result of w1 gets no name, which would keep it alive until w2 is done.
        return apply_chunked(lambda x: self.w2(swiglu(self.w1(x))), x, tokens=FEED_FORWARD_TOKEN_CHUNK)


class FinalLayer(nn.Module):
    """Modulated LayerNorm without weights, and the projection of each token to the values of its patch."""

    def __init__(self, width: int, patch_features: int, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.mod = ops.Linear(width, 2 * width, **factory)
        self.linear = ops.Linear(width, patch_features, **factory)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`x` (B, N, width), `modulation` (B or 1, 2 * width), or per frame (B or 1, T, 2 * width), to (B, N, patch_features)."""
        return self.linear(final_norm(x, *modulation.chunk(2, dim=-1)))
