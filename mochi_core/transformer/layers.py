"""Small parts of the denoiser: norms and gates in float32, embedders, feed-forward, output layer.

Modules build their layers from an `ops` namespace (torch.nn by default), so that a host can bring its own casting,
offloading or quantised layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-6
TIMESTEP_SCALE = 1000.0
ROWS = {"cpu": 256}
"""Tokens at a time in norms, gates and rotations, so that little is held in float32: on a CPU, what its caches hold."""
MANY_ROWS = 2048
"""Elsewhere, where every call of a kernel costs."""
FEED_FORWARD_ROWS = 16384
"""Tokens at a time in a feed-forward. Many, because a layer may have to fetch or widen its weight for each call."""


def rows_at_a_time(x: Tensor) -> int:
    """Of each sample of a batch (B, L, ...); all, if a compiler fuses the operations and so holds nothing in between."""
    if torch.compiler.is_compiling():
        return x.shape[1]
    return max(1, ROWS.get(x.device.type, MANY_ROWS) // x.shape[0])


def by_rows(function: Callable[..., Tensor], *tensors: Tensor, rows: int | None = None) -> Tensor:
    """function(*tensors) in the shape and dtype of the first, (B, L, D), for a function that treats all rows alike.

    At most `rows` rows of the batch are given to it at a time, so that what it holds in between stays small.
    """
    batch, length = tensors[0].shape[:2]
    rows = rows_at_a_time(tensors[0]) if rows is None else max(1, rows // batch)
    if length <= rows:
        return function(*tensors)
    out = torch.empty_like(tensors[0])
    for start in range(0, length, rows):
        some = slice(start, start + rows)
        out[:, some] = function(*(tensor[:, some] for tensor in tensors))
    return out


def rms_norm(x: Tensor) -> Tensor:
    """RMS norm without weight over the last axis, in and out of float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)


def modulated_norm(x: Tensor, scale: Tensor) -> Tensor:
    """rms_norm(x) * (1 + scale) in the dtype of `x` (B, L, D); `scale` (B, D)."""
    factor = 1 + scale.float()[:, None]
    return by_rows(lambda x: (rms_norm(x) * factor).to(x.dtype), x)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + rms_norm(branch) * tanh(gate), rounded once; `x` and `branch` (B, L, D), `gate` (B, D)."""
    gate = gate.float().tanh()[:, None]
    return by_rows(lambda x, branch: torch.addcmul(x.float(), rms_norm(branch), gate).to(x.dtype), x, branch)


class PatchEmbed(nn.Module):
    """Each patch of each latent frame becomes one token; tokens run over frames, rows, columns."""

    def __init__(self, channels: int, patch_size: int, width: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = ops.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size, **factory)

    def forward(self, latents: Tensor) -> Tensor:
        num_latents = latents.shape[2]
        frames = rearrange(latents, "b c t h w -> (b t) c h w")
        return rearrange(self.proj(frames), "(b t) d h w -> b (t h w) d", t=num_latents)


class TimestepEmbedder(nn.Module):
    def __init__(self, features: int, width: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(ops.Linear(features, width, **factory), nn.SiLU(), ops.Linear(width, width, **factory))

    def forward(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """(...) noise levels in [0, 1] to (..., width); the sinusoids are float32 whatever `dtype` is."""
        timestep = (1 - sigma.float()) * TIMESTEP_SCALE
        half = self.features // 2
        exponents = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = timestep[..., None] * torch.exp(-math.log(10000.0) * exponents)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))


class AttentionPool(nn.Module):
    """One vector per prompt: the mean token attends to itself and to all tokens."""

    def __init__(self, text_width: int, num_heads: int, width: int, *, ops: Any, **factory: Any) -> None:
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
        q = rearrange(self.to_q(mean), "b l (h d) -> b h l d", h=self.num_heads)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=valid)  # (B, heads, 1, head_dim)
        return self.to_out(pooled.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.w1 = ops.Linear(width, 2 * hidden, bias=False, **factory)
        self.w2 = ops.Linear(hidden, width, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self._swiglu, x, rows=FEED_FORWARD_ROWS)

    def _swiglu(self, x: Tensor) -> Tensor:
        return self.w2(by_rows(lambda gate, value: F.silu(gate) * value, *self.w1(x).chunk(2, dim=-1)))


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch_features: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.mod = ops.Linear(width, 2 * width, **factory)
        self.linear = ops.Linear(width, patch_features, **factory)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`x` (B, N, width), `modulation` (B, 2 * width) to (B, N, patch_features)."""
        shift, scale = modulation.float()[:, None].chunk(2, dim=-1)
        factor = 1 + scale

        def modulated(x: Tensor) -> Tensor:
            return (F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS) * factor + shift).to(x.dtype)

        return self.linear(by_rows(modulated, x))
