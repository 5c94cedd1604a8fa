"""AsymmDiT, Mochi 1's denoiser.

Module and parameter names are those of Genmo's checkpoint. Suffix _x is the visual stream, _y the text stream.
Shapes: B batch, C 12 latent channels, T latent frames, H W latent rows and columns, N = T * H/2 * W/2 visual tokens,
L text tokens, Dx 3072, Dy 1536, K 24 heads of D 128.

Everything that does not depend on the noisy latents is computed by `prepare_text`, `modulation` and `rope`, once for a whole
schedule, and used by `denoise`; `forward` calls all four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import AsymmDiTConfig
from ..mapped_files import check_mapped_files
from ..ops import Ops
from ..quantization.weights import QuantizedLinear
from .attention import Attention, sdpa
from .block import AsymmetricJointBlock, BlockCall, BlockContext, RunBlock, run_block
from .conditioning import Modulation, ScheduleModulation, TextConditioning, crop_to_valid, distinct
from .layers import AttentionPool, FinalLayer, PatchEmbed, TimestepEmbedder
from .rope import Rope, rope_table


class Share(Protocol):
    """The tokens of a forward pass that are computed here, while others compute the rest: see `parallel.sequence`."""

    @property
    def tokens(self) -> slice:
        """The range of these tokens."""
        ...

    @property
    def frames(self) -> list[int] | None:
        """The frame of each of their equal units, or None if nothing depends on frames."""
        ...

    def attention(self, attention: Attention) -> Attention:
        """Attention over all tokens and the text, given q, k and v of these tokens and the text."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Gather values (B, n, F) of these tokens to (B, N, F) of all tokens."""
        ...


class TokenGroup(Protocol):
    """The members that share the tokens of a forward pass: see `parallel.sequence.TokenSplit`."""

    def share(self, frames: int, per_frame: int, *, by_frame: bool = False) -> Share:
        """This member's share of the tokens of `frames` latent frames; `by_frame` if modulations differ between frames."""
        ...


