"""Parts of the autoencoder that are causal in time: convolution, per-frame norm, residual block, temporal attention.

Frames may arrive in pieces: whatever a layer needs from earlier frames comes in as a cache and goes out as the next one,
and None means that the clip starts here. Shapes: (B, C, T, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_GROUPS = 32
# CUDA refuses attention over more batch entries than fit a 16-bit grid, and every pixel is one.
MAX_ATTENTION_BATCH = 2**15

ConvCache = Tensor | None
ResBlockCache = tuple[ConvCache, ConvCache] | None


def causal_conv(conv: nn.Conv3d, x: Tensor, cache: ConvCache) -> tuple[Tensor, Tensor]:
    """Convolve frames that never see later ones; borders are replicated in space, the first frame in time.

    Returns the output and the input frames that the next call still needs.
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    if cache is None:
        cache = x[:, :, :1].expand(-1, -1, kernel - 1, -1, -1)
    frames = torch.cat((cache, x), dim=2)
    consumed = ((frames.shape[2] - kernel) // stride + 1) * stride
    cache = frames[:, :, consumed:].clone()
    halo_h, halo_w = ((size - 1) // 2 for size in conv.kernel_size[1:])
    return conv(F.pad(frames, (halo_w, halo_w, halo_h, halo_h, 0, 0), mode="replicate")), cache


def frame_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group norm with the statistics of each frame alone."""
    batch = x.shape[0]
    return norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)


class ResBlock(nn.Module):
    """Two normed causal convolutions around a skip, optionally followed by temporal attention."""

    def __init__(self, channels: int, head_dim: int | None = None, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.stack = nn.ModuleList(
            layer
            for _ in range(2)
            for layer in (
                ops.GroupNorm(NORM_GROUPS, channels, **factory),
                nn.SiLU(inplace=True),
                ops.Conv3d(channels, channels, kernel_size=3, **factory),
            )
        )
        self.attn_block = TemporalAttentionBlock(channels, head_dim, ops=ops, **factory) if head_dim else None

    def forward(self, x: Tensor, cache: ResBlockCache = None) -> tuple[Tensor, ResBlockCache]:
        norm_1, silu, conv_1, norm_2, _, conv_2 = self.stack
        cache_1, cache_2 = cache or (None, None)
        h, cache_1 = causal_conv(conv_1, silu(frame_norm(norm_1, x)), cache_1)  # pyright: ignore[reportArgumentType]
        h, cache_2 = causal_conv(conv_2, silu(frame_norm(norm_2, h)), cache_2)  # pyright: ignore[reportArgumentType]
        x = x + h
        return x if self.attn_block is None else self.attn_block(x), (cache_1, cache_2)


class TemporalAttentionBlock(nn.Module):
    """Each pixel attends to itself in this and earlier frames; added to the input."""

    def __init__(self, channels: int, head_dim: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = ops.GroupNorm(NORM_GROUPS, channels, **factory)
        self.attn = TemporalAttention(channels, head_dim, ops=ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[3]
        pixels = rearrange(frame_norm(self.norm, x), "b c t h w -> (b h w) t c")
        batches = [self.attn(batch) for batch in pixels.split(MAX_ATTENTION_BATCH)]
        return x + rearrange(torch.cat(batches), "(b h w) t c -> b c t h w", b=x.shape[0], h=height)


class TemporalAttention(nn.Module):
    def __init__(self, channels: int, head_dim: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = ops.Linear(channels, 3 * channels, bias=False, **factory)
        self.out = ops.Linear(channels, channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(pixels, T, C) to the same shape."""
        q, k, v = rearrange(self.qkv(x), "b t (qkv h d) -> qkv b h t d", qkv=3, d=self.head_dim)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(out, "b h t d -> b t (h d)"))
