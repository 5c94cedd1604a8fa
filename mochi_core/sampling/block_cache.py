"""Skip blocks when little has changed since the last step: faster, but the result changes.

What the blocks added to the visual tokens when they last ran, their residual, is kept and added again in later steps that
resemble that one. Each video of a batch is decided separately under each condition, so its result is the same as if it were
made alone.

There are two measures of change, both the mean absolute difference relative to the mean absolute value:
- `teacache` (TeaCache, arXiv 2411.19108): the change of the first block's modulated input since the last step, mapped by a
  polynomial to the change of the output, and accumulated until blocks run again. TeaCache4Mochi/README.md in its repository,
  ali-vilab/TeaCache, gives thresholds for 64 steps: 0.06 for 1.5 times the speed, 0.09 for 2.1.
- `first_block`: the change of the first block's residual since the last step in which all blocks ran. The first block always
  runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..choices import check_cache
from ..transformer.block import BlockCall, BlockContext, RunBlock, run_block
from ..transformer.layers import modulated_norm
from .schedule import check_share, in_step_range

COEFFICIENTS = (-3.51241319e3, 8.11675948e2, -6.09400215e1, 2.42429681, 3.05291719e-3)
"""TeaCache's polynomial for Mochi, highest power first: `coefficients` in TeaCache4Mochi/teacache_mochi.py."""
LARGEST_FITTED = 0.108
"""Input change up to which the polynomial increases; beyond it decreases, and soon becomes negative."""

BlocksAt = Callable[[int], RunBlock]
"""step -> function that runs the blocks in that step."""


