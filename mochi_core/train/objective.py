"""The training objective: squared error of the velocity, at any noise level and for any prompt."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..transformer.block import BlockCall, run_block
from ..transformer.model import AsymmDiT


def velocity_loss(
    dit: AsymmDiT,
    latents: Tensor,
    embeds: Tensor,
    mask: Tensor,
    sigma: Tensor,
    noise: Tensor,
    checkpointed_blocks: int = 0,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity, data - noise, as a float32 scalar.

    Frames without noise do not count: their noise is unknowable, and samplers do not move them.

    Args:
        latents: (B, C, T, H, W) clean latents in DiT space.
        embeds, mask: (B, L, text_width) and (B, L) bool; an all-False row is an empty prompt or a dropped caption.
        sigma: (B,) noise levels in [0, 1], or (B, T) per-frame noise levels.
        noise: standard normal, shape of `latents`.
        checkpointed_blocks: number of leading blocks that are recomputed in the backward pass to save memory.
        weights: weights of the errors, shape of `sigma`; None weights all equally.
    """
    level = sigma.view(len(sigma), 1, -1, 1, 1)  # (B, 1, 1 or T, 1, 1)
    noisy = level * noise + (1 - level) * latents
    text = dit.prepare_text(embeds.to(dit.dtype), mask)
    modulation = dit.modulation(sigma, text.pooled)
    rope = dit.rope(latents.shape, latents.device)
    run = partial(run_checkpointed, checkpointed_blocks)
    velocity = dit.denoise(noisy.to(dit.dtype), text, modulation, rope, run_block=run)
    error = (velocity.float() - (latents - noise).float()).square()
    if weights is not None:
        error = error * weights.view_as(level)
    moves = (level > 0).expand_as(error)
    return (error * moves).sum() / moves.sum().clamp(min=1)


def run_checkpointed(count: int, call: BlockCall) -> tuple[Tensor, Tensor]:
    """Call one block; the first `count` are recomputed in the backward pass instead of keeping their activations."""
    if call.index >= count:
        return run_block(call)
    arguments = call.x, call.y, call.modulation, call.context
    return checkpoint(call.block, *arguments, use_reentrant=False)  # pyright: ignore[reportReturnType]
