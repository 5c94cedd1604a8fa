"""Skipping blocks where little has changed since the last step: faster, and the result changes.

What the blocks added to the visual tokens when they last ran, their residual, is kept and added again in a later step that
resembles that one. Every video of a batch, under each condition, is decided on by itself: its result is what it would have
been alone.

Two measures of change, both relative, the mean absolute difference over the mean absolute value:
- `teacache` (TeaCache, arXiv 2411.19108): change of the modulated input of the first block since the last step, translated by
  a polynomial into the change of the output, and summed up until blocks run again. TeaCache4Mochi/README.md in its repository,
  ali-vilab/TeaCache, gives thresholds for 64 steps: 0.06 for 1.5 times the speed, 0.09 for 2.1.
- `first_block`: change of what the first block adds since the last step in which all blocks ran. The first block always runs.
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
"""Change of the input up to which the polynomial rises; beyond it falls, and soon is negative."""

BlocksAt = Callable[[int], RunBlock]
"""step -> how blocks are called in that step."""


@dataclass
class BlockCache:
    """When blocks are skipped, and how often they were in the runs that it was given to.

    Raises:
        ValueError: another method, or numbers outside their ranges.
    """

    method: str
    """One of `CACHE_METHODS`."""
    threshold: float
    """The smallest change with which all blocks run; 0 skips none."""
    start: float = 0.0
    """Fraction of the steps from which on blocks may be skipped; in the first step they always run."""
    end: float = 1.0
    """Fraction of the steps up to which blocks may be skipped; in the last step they always run."""
    forwards: int = field(default=0, init=False)
    """Forwards so far, of one video under one condition each."""
    hits: int = field(default=0, init=False)
    """Forwards in which blocks were skipped."""

    def __post_init__(self) -> None:
        check_cache(self.method, self.threshold)
        check_share("start", self.start)
        check_share("end", self.end)

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.forwards)

    def report(self) -> str:
        return (
            f"{self.method} with threshold {self.threshold:g} left out blocks in {self.hits} of {self.forwards} forwards "
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
        """How to call the `depth` blocks under one condition, for the `batch` videos of one run; `run` calls those needed.

        `total` adds up a tensor over the members that share the tokens: they decide together.
        """
        states = [CacheState() for _ in range(batch)]
        return lambda step: CachedBlocks(self, states, self.can_skip(step, num_steps), depth, run, total)


@dataclass
class CacheState:
    """What is kept of one video under one condition: in 16 bits, 2 x 274 MB for 163 frames of 848x480."""

    reference: Tensor | None = None
    """(N, Dx), what the next step is compared with."""
    residual: Tensor | None = None
    """(N, Dx), what the blocks added when they last ran."""
    change: float = 0.0
    """Change since then, as the method measures it."""


class CachedBlocks:
    """The `RunBlock` of one forward, which calls `run` for those samples of the batch that need it.

    Between the blocks there are only those samples; the last block gives back the whole batch of x.
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
        """`states` has one entry per sample; `depth` is the number of blocks; `total` is that of `for_condition`."""
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

        `signals` (B, N, Dx) is what is compared with the references, `x` (B, N, Dx) what residuals are added to.
        """
        self.entering = x
        self.samples = [i for i, state in enumerate(self.states) if not self._skips(state, signals[i])]
        self._check_agreement(signals.device)
        self.cache.forwards += len(self.states)
        self.cache.hits += len(self.states) - len(self.samples)

    def _check_agreement(self, device: torch.device) -> None:
        """Raise a RuntimeError unless all members chose the same samples: what they send each other next would not fit."""
        if self.total is None or not self.can_skip:
            return
        chosen = [float(i in self.samples) for i in range(len(self.states))]
        *counts, members = self.total(torch.tensor([*chosen, 1.0], device=device)).tolist()
        if any(count not in (0, members) for count in counts):
            raise RuntimeError(
                "Members decided differently about the block cache; give all of them the same cache and video."
            )

    def _skips(self, state: CacheState, signal: Tensor) -> bool:
        """Whether the blocks are skipped for one sample with this `signal` (N, Dx); notes the change in `state`."""
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
        """The samples that blocks run for, of a tensor (B or 1, ...)."""
        if len(batch) in (1, len(self.samples)) and self.samples:
            return batch
        # Not batch[self.samples]: bringing the indices to a GPU would wait until all earlier work there is done.
        return torch.cat([batch[:0], *(batch[i : i + 1] for i in self.samples)])

    def _select_text(self, y: Tensor, context: BlockContext) -> Tensor:
        """The samples that blocks run for, of y (B, L, Dy), as long as the longest prompt among them.

        Two prompts in one, as NAG has them, are left as long as they are.
        """
        longest = y.shape[1] if context.negative_lengths else max(context.select(self.samples).lengths, default=0)
        return self._select(y)[:, :longest]

    def _merge(self, x: Tensor) -> Tensor:
        """The whole batch (B, N, Dx): results `x` of the samples that blocks ran for, kept residuals for the others."""
        x = x.to(self.entering.device)  # blocks may lie on several devices
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
    """Mean absolute difference over the mean absolute value of `reference`; with `total`, of the tokens of all members."""
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