@dataclass
class BlockCache:
    """Settings for skipping blocks, and counts of how often they were skipped in all runs with this cache.

    Raises:
        ValueError: the method is unknown, or a number is out of range.
    """

    method: str
    """One of `CACHE_METHODS`."""
    threshold: float
    """The smallest change at which all blocks run; 0 skips none."""
    start: float = 0.0
    """Fraction of the steps after which blocks may be skipped; in the first step they always run."""
    end: float = 1.0
    """Fraction of the steps up to which blocks may be skipped; in the last step they always run."""
    forwards: int = field(default=0, init=False)
    """Forward passes so far, counted per video and condition."""
    hits: int = field(default=0, init=False)
    """Forward passes in which blocks were skipped."""

    def __post_init__(self) -> None:
        check_cache(self.method, self.threshold)
        check_share("start", self.start)
        check_share("end", self.end)

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.forwards)

    def report(self) -> str:
        return (
            f"{self.method} with threshold {self.threshold:g} skipped blocks in {self.hits} of {self.forwards} forward passes "
            f"({self.hit_rate:.0%})"
        )

    def can_skip(self, step: int, num_steps: int) -> bool:
        """Whether blocks may be skipped in a step of a schedule."""
        return 0 < step < num_steps - 1 and in_step_range(step, num_steps, self.start, self.end)

    def for_condition(
        self,
        batch: int,
        num_steps: int,
        depth: int,
        run: RunBlock = run_block,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> BlocksAt:
        """The function that runs the `depth` blocks at each step, for one condition and a run's `batch` videos, by `run`.

        `total` sums a tensor over the members that share the tokens: they decide together.
        """
        states = [CacheState() for _ in range(batch)]
        return lambda step: CachedBlocks(self, states, self.can_skip(step, num_steps), depth, run, total)


@dataclass
class CacheState:
    """What is kept per video and condition: in 16 bits, 2 x 274 MB for 163 frames of 848x480."""

    reference: Tensor | None = None
    """(N, Dx), what the next step is compared with."""
    residual: Tensor | None = None
    """(N, Dx), what the blocks added when they last ran."""
    change: float = 0.0
    """Change since then by the method's measure."""


class CachedBlocks:
    """The `RunBlock` of one forward pass, which calls `run` for those samples of the batch that need it.

    Only these samples pass between blocks; after the last block, x is the whole batch again.
    """

    def __init__(
        self,
        cache: BlockCache,
        states: Sequence[CacheState],
        can_skip: bool,
        depth: int,
        run: RunBlock = run_block,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`states` has one entry per sample; `depth` is the number of blocks; `total` is as for `for_condition`."""
        self.cache, self.states, self.can_skip, self.run, self.total = cache, states, can_skip, run, total
        self.last = depth - 1
        self.samples = list(range(len(states)))
        """Indices of the samples for which blocks run."""

    def __call__(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        x, y, context = call.x, call.y, call.context
        if call.index == 0 and self.cache.method == "teacache":
            scale_attn_x = call.modulation[0].chunk(4, dim=-1)[0]
            self._decide(modulated_norm(x, scale_attn_x), x)
            x, y = self._select(x), self._select_text(y, context)
        before = x
        if self.samples:
            modulation = self._select(call.modulation[0]), self._select(call.modulation[1])
            selected = context.select(self.samples)
            x, y = self.run(replace(call, x=x, y=y, modulation=modulation, context=selected))
        if call.index == 0 and self.cache.method == "first_block":
            self._decide(x - before, x)
            x, y = self._select(x), self._select_text(y, context)
        return (self._merge(x) if call.index == self.last else x), y

    def _decide(self, signals: Tensor, x: Tensor) -> None:
        """Find the samples for which the following blocks run.

        `signals` (B, N, Dx) are compared with the references; residuals are added to `x` (B, N, Dx).
        """
        self.entering = x
        self.samples = [i for i, state in enumerate(self.states) if not self._skips(state, signals[i])]
        self._check_agreement(signals.device)
        self.cache.forwards += len(self.states)
        self.cache.hits += len(self.states) - len(self.samples)

    def _check_agreement(self, device: torch.device) -> None:
        """Raise a RuntimeError unless all members chose the same samples: otherwise the next exchanges would not match."""
        if self.total is None or not self.can_skip:
            return
        chosen = [float(i in self.samples) for i in range(len(self.states))]
        *counts, members = self.total(torch.tensor([*chosen, 1.0], device=device)).tolist()
        if any(count not in (0, members) for count in counts):
            raise RuntimeError(
                "Members made different block cache decisions; give all of them the same cache and video."
            )

    def _skips(self, state: CacheState, signal: Tensor) -> bool:
        """Whether to skip the blocks for one sample with this `signal` (N, Dx); updates `state`."""
        teacache, skips = self.cache.method == "teacache", False
        if self.can_skip and state.residual is not None and state.reference is not None:
            change = relative_change(signal, state.reference, self.total)
            state.change = state.change + output_change(change) if teacache else change
            skips = state.change < self.cache.threshold
        if not skips:
            state.change = 0.0
        if teacache or not skips:
            state.reference = signal
        return skips

    def _select(self, batch: Tensor) -> Tensor:
        """The samples of a tensor (B or 1, ...) for which blocks run."""
        if len(batch) in (1, len(self.samples)) and self.samples:
            return batch
        # Not batch[self.samples]: copying the indices to a GPU would wait until all work queued there is done.
        return torch.cat([batch[:0], *(batch[i : i + 1] for i in self.samples)])

    def _select_text(self, y: Tensor, context: BlockContext) -> Tensor:
        """The samples of y (B, L, Dy) for which blocks run, cut to the longest prompt among them.

        NAG's joint prompts, two in one, are not cut.
        """
        longest = y.shape[1] if context.negative_lengths else max(context.select(self.samples).lengths, default=0)
        return self._select(y)[:, :longest]

    def _merge(self, x: Tensor) -> Tensor:
        """The whole batch (B, N, Dx): results `x` for the samples for which blocks ran, kept residuals for the others."""
        x = x.to(self.entering.device)  # blocks may be on several devices
        for result, i in zip(x, self.samples, strict=True):
            self.states[i].residual = result - self.entering[i]
        if len(self.samples) == len(self.states):
            return x
        merged = self.entering.clone()
        for result, i in zip(x, self.samples, strict=True):
            merged[i] = result
        for i in set(range(len(merged))) - set(self.samples):
            merged[i] += self.states[i].residual  # pyright: ignore[reportOperatorIssue] - skipped samples have one
        return merged


def relative_change(signal: Tensor, reference: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> float:
    """Mean absolute difference over mean absolute value of `reference`; with `total`, over the tokens of all members."""
    if total is not None:
        difference, size = total(
            torch.stack([t.abs().sum(dtype=torch.float32) for t in (signal - reference, reference)])
        )
        return (difference / size).item()
    difference, size = (tensor.abs().mean(dtype=torch.float32) for tensor in (signal - reference, reference))
    return (difference / size).item()


def output_change(input_change: float) -> float:
    """TeaCache's estimate of the output's relative change from that of the first block's modulated input."""
    estimate, change = 0.0, min(input_change, LARGEST_FITTED)
    for coefficient in COEFFICIENTS:
        estimate = estimate * change + coefficient
    return estimate
