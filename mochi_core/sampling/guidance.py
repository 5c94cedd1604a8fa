"""Guidance as functions over velocities, and what it changes inside of a forward. The default is classifier-free guidance alone.

- Skip-layer guidance, STG-R of arXiv 2411.18664: away from the velocity that the network has without some of its blocks. The
  authors' figures for Mochi are for block 34 and scale 1.0.
- CFG-Zero*, arXiv 2503.18886: the unconditional velocity is scaled to its projection on the conditional one, and the first
  steps stay where they are (zero-init).
- Normalised attention guidance (NAG), arXiv 2505.21179: away from the negative prompt in every attention, for which models that
  are distilled need no unconditional velocity. Visual tokens are computed once; they attend to either prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transformer.block import BlockCall, BlockContext, RunBlock, joint_attention, run_block
from ..transformer.conditioning import Modulation, ScheduleModulation, TextConditioning
from ..transformer.layers import apply_chunked
from .schedule import in_step_range

Velocity = Callable[[Tensor, int], Tensor]
"""(latents, step) -> velocity at the noise level of that step."""
Velocities = Callable[[Tensor, int, int], list[Tensor]]
"""(latents, step, count) -> the first `count` velocities at the noise level of that step: under the prompt, with skip-layer
guidance under the prompt without some blocks, under the negative prompt."""

ZERO_INIT = 0.04
"""Share of the steps that zero-init leaves out, from arXiv 2503.18886. On Mochi's schedule of 64 steps these are three of the
linear ones, which go from noise level 1 to 0.998."""
SMALLEST_NORM = 1e-6
"""What NAG divides by at least."""


@dataclass(frozen=True)
class Guidance:
    """What is done beside classifier-free guidance; by default nothing.

    Raises:
        ValueError: a number that is not finite or is outside its range.
    """

    skip_blocks: tuple[int, ...] = ()
    """Blocks left out for skip-layer guidance, counted from 0; published for Mochi: (34,)."""
    skip_scale: float = 1.0
    """Factor of the difference that leaving them out makes."""
    cfg_zero: bool = False
    """Whether guidance is CFG-Zero*."""
    nag_scale: float = 1.0
    """How far attention goes from the negative prompt; 1 is off, published for joint attention (Flux) is 5."""
    nag_tau: float = 2.5
    """By how much the guided output of attention may be larger than the plain one, as a ratio of L1 norms."""
    nag_alpha: float = 0.25
    """Share of the guided output."""

    def __post_init__(self) -> None:
        for name in ("skip_scale", "nag_scale", "nag_tau", "nag_alpha"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}, but it is a number; leave it out for the published one.")
        if self.nag_tau <= 0 or not 0 <= self.nag_alpha <= 1:
            raise ValueError(
                f"nag_tau is {self.nag_tau} and nag_alpha {self.nag_alpha}; use a ratio above 0, such as 2.5, and a share "
                "from 0 to 1, such as 0.25."
            )

    @property
    def uses_nag(self) -> bool:
        return self.nag_scale != 1 and self.nag_alpha > 0

    def check_depth(self, depth: int) -> None:
        """Raise a ValueError if there is no block of that number in a denoiser of `depth` blocks."""
        for index in self.skip_blocks:
            if index not in range(depth):
                raise ValueError(
                    f"skip_blocks names block {index}; this denoiser has the blocks 0 to {depth - 1}, of which 34 is published "
                    "for Mochi's 48."
                )


PLAIN = Guidance()


def guided(velocities: Velocities, scales: Sequence[float], guidance: Guidance = PLAIN) -> Velocity:
    """Classifier-free guidance: uncond + scale * (cond - uncond), with one scale per step, and what `guidance` adds.

    Scale 1 asks for no unconditional velocity. A step that zero-init leaves out asks for none at all.
    """
    skips = bool(guidance.skip_blocks)

    def velocity(latents: Tensor, step: int) -> Tensor:
        if guidance.cfg_zero and in_step_range(step, len(scales), 0, ZERO_INIT):
            return torch.zeros_like(latents)
        scale = scales[step]
        cond, *others = (each.float() for each in velocities(latents, step, 1 + skips + (scale != 1)))
        result = cond
        if scale != 1:
            uncond = others[-1]
            if guidance.cfg_zero:
                uncond = projection(cond, uncond) * uncond
            result = uncond + scale * (cond - uncond)
        return result + guidance.skip_scale * (cond - others[0]) if skips else result

    return velocity


def projection(cond: Tensor, uncond: Tensor) -> Tensor:
    """Factor that brings `uncond` (B, ...) closest to `cond`, one for each video, (B, 1, ...)."""
    axes = tuple(range(1, cond.ndim))
    square = uncond.square().sum(axes, keepdim=True)
    return (cond * uncond).sum(axes, keepdim=True) / square.clamp(min=torch.finfo(square.dtype).tiny)


def without_blocks(blocks: Sequence[int], run: RunBlock, *, shared: bool) -> tuple[RunBlock, RunBlock]:
    """How to call the blocks with all of them, and without `blocks`, after each other for every block.

    With `shared`, what comes before the first of `blocks` is computed once: both are the same until then.
    """
    first, before = min(blocks) if shared else 0, list[tuple[Tensor, Tensor]]()

    def whole(call: BlockCall) -> tuple[Tensor, Tensor]:
        out = run(call)
        before[:] = [out] if call.index < first else []
        return out

    def skipping(call: BlockCall) -> tuple[Tensor, Tensor]:
        if call.index < first:
            return before.pop()
        return (call.x, call.y) if call.index in blocks else run(call)

    return whole, skipping


@dataclass(frozen=True)
class PairModulation:
    """Modulations for a prompt whose text is followed by that of the negative one, see `text_pair`."""

    positive: ScheduleModulation
    negative: ScheduleModulation

    def at(self, step: int) -> Modulation:
        """Modulation of one step: of text (B or 1, 2, ...), as if the two prompts were frames."""
        positive, negative = self.positive.at(step), self.negative.at(step)
        both = zip(positive.blocks, negative.blocks, strict=True)
        blocks = tuple((x, torch.stack(torch.broadcast_tensors(y, away), dim=1)) for (x, y), (_, away) in both)
        return Modulation(blocks, positive.final)


def text_pair(positive: TextConditioning, negative: TextConditioning) -> TextConditioning:
    """Text of two prompts in as many rows each, (B, 2 * rows, Dy)."""
    rows = max(1, positive.tokens.shape[1], negative.tokens.shape[1])
    tokens = [F.pad(text.tokens, (0, 0, 0, rows - text.tokens.shape[1])) for text in (positive, negative)]
    return TextConditioning(torch.cat(tokens, dim=1), positive.lengths, positive.pooled, negative.lengths)


def with_nag(
    guidance: Guidance,
    text: TextConditioning,
    modulation: ScheduleModulation,
    negative: TextConditioning,
    away: ScheduleModulation,
) -> tuple[tuple[TextConditioning, PairModulation], RunBlock]:
    """What a prompt and a negative one are to the denoiser together, and how to call blocks with it."""
    pair = text_pair(text, negative)
    return (pair, PairModulation(modulation, away)), run_with_nag(guidance, pair.tokens.shape[1] // 2)


def run_with_nag(guidance: Guidance, rows: int) -> RunBlock:
    """How to call blocks with the text of `text_pair`, which has `rows` rows for each prompt."""

    def attend(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        """As `joint_attention`, q, k, v (B, N + 2 * rows, K, D); each prompt's text sees the visual tokens and itself."""
        visual, away = q.shape[1] - 2 * rows, context.negative_lengths
        near = visual + max(context.lengths)
        positive = joint_attention(q[:, :near], k[:, :near], v[:, :near], context)
        start, stop = visual + rows, visual + rows + max(away)
        q, k, v = (torch.cat((t[:, :visual], t[:, start:stop]), dim=1) for t in (q, k, v))
        negative = joint_attention(q, k, v, replace(context, lengths=away))
        out = positive.new_zeros(len(q), visual + 2 * rows, positive.shape[2])
        out[:, :visual] = nag(positive[:, :visual], negative[:, :visual], guidance)
        out[:, visual:near] = positive[:, visual:]
        out[:, start:stop] = negative[:, visual:]
        return out

    return lambda call: run_block(replace(call, context=replace(call.context, joint_attention=attend)))


def nag(positive: Tensor, negative: Tensor, guidance: Guidance) -> Tensor:
    """What attention gives for the prompt, led away from what it gives for the negative one, (B, N, K * D) each.

    Extrapolated by the scale, held to tau times the L1 norm of `positive` and mixed with it by alpha, in float32.
    """

    def mixed(positive: Tensor, negative: Tensor) -> Tensor:
        positive, negative = positive.float(), negative.float()
        away = positive * guidance.nag_scale - negative * (guidance.nag_scale - 1)
        norms = (tensor.abs().sum(-1, keepdim=True).clamp(min=SMALLEST_NORM) for tensor in (positive, away))
        largest = guidance.nag_tau * next(norms)
        away = away * (largest / next(norms)).clamp(max=1)
        return torch.lerp(positive, away, guidance.nag_alpha)

    return apply_chunked(mixed, positive, negative)
