"""One block of the denoiser: joint attention, feed-forwards, and how `denoise` calls it. See `model` for the shape letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import kernels
from ..config import AsymmDiTConfig
from ..ops import Ops
from .attention import Attention
from .layers import FeedForward, gated_residual, gated_residual_norm, modulated_norm, token_chunk
from .rope import Rope, rotate

QK_NORM_EPS = 1e-5
"""Added to the mean square in the norms of q and k: the default of `RMSNorm` in Genmo's joint_model/layers.py."""

ROTATION_TOKEN_CHUNK = 7168
"""Tokens at a time in q/k norms and rotations on a GPU: few, because all of q, k and v are then in memory twice."""


def joint_attention(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
    """Attend over visual and valid text tokens; (B, N + L, K, D) each to (B, N + L, K * D).

    L is the largest of `context.lengths`; rows past a sample's own length are zero in the output. If prompts differ in length,
    samples are processed one at a time, so that padding is never attended to.
    """
    padding = [max(context.lengths) - length for length in context.lengths]
    if not any(padding):
        return _heads_joined(q, k, v, context.attend)
    out = q.new_zeros(*q.shape[:2], q.shape[2] * q.shape[3])
    for b, unused in enumerate(padding):
        valid = slice(b, b + 1), slice(q.shape[1] - unused)
        out[valid] = _heads_joined(q[valid], k[valid], v[valid], context.attend)
    return out


def _heads_joined(q: Tensor, k: Tensor, v: Tensor, attend: Attention) -> Tensor:
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return rearrange(attend(*heads_first), "b k l d -> b l (k d)")


JointAttention = Callable[[Tensor, Tensor, Tensor, "BlockContext"], Tensor]
"""q, k, v (B, N + L, K, D) and the context to the output (B, N + L, K * D), see `joint_attention`."""


@dataclass(frozen=True)
class BlockContext:
    """What all blocks share in one forward pass."""

    lengths: tuple[int, ...]
    """Valid text tokens of each sample."""
    rope: Rope
    attend: Attention
    joint_attention: JointAttention = joint_attention
    """How each block attends; hosts wrap it to change its inputs or output."""
    negative_lengths: tuple[int, ...] = ()
    """Valid tokens of each sample's negative prompt, if its text is included; see `TextConditioning`."""

    def to(self, device: torch.device | str | int) -> BlockContext:
        """The context for a block on another device; called by accelerate."""
        return replace(self, rope=self.rope.to(device))

    def select(self, samples: Sequence[int]) -> BlockContext:
        """The context for some samples of the batch."""
        lengths, negative = (
            tuple(of_all[i] for i in samples) if of_all else () for of_all in (self.lengths, self.negative_lengths)
        )
        return replace(self, lengths=lengths, negative_lengths=negative)


class AsymmetricAttention(nn.Module):
    """Joint attention over the visual tokens and the valid text tokens, with separate projections."""

    def __init__(self, config: AsymmDiTConfig, *, update_y: bool, ops: Ops, **factory: Any) -> None:
        super().__init__()
        dx, dy, self.num_heads = config.hidden_size_x, config.hidden_size_y, config.num_heads
        # The norm weights stay float32 in a bf16 model: they are tiny, and decisive for sharp attention.
        norm = {**factory, "dtype": torch.float32}
        self.qkv_x = ops.Linear(dx, 3 * dx, bias=False, **factory)
        self.qkv_y = ops.Linear(dy, 3 * dx, bias=False, **factory)
        self.q_norm_x = ops.RMSNorm(config.head_dim, eps=QK_NORM_EPS, **norm)
        self.k_norm_x = ops.RMSNorm(config.head_dim, eps=QK_NORM_EPS, **norm)
        self.q_norm_y = ops.RMSNorm(config.head_dim, eps=QK_NORM_EPS, **norm)
        self.k_norm_y = ops.RMSNorm(config.head_dim, eps=QK_NORM_EPS, **norm)
        self.proj_x = ops.Linear(dx, dx, **factory)
        self.proj_y = ops.Linear(dx, dy, **factory) if update_y else None

    def forward(
        self, x: Tensor, y: Tensor, scale_x: Tensor, scale_y: Tensor, context: BlockContext
    ) -> tuple[Tensor, Tensor | None]:
        """Attention's contribution to each stream, before the gates.

        Args:
            x, y: (B, N, Dx) and (B, L, Dy), not yet normed.
            scale_x, scale_y: (B or 1, Dx), or per frame (B or 1, T, Dx), and (B or 1, Dy); the norms are multiplied by 1 + scale.

        Returns:
            (B, N, Dx), and (B, L, Dy), or None in the last block.
        """
        q, k, v = self._joint_heads(
            self.qkv_x(modulated_norm(x, scale_x)),  # (B, N, 3 * K * D)
            self.qkv_y(modulated_norm(y, scale_y)),  # (B, L, 3 * K * D)
            context.rope,
        )  # (B, N + L, K, D)
        out = context.joint_attention(q, k, v, context)  # (B, N + L, K * D)
        del q, k, v
        out_x, out_y = out.tensor_split([x.shape[1]], dim=1)  # (B, N, K * D), (B, L, K * D)
        return self.proj_x(out_x), None if self.proj_y is None else self.proj_y(out_y)

    def _joint_heads(self, visual: Tensor, text: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of both streams, (B, N + L, K, D) each, with q and k normed and the visual ones rotated.

        `visual` (B, N, 3 * K * D) and `text` (B, L, 3 * K * D) hold the packed q, k and v of each stream.
        """
        norms = self.q_norm_x, self.k_norm_x, self.q_norm_y, self.k_norm_y
        if kernels.fused(visual, text, rope.frames, *(norm.weight for norm in norms)):
            weights = (norm_weight(norm, visual.device) for norm in norms)
            tables = rope.frames, rope.spatial
            q, k, v = kernels.joint_heads(visual, text, *weights, *tables, QK_NORM_EPS, rope.skipped)
            return q, k, v
        visual, text = (packed.unflatten(-1, (3, self.num_heads, -1)) for packed in (visual, text))
        num_tokens = visual.shape[1]
        q, k, v = _empty_heads(visual[:, :, 0], num_tokens + text.shape[1])  # (B, N + L, K, D) each
        norms = (q, self.q_norm_x, self.q_norm_y), (k, self.k_norm_x, self.k_norm_y)
        for tokens, part in rope.chunks(token_chunk(visual, ROTATION_TOKEN_CHUNK)):
            for i, (joint, norm_x, _) in enumerate(norms):
                # The table is computed after the norm, and twice, to hold less in memory at a time.
                joint[:, tokens] = rotate(norm_x(visual[:, tokens, i].float()), part.table())
        for i, (joint, _, norm_y) in enumerate(norms):
            joint[:, num_tokens:] = norm_y(text[:, :, i].float())
        v[:, :num_tokens], v[:, num_tokens:] = visual[:, :, 2], text[:, :, 2]
        return q, k, v


def _empty_heads(like: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v for `length` tokens, (B, length, K, D) each with the K and D of `like` (B, N, K, D).

    Attention on a CPU reads a head's keys and values repeatedly, so there each head of k and v is contiguous. The output has the
    layout of q.
    """
    batch, _, heads, head_dim = like.shape
    q = like.new_empty(batch, length, heads, head_dim)
    if like.device.type != "cpu":
        return q, torch.empty_like(q), torch.empty_like(q)
    k, v = (like.new_empty(batch, heads, length, head_dim).transpose(1, 2) for _ in range(2))
    return q, k, v


def norm_weight(norm: nn.RMSNorm, device: torch.device) -> Tensor:
    """The weight of an RMS norm in float32 on `device`, as the module applies it: a host may cast, patch or move it on use.

    Norming a large constant gives exactly the weight: the mean square is a power of four, next to which eps vanishes.
    """
    return norm(torch.full(norm.normalized_shape, 2.0**20, device=device))


class AsymmetricJointBlock(nn.Module):
    """Attention and feed-forward for both streams; the last block leaves the text unchanged."""

    def __init__(self, config: AsymmDiTConfig, *, update_y: bool, ops: Ops, **factory: Any) -> None:
        super().__init__()
        dx, dy = config.hidden_size_x, config.hidden_size_y
        self.mod_x = ops.Linear(dx, 4 * dx, **factory)
        self.mod_y = ops.Linear(dx, 4 * dy if update_y else dy, **factory)
        self.attn = AsymmetricAttention(config, update_y=update_y, ops=ops, **factory)
        self.mlp_x = FeedForward(dx, config.mlp_size_x, ops=ops, **factory)
        self.mlp_y = FeedForward(dy, config.mlp_size_y, ops=ops, **factory) if update_y else None

    def forward(
        self, x: Tensor, y: Tensor, modulation: tuple[Tensor, Tensor], context: BlockContext
    ) -> tuple[Tensor, Tensor]:
        """`x` (B, N, Dx) and `y` (B, L, Dy) to the new x and y.

        `modulation` holds the outputs of mod_x and mod_y: (B or 1, 4 * Dx) and (B or 1, 4 * Dy), or (B or 1, Dy) in the last
        block. That of x may be per frame, (B or 1, T, 4 * Dx).
        """
        mod_x, mod_y = modulation
        if not kernels.fused(x, mod_x):
            # One kernel each here, instead of one for every scale and gate.
            mod_x, mod_y = mod_x.float(), mod_y.float()
        scale_attn_x, gate_attn_x, scale_mlp_x, gate_mlp_x = mod_x.chunk(4, dim=-1)  # (B, Dx) or (B, T, Dx)
        if self.mlp_y is None:
            attn_x, _ = self.attn(x, y, scale_attn_x, mod_y, context)  # (B, N, Dx)
        else:
            scale_attn_y, gate_attn_y, scale_mlp_y, gate_mlp_y = mod_y.chunk(4, dim=-1)  # (B, Dy) each
            attn_x, attn_y = self.attn(x, y, scale_attn_x, scale_attn_y, context)  # (B, N, Dx), (B, L, Dy)
            y, normed_y = gated_residual_norm(y, attn_y, gate_attn_y, scale_mlp_y)  # (B, L, Dy) each
            y = gated_residual(y, self.mlp_y(normed_y), gate_mlp_y)  # (B, L, Dy)
        x, normed_x = gated_residual_norm(x, attn_x, gate_attn_x, scale_mlp_x)  # (B, N, Dx) each
        del attn_x  # as large as x
        x = gated_residual(x, self.mlp_x(normed_x), gate_mlp_x)  # (B, N, Dx)
        return x, y


@dataclass(frozen=True)
class BlockCall:
    """One call of a block in a forward pass: the block, its index from 0, and its arguments."""

    block: AsymmetricJointBlock
    index: int
    x: Tensor
    """(B, N, Dx), the visual stream."""
    y: Tensor
    """(B, L, Dy), the text stream."""
    modulation: tuple[Tensor, Tensor]
    """Outputs of the block's mod_x and mod_y, for B samples or 1 for all."""
    context: BlockContext


RunBlock = Callable[[BlockCall], tuple[Tensor, Tensor]]
"""Runs a block and returns its new x and y; `denoise` calls blocks through it, so that they can be wrapped or skipped."""


def run_block(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Call the block directly."""
    return call.block(call.x, call.y, call.modulation, call.context)
