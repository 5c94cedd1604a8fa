"""Blocks of the autoencoder, causal in time: residual block and temporal attention. Clips are (B, C, T, H, W).

Parameter names are those of Genmo's checkpoints. steps.py runs the blocks on a clip piece by piece.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ops import Ops

# Source of both: genmoai/mochi, src/genmo/mochi_preview/vae/models.py (GroupNormSpatial, ResBlock).
NORM_GROUPS = 32
# CUDA rejects attention over more batch entries than fit a 16-bit grid dimension, and every pixel is a batch entry; Genmo's
# models.py splits at the same number.
MAX_ATTENTION_BATCH = 2**15
CONV_SIZE = 3
RGB = 3


def frame_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Group norm of x (B, C, T, H, W) with per-frame statistics."""
    frames = norm(x.transpose(1, 2).flatten(0, 1))  # (B * T, C, H, W)
    return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def causal_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """3 x 3 x 3 convolution that never sees later frames; (B, C, T, H, W) to the same shape.

    Padding replicates the border in space and the first frame in time.
    """
    return convolve(conv, F.pad(x, (1, 1, 1, 1, CONV_SIZE - 1, 0), mode="replicate"))


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """3 x 3 x 3 convolution of a padded clip, (B, C, 2 + T, 2 + H, 2 + W) to (B, C', T, H, W).

    Where PyTorch would unfold the input, each output frame is computed by a 2D convolution with its three input frames stacked as
    channels. A host's own Conv3d subclass is called as is: it has its own workaround.
    """
    if type(conv) is not nn.Conv3d or not unfolds_conv3d(x):
        return conv(x)
    weight = conv.weight.flatten(1, 2)  # (C', 3 * C, 3, 3)
    starts = range(x.shape[2] - CONV_SIZE + 1)
    frames = [F.conv2d(x[:, :, t : t + CONV_SIZE].flatten(1, 2), weight, conv.bias) for t in starts]
    return torch.stack(frames, dim=2)


def unfolds_conv3d(x: Tensor) -> bool:
    """Whether PyTorch bypasses cuDNN for 3D convolutions of `x` and copies every value 27 times instead."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16) and leaves_out_cudnn()


@cache
def leaves_out_cudnn() -> bool:
    """Whether this PyTorch bypasses cuDNN in 16 bits, because some cuDNN versions get very large inputs wrong.

    PyTorch 2.9.0 does so with cuDNN 9.8 and later (pull request 163581), later releases with cuDNN 9.8 to 9.14 (166480); issue
    166643 reports the cost.
    """
    release = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:3])
    cudnn = 0 if torch.version.hip else torch.backends.cudnn.version() or 0
    return release >= (2, 9, 0) and cudnn >= 90800 and (cudnn < 91500 or release == (2, 9, 0))


def pointwise(linear: nn.Module, x: Tensor) -> Tensor:
    """Linear layer over the channels of x, (B, C, ...) to (B, C', ...)."""
    return linear(x.movedim(1, -1)).movedim(-1, 1)


class ResBlock(nn.Module):
    """Two causal convolutions with norms and a skip connection, optionally followed by temporal attention."""

    def __init__(self, channels: int, head_dim: int | None = None, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.stack = nn.ModuleList(
            layer
            for _ in range(2)
            for layer in (
                ops.GroupNorm(NORM_GROUPS, channels, **factory),
                nn.SiLU(),
                ops.Conv3d(channels, channels, kernel_size=CONV_SIZE, **factory),
            )
        )
        self.attn_block = TemporalAttentionBlock(channels, head_dim, ops=ops, **factory) if head_dim else None

    def norms_and_convs(self) -> tuple[nn.GroupNorm, nn.Conv3d, nn.GroupNorm, nn.Conv3d]:
        """The layers with parameters, in the order of use."""
        norm_1, _, conv_1, norm_2, _, conv_2 = self.stack
        return cast("tuple[nn.GroupNorm, nn.Conv3d, nn.GroupNorm, nn.Conv3d]", (norm_1, conv_1, norm_2, conv_2))

    def forward(self, x: Tensor) -> Tensor:
        norm_1, conv_1, norm_2, conv_2 = self.norms_and_convs()
        h = causal_conv(conv_1, F.silu(frame_norm(norm_1, x)))  # (B, C, T, H, W)
        h = causal_conv(conv_2, F.silu(frame_norm(norm_2, h)))  # (B, C, T, H, W)
        x = x + h
        return self.attn_block(x) if self.attn_block else x


class TemporalAttentionBlock(nn.Module):
    """Each pixel attends to itself in this and earlier frames; the result is added to the input."""

    def __init__(self, channels: int, head_dim: int, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.norm = ops.GroupNorm(NORM_GROUPS, channels, **factory)
        self.attn = TemporalAttention(channels, head_dim, ops=ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        pixels = rearrange(frame_norm(self.norm, x), "b c t h w -> (b h w) t c")  # (B * H * W, T, C)
        attended = self.attn(pixels)  # (B * H * W, T, C)
        return x + rearrange(attended, "(b h w) t c -> b c t h w", b=x.shape[0], w=x.shape[4])


class TemporalAttention(nn.Module):
    """Causal self-attention over frames with normalised queries and keys."""

    def __init__(self, channels: int, head_dim: int, *, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = ops.Linear(channels, 3 * channels, bias=False, **factory)
        self.out = ops.Linear(channels, channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(pixels, T, C) to the same shape."""
        parts = [self._attend(some) for some in x.split(MAX_ATTENTION_BATCH)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (qkv h d) -> qkv b h t d", qkv=3, d=self.head_dim)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (pixels, heads, T, head_dim)
        return self.out(rearrange(out, "b h t d -> b t (h d)"))
