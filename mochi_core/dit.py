"""AsymmDiT, the denoiser of Mochi 1.

Module and parameter names are those of Genmo's checkpoint. Suffix _x is the visual stream, _y the text stream.
Shapes: B batch, C 12 latent channels, T latent frames, H W latent rows and columns, N = T * H/2 * W/2 visual tokens,
L text tokens, Dx 3072, Dy 1536, K 24 heads of D 128.

Whatever does not depend on the noisy latents comes in as an argument: `prepare_text`, `modulation` and `rope` compute it,
`denoise` uses it. `forward` does all four; a sampler prepares once for a whole schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention, sdpa
from .config import AsymmDiTConfig
from .layers import (
    AttentionPool,
    FeedForward,
    FinalLayer,
    PatchEmbed,
    TimestepEmbedder,
    gated_residual,
    modulated_norm,
    rows_at_a_time,
)
from .rope import Rope, rope_table, rotate

if TYPE_CHECKING:
    from .lora import Lora

QK_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Text:
    """Prompts, cropped to their valid tokens and projected."""

    tokens: Tensor
    """(B, L, Dy), L the longest prompt of the batch; rows past a prompt's own length are never attended to."""
    lengths: tuple[int, ...]
    """Valid tokens of each prompt."""
    pooled: Tensor
    """(B, Dx)."""


@dataclass(frozen=True)
class Modulation:
    """Scales and gates of every block and of the final layer; leading axes (B,) or (steps, B)."""

    blocks: tuple[tuple[Tensor, Tensor], ...]
    final: Tensor

    def at(self, step: int) -> Modulation:
        """The modulation of one step of a schedule."""
        return Modulation(tuple((x[step], y[step]) for x, y in self.blocks), self.final[step])


@dataclass(frozen=True)
class BlockContext:
    """What all blocks of one forward share."""

    lengths: tuple[int, ...]
    rope: Rope
    attention: Attention