class AsymmDiT(nn.Module):
    """Predicts velocity = data - noise from noisy latents, noise level and prompt."""

    has_frame_levels = False
    """Whether the weights were trained with per-frame noise levels; the network accepts them with any weights."""

    def __init__(
        self,
        config: AsymmDiTConfig = AsymmDiTConfig(),  # noqa: B008 - frozen
        *,
        ops: Ops = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"ops": ops, "device": device, "dtype": dtype}
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

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the computation, read from a weight that is never quantised or kept in float32."""
        return self.x_embedder.proj.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AsymmDiT:
        """Apply `to`, `half`, `cuda` and the like; tensors with a fixed dtype are only moved."""
        fixed = list(self._tensors_of_fixed_dtype())
        kept = {id(tensor) for tensor in (*fixed, *(tensor.grad for tensor in fixed))}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            changed = id(tensor) in kept and converted.dtype != tensor.dtype
            return tensor.to(converted.device) if changed else converted

        return super()._apply(convert, recurse)

    def _tensors_of_fixed_dtype(self) -> Iterator[Tensor]:
        """Position frequencies and q/k norms, float32 in a model of any dtype, and quantised weights."""
        yield self.pos_frequencies
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                yield from module.parameters(recurse=False)
            elif isinstance(module, QuantizedLinear):
                yield from module.buffers(recurse=False)

    def forward(
        self, latents: Tensor, sigma: Tensor, text_embeds: Tensor, text_mask: Tensor, *, attention: Attention = sdpa
    ) -> Tensor:
        """Velocity, shape and dtype of `latents`.

        Args:
            latents: (B, C, T, H, W) noisy latents in DiT space; any H and W.
            sigma: (B,) noise levels in [0, 1], or (B, T) per-frame noise levels.
            text_embeds: (B, L, text_width) T5 output.
            text_mask: (B, L) bool, True for valid tokens; may be all False (an empty prompt).
            attention: (q, k, v) -> output, see `attention.Attention`.
        """
        text = self.prepare_text(text_embeds.to(self.dtype), text_mask)
        modulation = self.modulation(sigma, text.pooled)
        rope = self.rope(latents.shape, latents.device)
        return self.denoise(latents.to(self.dtype), text, modulation, rope, attend=attention).to(latents.dtype)

    def prepare_text(self, text_embeds: Tensor, text_mask: Tensor) -> TextConditioning:
        """Drop padding, pool and project text features (B, L, text_width) with their mask (B, L) bool."""
        check_mapped_files(self)
        tokens, mask = crop_to_valid(text_embeds, text_mask)
        lengths = tuple(mask.sum(dim=1).tolist())
        return TextConditioning(self.t5_yproj(tokens), lengths, self.t5_y_embedder(tokens, mask))

    def modulation(self, sigma: Tensor, pooled: Tensor) -> Modulation:
        """Scales and gates for noise levels `sigma` (B,), or per-frame (B, T), and prompts `pooled` (B or 1, Dx).

        Per-frame noise levels are as in Pusa (arXiv 2507.16116): visual tokens follow their frame, text the mean of all.
        """
        level = self.t_embedder(sigma, pooled.dtype)  # (B, Dx) or (B, T, Dx)
        if sigma.ndim == 1:
            return self._modulation(level + pooled, level + pooled)
        return self._modulation(level + pooled[:, None], level.mean(dim=1) + pooled)

    def schedule_modulation(self, sigmas: Tensor, pooled: Tensor) -> ScheduleModulation:
        """`modulation` for every step of `sigmas` (steps,), or per-frame (steps, T), and prompts `pooled` (B or 1, Dx)."""
        levels, rows = (sigmas, None) if sigmas.ndim == 1 else distinct(sigmas)
        visual = text = self.t_embedder(levels.to(pooled.device), pooled.dtype)  # (levels, Dx)
        if rows is not None:
            rows = rows.to(pooled.device)
            text = visual[rows].mean(dim=1)  # (steps, Dx)
        return ScheduleModulation(self._modulation(visual[:, None] + pooled, text[:, None] + pooled), rows)

    def _modulation(self, visual: Tensor, text: Tensor) -> Modulation:
        """Modulation from the conditioning vectors of visual tokens and text, (..., Dx) each."""
        visual, text = F.silu(visual), F.silu(text)
        blocks = tuple((block.mod_x(visual), block.mod_y(text)) for block in self.joint_blocks())
        return Modulation(blocks, self.final_layer.mod(visual))

    def rope(self, latent_shape: tuple[int, ...], device: torch.device) -> Rope:
        """Rotary table for latents of shape (B, C, T, H, W)."""
        num_latents, height, width = latent_shape[2:]
        patch = self.config.patch_size
        return rope_table(self.pos_frequencies.to(device), num_latents, -(-height // patch), -(-width // patch))

    def denoise(
        self,
        latents: Tensor,
        text: TextConditioning,
        modulation: Modulation,
        rope: Rope,
        *,
        attend: Attention = sdpa,
        run_block: RunBlock = run_block,
        group: TokenGroup | None = None,
    ) -> Tensor:
        """Velocity from prepared conditioning, in the shape of `latents` (B, C, T, H, W), which must have the model's dtype."""
        (velocity,) = self.denoise_each(
            latents, [(text, modulation)], rope, attend=attend, run_blocks=[run_block], group=group
        )
        return velocity

    def denoise_each(
        self,
        latents: Tensor,
        conditions: Sequence[tuple[TextConditioning, Modulation]],
        rope: Rope,
        *,
        attend: Attention = sdpa,
        run_blocks: Sequence[RunBlock] | None = None,
        group: TokenGroup | None = None,
    ) -> list[Tensor]:
        """Velocities (B, C, T, H, W) under each condition, in one pass over the blocks; `latents` must have the model's dtype.

        Each block processes the conditions in turn: its weights are needed once, and no prompt is padded to another's length.
        Only the residual streams are held for every condition. `run_blocks` has one entry per condition. With a `group`, all its
        members call this with the same arguments; each computes its share of the tokens, and all get the whole result.
        """
        _, _, num_latents, height, width = latents.shape
        latents = pad_to_patches(latents, self.config.patch_size)
        rows = latents.shape[-2] // self.config.patch_size
        embedded = self.x_embedder(latents)  # (B, N, Dx)
        share = None
        if group is not None:
            share = group.share(num_latents, len(rope.spatial), by_frame=conditions[0][1].by_frame)
            embedded, rope = embedded[:, share.tokens].contiguous(), rope.part(share.tokens)  # (B, n, Dx)
            conditions = [(text, modulation.of_frames(share.frames)) for text, modulation in conditions]
            attend = share.attention(attend)
        streams: list[tuple[Tensor, Tensor]] = []  # (B, N, Dx), (B, L, Dy)
        for text, _ in conditions:
            streams.append((embedded, text.tokens))  # not a comprehension: Dynamo could not delete what it uses
        contexts = [
            BlockContext(text.lengths, rope, attend, negative_lengths=text.negative_lengths) for text, _ in conditions
        ]
        runs = run_blocks or [run_block] * len(conditions)
        del embedded
        for i, block in enumerate(self.joint_blocks()):
            for c, (_, modulation) in enumerate(conditions):
                streams[c] = runs[c](BlockCall(block, i, *streams[c], modulation.blocks[i], contexts[c]))
        velocities = []  # (B, C, T, H, W), padded
        for (x, _), (_, modulation) in zip(streams, conditions, strict=True):
            x = self.final_layer(x, modulation.final)  # (B, N, patch * patch * C)
            x = x if share is None else share.gather(x)
            velocity = self._unpatchify(x, num_latents, rows)[..., :height, :width]
            velocities.append(velocity.to(latents.device))  # the last layer may be on another device
        return velocities

    def compile_blocks(self, **options: Any) -> None:
        """Have `torch.compile`, which gets `options`, fuse the operations of each block on its first call.

        Blocks then use the plain operations, unless `kernels.using("triton")` selects ours, which the compiler leaves unchanged.
        Identical blocks share compiled code. LoRAs may be added, removed or change strength, at the cost of a recompilation;
        hooks on a block, such as those of `offload`, stay outside the compiled code.
        """
        import torch._dynamo  # large

        # By default, hooks added later are ignored, and the ninth shape of the inputs or of a block is an error.
        settings = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=64)
        for block in self.joint_blocks():
            block.forward = settings(torch.compile(block.forward, fullgraph=True, **options))

    def joint_blocks(self) -> list[AsymmetricJointBlock]:
        """The blocks in order, with their type, which `nn.ModuleList` loses."""
        return cast(list[AsymmetricJointBlock], list(self.blocks))

    def _unpatchify(self, tokens: Tensor, num_latents: int, rows: int) -> Tensor:
        """`tokens` (B, N, patch * patch * C) to (B, C, T, H, W); a token's values are patch row, patch column, channel."""
        patch = self.config.patch_size
        pattern = "b (t h w) (p q c) -> b c t (h p) (w q)"
        return rearrange(tokens, pattern, t=num_latents, h=rows, p=patch, q=patch)


def pad_to_patches(latents: Tensor, patch_size: int) -> Tensor:
    """Repeat the last row and column of `latents` (B, C, T, H, W) if H or W is not a multiple of the patch size."""
    height, width = latents.shape[-2:]
    bottom, right = -height % patch_size, -width % patch_size
    return F.pad(latents, (0, right, 0, bottom, 0, 0), mode="replicate") if bottom or right else latents
