"""The denoiser's inputs besides the latents: prompts, and the noise level of each step, as modulation of its blocks.

Shapes: B batch, T latent frames, L text tokens, Dx 3072, Dy 1536.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TextConditioning:
    """Prompts, cropped to their valid tokens and projected."""

    tokens: Tensor
    """(B, L, Dy), where L is the longest prompt of the batch; tokens past a prompt's own length are never attended to."""
    lengths: tuple[int, ...]
    """Valid tokens of each prompt."""
    pooled: Tensor
    """(B or 1, Dx), one vector per prompt, or one for all if they are the same."""
    negative_lengths: tuple[int, ...] = ()
    """Valid tokens of each negative prompt, whose text is then the second half of `tokens` (normalised attention guidance)."""


@dataclass(frozen=True)
class Modulation:
    """Scales and gates of every block, shift and scale of the final layer, for one forward pass.

    Text has one per sample, (B or 1, ...), and so do visual tokens, or (B or 1, T, ...) with per-frame noise levels.
    """

    blocks: tuple[tuple[Tensor, Tensor], ...]
    """Outputs of each block's mod_x, (..., 4 * Dx), and mod_y, (..., 4 * Dy), or (..., Dy) in the last block."""
    final: Tensor
    """(..., 2 * Dx), shift and scale of the final layer."""

    @property
    def by_frame(self) -> bool:
        return self.final.ndim == 3

    def of_frames(self, frames: list[int] | None) -> Modulation:
        """The modulation with visual tokens following these frames, in order; None changes nothing."""
        if frames is None:
            return self
        blocks = tuple((x[:, frames], y) for x, y in self.blocks)
        return Modulation(blocks, self.final[:, frames])


@dataclass(frozen=True)
class ScheduleModulation:
    """Modulations for all steps of a schedule, with each distinct noise level computed once."""

    levels: Modulation
    """With leading axes: visual tokens (levels, B or 1, ...), one per distinct noise level; text (steps, B or 1, ...)."""
    rows: Tensor | None
    """(steps, T) int64, the index of each frame's level in each step; None if all frames have the step's level."""

    def at(self, step: int) -> Modulation:
        """Modulation of one step."""
        blocks = tuple((self._visual(x, step), y[step]) for x, y in self.levels.blocks)
        return Modulation(blocks, self._visual(self.levels.final, step))

    def _visual(self, levels: Tensor, step: int) -> Tensor:
        return levels[step] if self.rows is None else levels[self.rows[step]].transpose(0, 1)  # (B or 1, T, ...)


def crop_to_valid(text_embeds: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each prompt's valid tokens to the front, cut to the longest prompt, and zero the remaining padding.

    `text_embeds` (B, L, W) and `text_mask` (B, L) bool to (B, longest, W) and (B, longest) bool; longest may be 0.
    """
    valid = [embeds[mask] for embeds, mask in zip(text_embeds, text_mask.bool(), strict=True)]
    lengths = torch.tensor([len(tokens) for tokens in valid])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return nn.utils.rnn.pad_sequence(valid, batch_first=True), mask.to(text_embeds.device)


def distinct(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct noise levels in `sigmas` (steps, T), and the index of each entry among them, (steps, T)."""
    by_step = sigmas.tolist()
    index = {sigma: i for i, sigma in enumerate(dict.fromkeys(sigma for step in by_step for sigma in step))}
    return torch.tensor([*index]), torch.tensor([[index[sigma] for sigma in step] for step in by_step])
