"""Guidance as functions over velocities, and its changes inside a forward pass. The default is plain classifier-free guidance.

- Skip-layer guidance, STG-R of arXiv 2411.18664: steers away from the network's velocity without some of its blocks. The
  authors' figures for Mochi are for block 34 and scale 1.0.
- CFG-Zero*, arXiv 2503.18886: the unconditional velocity is scaled to the projection of the conditional one onto it, and the
  first steps have zero velocity (zero-init).
- Normalised attention guidance (NAG), arXiv 2505.21179: steers away from the negative prompt in every attention, so that
  distilled models need no unconditional velocity. Visual tokens are computed once; they attend to each prompt.
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
"""(latents, step, count) -> the first `count` velocities at the noise level of that step: under the prompt, under the prompt
without some blocks (only with skip-layer guidance), under the negative prompt."""

ZERO_INIT = 0.04
"""Fraction of the steps that zero-init skips, from arXiv 2503.18886. In Mochi's 64-step schedule these are three of the linear
ones, from noise level 1 to 0.998."""
SMALLEST_NORM = 1e-6
"""Lower bound of NAG's divisors."""


@dataclass(frozen=True)
class Guidance:
    """Additions to classifier-free guidance; none by default.

    Raises:
        ValueError: a number is not finite or out of range.
    """

    skip_blocks: tuple[int, ...] = ()
    """Blocks skipped for skip-layer guidance, counted from 0; published for Mochi: (34,)."""
    skip_scale: float = 1.0
    """Factor of the difference made by skipping them."""
    cfg_zero: bool = False
    """Whether guidance is CFG-Zero*."""
    nag_scale: float = 1.0
    """How far attention is steered from the negative prompt; 1 is off, the published value for joint attention (Flux) is 5."""
    nag_tau: float = 2.5
    """Largest ratio of the L1 norms of attention's guided and plain outputs."""
    nag_alpha: float = 0.25
    """Weight of the guided output in the result."""

    def __post_init__(self) -> None:
        for name in ("skip_scale", "nag_scale", "nag_tau", "nag_alpha"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}, but must be finite; omit it to use the published value.")
        if self.nag_tau <= 0 or not 0 <= self.nag_alpha <= 1:
            raise ValueError(
                f"nag_tau is {self.nag_tau} and nag_alpha {self.nag_alpha}; use a ratio above 0, such as 2.5, and a fraction "
                "from 0 to 1, such as 0.25."
            )

    @property
    def uses_nag(self) -> bool:
        return self.nag_scale != 1 and self.nag_alpha > 0

    def check_depth(self, depth: int) -> None:
        """Raise a ValueError if a denoiser of `depth` blocks lacks one of `skip_blocks`."""
        for index in self.skip_blocks:
            if index not in range(depth):
                raise ValueError(
                    f"skip_blocks lists block {index}, but this denoiser has blocks 0 to {depth - 1}; the published choice "
                    "for Mochi's 48 is 34."
                )


PLAIN = Guidance()


def guided(velocities: Velocities, scales: Sequence[float], guidance: Guidance = PLAIN) -> Velocity:
    """Classifier-free guidance: uncond + scale * (cond - uncond), with one scale per step, and the additions of `guidance`.

    Scale 1 needs no unconditional velocity. A step skipped by zero-init needs no velocity at all.
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
    """Factor per video, (B, 1, ...), that brings `uncond` (B, ...) closest to `cond`."""
    axes = tuple(range(1, cond.ndim))
    square = uncond.square().sum(axes, keepdim=True)
    return (cond * uncond).sum(axes, keepdim=True) / square.clamp(min=torch.finfo(square.dtype).tiny)


def without_blocks(blocks: Sequence[int], run: RunBlock, *, shared: bool) -> tuple[RunBlock, RunBlock]:
    """Two ways to run each block, called in turn: one for all blocks, the other for all but `blocks`.

    With `shared`, everything before the first of `blocks` is computed once, as both are identical up to there.
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
    """Modulations for a prompt whose text is followed by the negative prompt's, see `text_pair`."""

    positive: ScheduleModulation
    negative: ScheduleModulation

    def at(self, step: int) -> Modulation:
        """Modulation of one step; that of the text is (B or 1, 2, ...), as if the two prompts were frames."""
        positive, negative = self.positive.at(step), self.negative.at(step)
        both = zip(positive.blocks, negative.blocks, strict=True)
        blocks = tuple((x, torch.stack(torch.broadcast_tensors(y, away), dim=1)) for (x, y), (_, away) in both)
        return Modulation(blocks, positive.final)


def text_pair(positive: TextConditioning, negative: TextConditioning) -> TextConditioning:
    """Text of two prompts, padded to the same number of rows and joined, (B, 2 * rows, Dy)."""
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
    """The denoiser's joint condition for a prompt and a negative prompt, and the function that runs blocks with it."""
    pair = text_pair(text, negative)
    return (pair, PairModulation(modulation, away)), run_with_nag(guidance, pair.tokens.shape[1] // 2)


def run_with_nag(guidance: Guidance, rows: int) -> RunBlock:
    """The function that runs blocks with the text of `text_pair`, which has `rows` rows per prompt."""

    def attend(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        """As `joint_attention`, for q, k, v (B, N + 2 * rows, K, D); each prompt's text attends to visual tokens and itself."""
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
    """Attention's output for the prompt, steered away from that for the negative one, (B, N, K * D) each.

    Extrapolated by the scale, limited to tau times the L1 norm of `positive`, and mixed with it by alpha, in float32.
    """

    def mixed(positive: Tensor, negative: Tensor) -> Tensor:
        positive, negative = positive.float(), negative.float()
        away = positive * guidance.nag_scale - negative * (guidance.nag_scale - 1)
        norms = (tensor.abs().sum(-1, keepdim=True).clamp(min=SMALLEST_NORM) for tensor in (positive, away))
        largest = guidance.nag_tau * next(norms)
        away = away * (largest / next(norms)).clamp(max=1)
        return torch.lerp(positive, away, guidance.nag_alpha)

    return apply_chunked(mixed, positive, negative)
