"""Leaving out the blocks where little has changed since the last step: faster, and the result changes.

What a run of the blocks adds to the visual tokens is kept, and added again in a later step that resembles it. Every video of
a batch, in each branch of guidance, decides for itself: it gets the result that it would have had alone.

Two measures of change, both relative, the mean absolute difference over the mean absolute value:
- `teacache` (TeaCache, arXiv 2411.19108): of the modulated input of the first block, translated by a polynomial into the
  change of the output, and summed up until blocks run again. Its authors give thresholds for Mochi with 64 steps: 0.06
  for 1.5 times the speed, 0.09 for 2.1.
- `first_block`: of what the first block adds, against the last step in which all blocks ran. The first block always runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..transformer.block import AsymmetricJointBlock, BlockContext, RunBlock, run_block
from ..transformer.layers import modulated_norm
from .schedule import in_share

METHODS = ("teacache", "first_block")
# TeaCache's fit for Mochi, highest power first, to small changes: beyond LARGEST_FITTED it falls, and soon is negative.
COEFFICIENTS = (-3.51241319e3, 8.11675948e2, -6.09400215e1, 2.42429681, 3.05291719e-3)
LARGEST_FITTED = 0.108

BlocksAt = Callable[[int], RunBlock]
"""How blocks are called in a step of a schedule."""


@dataclass
class BlockCache:
    """When blocks are left out, and how often they were in the runs that it was given to."""

    method: str
    threshold: float
    """The smallest change with which all blocks run; 0 leaves out none."""
    start: float = 0.0
    end: float = 1.0
    """Share of the steps, between which blocks may be left out; in the first and the last step they always run."""
    forwards: int = field(default=0, init=False)
    """Forwards of one video in one branch of guidance so far."""
    hits: int = field(default=0, init=False)
    """Those of them in which blocks were left out."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"The cache method is {self.method!r}; use one of {', '.join(METHODS)}.")
        if not self.threshold >= 0:
            raise ValueError(f"The cache threshold is {self.threshold}; use 0 (off) or more, such as 0.06.")

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.forwards)

    def report(self) -> str:
        return (
            f"{self.method} with threshold {self.threshold:g} left out blocks in {self.hits} of {self.forwards} forwards "
            f"({self.hit_rate:.0%})"
        )

    def may_reuse(self, step: int, num_steps: int) -> bool:
        return 0 < step < num_steps - 1 and in_share(step, num_steps, self.start, self.end)

    def branch(self, batch: int, num_steps: int, depth: int) -> BlocksAt:
        """The blocks of one branch of guidance, for the `batch` videos of one run."""
        memories = [Memory() for _ in range(batch)]
        return lambda step: CachedBlocks(self, memories, self.may_reuse(step, num_steps), depth)


@dataclass
class Memory:
    """What is kept of one video in one branch of guidance; of released Mochi, twice 274 MB for 163 frames in 16 bits."""

    reference: Tensor | None = None
    """(N, Dx), what the next step is compared with."""
    residual: Tensor | None = None
    """(N, Dx), what the blocks added when they last ran."""
    change: float = 0.0
    """Since then."""


class CachedBlocks:
    """`RunBlock` of one forward: `run`, for those samples of the batch that need it.

    Between the blocks there are only those samples; the last block gives back the whole batch, of x.
    """

    def __init__(
        self, cache: BlockCache, memories: Sequence[Memory], may_reuse: bool, depth: int, run: RunBlock = run_block
    ) -> None:
        """`memories` has one entry per sample; `depth` is the number of blocks."""
        self.cache, self.memories, self.may_reuse, self.run = cache, memories, may_reuse, run
        self.last = depth - 1
        self.rows = list(range(len(memories)))
        """The samples for which blocks run."""

    def __call__(
        self,
        block: AsymmetricJointBlock,
        index: int,
        x: Tensor,
        y: Tensor,
        modulation: tuple[Tensor, Tensor],
        context: BlockContext,
    ) -> tuple[Tensor, Tensor]:
        if index == 0 and self.cache.method == "teacache":
            self._decide(modulated_norm(x, modulation[0].chunk(4, dim=-1)[0]), x)
            x, y = self._chosen(x), self._chosen_text(y, context)
        before = x
        if self.rows:
            chosen = self._chosen(modulation[0]), self._chosen(modulation[1])
            x, y = self.run(block, index, x, y, chosen, replace(context, lengths=self._lengths(context)))
        if index == 0 and self.cache.method == "first_block":
            self._decide(x - before, x)
            x, y = self._chosen(x), self._chosen_text(y, context)
        return (self._joined(x) if index == self.last else x), y

    def _decide(self, signals: Tensor, x: Tensor) -> None:
        """For which samples the following blocks run; `signals` and `x` (B, N, Dx), residuals are added to `x`."""
        self.entering = x
        self.rows = [row for row, memory in enumerate(self.memories) if not self._reuses(memory, signals[row])]
        self.cache.forwards += len(self.memories)
        self.cache.hits += len(self.memories) - len(self.rows)

    def _reuses(self, memory: Memory, signal: Tensor) -> bool:
        teacache, reuses = self.cache.method == "teacache", False
        if self.may_reuse and memory.residual is not None and memory.reference is not None:
            change = relative_change(signal, memory.reference)
            memory.change = memory.change + output_change(change) if teacache else change
            reuses = memory.change < self.cache.threshold
        if not reuses:
            memory.change = 0.0
        if teacache or not reuses:
            memory.reference = signal
        return reuses

    def _chosen(self, batch: Tensor) -> Tensor:
        """The rows of a tensor (B or 1, ...) that blocks run for."""
        return batch if len(batch) in (1, len(self.rows)) and self.rows else batch[self.rows]

    def _chosen_text(self, y: Tensor, context: BlockContext) -> Tensor:
        """The rows of y (B, L, Dy), as long as the longest prompt among them."""
        return self._chosen(y)[:, : max(self._lengths(context), default=0)]

    def _lengths(self, context: BlockContext) -> tuple[int, ...]:
        return tuple(context.lengths[row] for row in self.rows)

    def _joined(self, x: Tensor) -> Tensor:
        """What the blocks made of some samples, with what they did earlier to the others."""
        for result, row in zip(x, self.rows, strict=True):
            self.memories[row].residual = result - self.entering[row]
        if len(self.rows) == len(self.memories):
            return x
        joined = self.entering.clone()
        joined[self.rows] = x
        for row in set(range(len(joined))) - set(self.rows):
            joined[row] += self.memories[row].residual  # pyright: ignore[reportOperatorIssue] - reused ones have one
        return joined


def relative_change(signal: Tensor, reference: Tensor) -> float:
    """Mean absolute difference over the mean absolute value of `reference`."""
    difference, size = (tensor.abs().mean(dtype=torch.float32) for tensor in (signal - reference, reference))
    return (difference / size).item()


def output_change(input_change: float) -> float:
    """TeaCache's estimate of the output's relative change from that of the first block's modulated input."""
    estimate, change = 0.0, min(input_change, LARGEST_FITTED)
    for coefficient in COEFFICIENTS:
        estimate = estimate * change + coefficient
    return estimate