class AsymmetricAttention(nn.Module):
    """Joint attention over the visual tokens and the valid text tokens, with separate projections."""

    def __init__(self, config: AsymmDiTConfig, *, update_y: bool, ops: Any, **factory: Any) -> None:
        super().__init__()
        dx, dy, self.num_heads = config.hidden_size_x, config.hidden_size_y, config.num_heads
        # Tiny, and decisive for sharp attention: the norm weights stay float32 in a bf16 model.
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
        """`x` (B, N, Dx) and `y` (B, L, Dy), not yet normed, and the scales of their norms, to the attention branches."""
        qkv = self._joint_heads(
            self.qkv_x(modulated_norm(x, scale_x)),  # (B, N, 3 * K * D)
            self.qkv_y(modulated_norm(y, scale_y)),  # (B, L, 3 * K * D)
            context.rope,
        )
        out = joint_attention(*qkv, context)  # (B, N + L, K * D)
        del qkv
        num_tokens = x.shape[1]
        out_x, out_y = out[:, :num_tokens], out[:, num_tokens:]
        return self.proj_x(out_x), None if self.proj_y is None else self.proj_y(out_y)

    def _joint_heads(self, visual: Tensor, text: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Packed q, k and v of either stream to those of both, (B, N + L, K, D) each, normed and the visual ones rotated."""
        visual, text = (packed.unflatten(-1, (3, self.num_heads, -1)) for packed in (visual, text))
        batch, num_tokens = visual.shape[:2]
        joint = visual.new_empty(3, batch, num_tokens + text.shape[1], *visual.shape[3:])
        norms = (self.q_norm_x, self.q_norm_y), (self.k_norm_x, self.k_norm_y)
        for tokens, turns in rope.pieces(rows_at_a_time(visual)):
            for i, (norm_x, _) in enumerate(norms):
                joint[i, :, tokens] = rotate(norm_x(visual[:, tokens, i].float()), turns)
        for i, (_, norm_y) in enumerate(norms):
            joint[i, :, num_tokens:] = norm_y(text[:, :, i].float())
        joint[2, :, :num_tokens], joint[2, :, num_tokens:] = visual[:, :, 2], text[:, :, 2]
        q, k, v = joint
        return q, k, v


def joint_attention(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
    """Attend over visual and valid text tokens; (B, N + L, K, D) each to (B, N + L, K * D).

    Prompts of different lengths are attended to one sample at a time, so that no padding takes part.
    """
    padding = [max(context.lengths) - length for length in context.lengths]
    if not any(padding):
        return _attend(q, k, v, context.attention)
    out = q.new_zeros(*q.shape[:2], q.shape[2] * q.shape[3])
    for b, unused in enumerate(padding):
        valid = slice(b, b + 1), slice(q.shape[1] - unused)
        out[valid] = _attend(q[valid], k[valid], v[valid], context.attention)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return rearrange(attention(*heads_first), "b k l d -> b l (k d)")


class AsymmetricJointBlock(nn.Module):
    """Attention and feed-forward for both streams; the last block leaves the text as it is."""

    def __init__(self, config: AsymmDiTConfig, *, update_y: bool, ops: Any, **factory: Any) -> None:
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
        """`x` (B, N, Dx), `y` (B, L, Dy), `modulation` the outputs of mod_x and mod_y, to the new x and y."""
        mod_x, mod_y = modulation
        scale_attn_x, gate_attn_x, scale_mlp_x, gate_mlp_x = mod_x.chunk(4, dim=-1)
        if self.mlp_y is None:
            attn_x, _ = self.attn(x, y, scale_attn_x, mod_y, context)
        else:
            scale_attn_y, gate_attn_y, scale_mlp_y, gate_mlp_y = mod_y.chunk(4, dim=-1)
            attn_x, attn_y = self.attn(x, y, scale_attn_x, scale_attn_y, context)
            y = gated_residual(y, attn_y, gate_attn_y)
            y = gated_residual(y, self.mlp_y(modulated_norm(y, scale_mlp_y)), gate_mlp_y)
        x = gated_residual(x, attn_x, gate_attn_x)
        del attn_x  # as large as x
        x = gated_residual(x, self.mlp_x(modulated_norm(x, scale_mlp_x)), gate_mlp_x)
        return x, y


RunBlock = Callable[
    [AsymmetricJointBlock, int, Tensor, Tensor, tuple[Tensor, Tensor], BlockContext], tuple[Tensor, Tensor]
]
"""(block, index, x, y, modulation, context) -> (x, y): how `denoise` calls each block, for hosts that wrap blocks."""


def run_block(
    block: AsymmetricJointBlock,
    index: int,  # noqa: ARG001 - part of the contract, for hosts that treat blocks differently
    x: Tensor,
    y: Tensor,
    modulation: tuple[Tensor, Tensor],
    context: BlockContext,
) -> tuple[Tensor, Tensor]:
    """Just call the block."""
    return block(x, y, modulation, context)


class AsymmDiT(nn.Module):
    """Predicts velocity = data - noise from noisy latents, noise level and prompt."""

    def __init__(
        self,
        config: AsymmDiTConfig = AsymmDiTConfig(),  # noqa: B008 - frozen
        *,
        ops: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype or torch.get_default_dtype()
        factory = {"ops": ops, "device": device, "dtype": dtype}
        dx, dy, patch = config.hidden_size_x, config.hidden_size_y, config.patch_size
        self.x_embedder = PatchEmbed(config.in_channels, patch, dx, **factory)
        self.t_embedder = TimestepEmbedder(config.timestep_features, dx, **factory)
        self.t5_y_embedder = AttentionPool(config.text_width, config.pool_heads, dx, **factory)
        self.t5_yproj = ops.Linear(config.text_width, dy, device=device, dtype=dtype)
        frequencies = torch.empty(3, config.num_heads, config.head_dim // 2, device=device, dtype=torch.float32)
        self.pos_frequencies = nn.Parameter(frequencies)
        last = config.depth - 1
        self.blocks = nn.ModuleList(
            AsymmetricJointBlock(config, update_y=i < last, **factory) for i in range(config.depth)
        )
        self.final_layer = FinalLayer(dx, patch * patch * config.in_channels, **factory)

    def forward(
        self, latents: Tensor, sigma: Tensor, text_embeds: Tensor, text_mask: Tensor, *, attention: Attention = sdpa
    ) -> Tensor:
        """Velocity, shape and dtype of `latents`.

        Args:
            latents: (B, C, T, H, W) noisy latents in DiT space; any H and W.
            sigma: (B,) noise level in [0, 1].
            text_embeds: (B, L, text_width) T5 output.
            text_mask: (B, L) bool, True for valid tokens; may be all False (an empty prompt).
            attention: see `attention.Attention`.
        """
        text = self.prepare_text(text_embeds.to(self.dtype), text_mask)
        modulation = self.modulation(sigma, text.pooled)
        rope = self.rope(latents.shape, latents.device)
        return self.denoise(latents.to(self.dtype), text, modulation, rope, attention=attention).to(latents.dtype)

    def prepare_text(self, text_embeds: Tensor, text_mask: Tensor) -> Text:
        """Drop padding, pool and project: (B, L, text_width) and (B, L) bool to `Text`."""
        tokens, mask = crop_to_valid(text_embeds, text_mask)
        lengths = tuple(mask.sum(dim=1).tolist())
        return Text(self.t5_yproj(tokens), lengths, self.t5_y_embedder(tokens, mask))

    def modulation(self, sigma: Tensor, pooled: Tensor) -> Modulation:
        """`sigma` (B,) and `pooled` (B, Dx) to `Modulation`; with `sigma` (steps, 1), that of a whole schedule."""
        conditioning = F.silu(self.t_embedder(sigma, pooled.dtype) + pooled)  # (..., B, Dx)
        blocks = tuple((block.mod_x(conditioning), block.mod_y(conditioning)) for block in self.joint_blocks())
        return Modulation(blocks, self.final_layer.mod(conditioning))

    def rope(self, latent_shape: tuple[int, ...], device: torch.device) -> Rope:
        """Rotary table for latents of shape (B, C, T, H, W)."""
        num_latents, height, width = latent_shape[2:]
        patch = self.config.patch_size
        return rope_table(self.pos_frequencies.to(device), num_latents, -(-height // patch), -(-width // patch))

    def denoise(
        self,
        latents: Tensor,
        text: Text,
        modulation: Modulation,
        rope: Rope,
        *,
        attention: Attention = sdpa,
        run_block: RunBlock = run_block,
    ) -> Tensor:
        """Velocity from prepared conditioning, in the dtype of `latents` (B, C, T, H, W)."""
        (velocity,) = self.denoise_each(
            latents, [(text, modulation)], rope, attention=attention, run_blocks=[run_block]
        )
        return velocity

    def denoise_each(
        self,
        latents: Tensor,
        conditions: Sequence[tuple[Text, Modulation]],
        rope: Rope,
        *,
        attention: Attention = sdpa,
        run_blocks: Sequence[RunBlock] | None = None,
    ) -> list[Tensor]:
        """The velocity under each condition, in one pass over the blocks.

        A block takes one condition after the other: its weights are needed once, and no prompt is padded to another's
        length. The residual streams are all that is held for every condition. `run_blocks` has one entry for each.
        """
        _, _, num_latents, height, width = latents.shape
        latents = pad_to_patches(latents, self.config.patch_size)
        rows = latents.shape[-2] // self.config.patch_size
        embedded = self.x_embedder(latents)
        streams = [(embedded, text.tokens) for text, _ in conditions]  # (B, N, Dx), (B, L, Dy)
        contexts = [BlockContext(text.lengths, rope, attention) for text, _ in conditions]
        runs = run_blocks or [run_block] * len(conditions)
        del embedded
        for i, block in enumerate(self.joint_blocks()):
            for c, (_, modulation) in enumerate(conditions):
                streams[c] = runs[c](block, i, *streams[c], modulation.blocks[i], contexts[c])
        velocities = []  # (B, C, T, H, W), padded
        for (x, _), (_, modulation) in zip(streams, conditions, strict=True):
            x = self.final_layer(x, modulation.final)  # (B, N, patch * patch * C)
            velocities.append(self._unpatchify(x, num_latents, rows)[..., :height, :width])
        return velocities

    def load_lora(self, path: str | Path, strength: float = 1.0) -> Lora:
        """Put a LoRA file of any known kind into the denoiser; several add up.

        The result's `strength` can be changed at any time, and its `remove` leaves the denoiser exactly as it was. Names
        without a place in Mochi are reported in a warning. A compiled denoiser has to be compiled again.

        Raises:
            ValueError: the file is no LoRA for this denoiser.
            FileNotFoundError: there is no such file.
        """
        from .lora import load_lora  # it knows files, which this module does not

        return load_lora(self, path, strength)

    def compile_blocks(self) -> None:
        """Have the row operations of the blocks fused, at the price of a minute when a run begins."""
        for block in self.joint_blocks():
            block.forward = torch.compile(block.forward, fullgraph=True)

    def joint_blocks(self) -> list[AsymmetricJointBlock]:
        return list(self.blocks)  # pyright: ignore[reportReturnType] - ModuleList forgets its element type

    def _unpatchify(self, tokens: Tensor, num_latents: int, rows: int) -> Tensor:
        patch = self.config.patch_size
        pattern = "b (t h w) (p q c) -> b c t (h p) (w q)"
        return rearrange(tokens, pattern, t=num_latents, h=rows, p=patch, q=patch)


def crop_to_valid(text_embeds: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each prompt's valid tokens to the front, cut to the longest prompt and zero what is left of padding.

    (B, L, W) and (B, L) bool to (B, longest, W) and (B, longest) bool; longest may be 0.
    """
    valid = [embeds[mask] for embeds, mask in zip(text_embeds, text_mask.bool(), strict=True)]
    lengths = torch.tensor([len(tokens) for tokens in valid])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return nn.utils.rnn.pad_sequence(valid, batch_first=True), mask.to(text_embeds.device)


def pad_to_patches(latents: Tensor, patch_size: int) -> Tensor:
    """Repeat the last row and column where H or W is no multiple of the patch size."""
    height, width = latents.shape[-2:]
    bottom, right = -height % patch_size, -width % patch_size
    return F.pad(latents, (0, right, 0, bottom, 0, 0), mode="replicate") if bottom or right else latents
