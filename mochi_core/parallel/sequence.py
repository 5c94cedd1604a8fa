"""Sequence parallelism: each member has some of a video's tokens in every layer, and they communicate in attention.

Two methods, which can be combined:
- Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509): members exchange tokens for heads, attend with some of the heads over all tokens,
  and exchange back.
- Ring attention (arXiv 2310.01889): keys and values circulate, and the partial results are merged by their log-sum-exp.

The text is not split: every member computes the whole text stream, which is small, so that prompts of any length, even empty
ones, need no padding. In a ring, each member attends once, to its own copy of the text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from ..transformer.attention import Attention, attention_with_lse
from .group import Alone, Group

MOST_IDLE = 0.03
"""Fraction of time that members may idle when tokens are split into equal parts of a frame."""
_current = threading.local()
"""`_current.attention` is that of a member running compiled blocks: operators cannot take functions as arguments."""


@dataclass(frozen=True)
class TokenSplit:
    """The members that share the tokens of a forward pass: a Ulysses group at each ring position."""

    ulysses: Group
    ring: Group = Alone()  # noqa: RUF009 - its only state is a counter that stays 0

    @property
    def size(self) -> int:
        return self.ulysses.size * self.ring.size

    @property
    def rank(self) -> int:
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    def share(self, frames: int, per_frame: int, *, by_frame: bool = False) -> Share:
        """This member's share of the tokens of `frames` latent frames; with `by_frame`, in equal parts of a frame."""
        unit = unit_of(frames, per_frame, self.size) if by_frame else 1
        units = shares(frames * per_frame // unit, self.size)
        return Share(self, tuple(count * unit for count in units), per_frame, unit if by_frame else None)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of all members' tensors, bit-identical in each."""
        return self.ring.total(self.ulysses.total(tensor))


def shares(count: int, members: int) -> list[int]:
    """Divide `count` items among `members` as equally as possible.

    Raises:
        ValueError: there are more members than items.
    """
    if count < members:
        raise ValueError(f"{count} tokens cannot be divided among {members} members; use fewer members.")
    few, more = divmod(count, members)
    return [few + (member < more) for member in range(members)]


def unit_of(frames: int, per_frame: int, members: int) -> int:
    """Tokens per unit when frames are split: the largest equal parts of a frame that keep idle time within `MOST_IDLE`."""
    for parts in (parts for parts in range(1, per_frame) if per_frame % parts == 0):
        count = frames * parts
        if -(-count // members) * members <= (1 + MOST_IDLE) * count:
            return per_frame // parts
    return 1


@dataclass(frozen=True)
class Share:
    """One member's tokens."""

    split: TokenSplit
    counts: tuple[int, ...]
    """Number of tokens of each member."""
    per_frame: int
    unit: int | None
    """Tokens per unit of the share, each within one frame; None if nothing depends on frames."""

    @property
    def tokens(self) -> slice:
        start = sum(self.counts[: self.split.rank])
        return slice(start, start + self.counts[self.split.rank])

    @property
    def frames(self) -> list[int] | None:
        """The frame of each unit of tokens."""
        if self.unit is None:
            return None
        return [token // self.per_frame for token in range(self.tokens.start, self.tokens.stop, self.unit)]

    def attention(self, attention: Attention) -> Attention:
        """Attention over all members' tokens and the text, given q, k and v of this member's tokens and the text.

        `attention` computes this member's part; in a ring, `attention_with_lse` does.
        """
        if self.split.ring.size > 1:
            attention = partial(attend_in_ring, self.split.ring, self._ring_counts)
        together = partial(attend_by_heads, self.split.ulysses, self._rings[self.split.ring.rank], attention)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                return attend_together(q, k, v)
            return together(q, k, v)

        _current.attention = together
        return attend

    def gather(self, x: Tensor) -> Tensor:
        """Gather values (B, n, F) of each member's tokens to (B, N, F) of all tokens."""
        for group, counts in (
            (self.split.ulysses, self._rings[self.split.ring.rank]),
            (self.split.ring, self._ring_counts),
        ):
            x = torch.cat(group.gather(x, [(len(x), count, x.shape[2]) for count in counts]), dim=1)
        return x

    @property
    def _rings(self) -> list[tuple[int, ...]]:
        """Token counts of the members of each Ulysses group."""
        size = self.split.ulysses.size
        return [self.counts[start : start + size] for start in range(0, len(self.counts), size)]

    @property
    def _ring_counts(self) -> list[int]:
        return [sum(counts) for counts in self._rings]


def attend_by_heads(
    group: Group, counts: Sequence[int], attention: Attention, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention over all members' tokens and the text, by Ulysses.

    Args:
        counts: tokens of each member, N in all.
        q, k, v: (B, K, n + L, D), for this member's n tokens followed by the text.

    Returns:
        (B, K, n + L, D).
    """
    if group.size == 1:
        return attention(q, k, v)
    batch, heads, length, head_dim = q.shape
    own, some = counts[group.rank], heads // group.size
    packed = torch.stack((q, k, v)).unflatten(2, (group.size, some))  # (3, B, P, K / P, n + L, D)
    parts = [packed[:, :, p, :, :own] for p in range(group.size)]
    received = group.exchange(parts, [(3, batch, some, count, head_dim) for count in counts])
    joint = torch.cat((*received, packed[:, :, group.rank, :, own:]), dim=3)  # (3, B, K / P, N + L, D)
    del packed, parts, received
    out = attention(*joint)  # (B, K / P, N + L, D)
    del joint
    *visual, text = out.split([*counts, length - own], dim=2)
    parts = [torch.cat((tokens, text), dim=2) for tokens in visual]  # (B, K / P, n + L, D) each
    return torch.cat(group.exchange(parts, [(batch, some, length, head_dim)] * group.size), dim=1)


def attend_in_ring(group: Group, counts: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over all members' tokens and the text by a ring of keys and values; arguments as for `attend_by_heads`."""
    own, (batch, heads, _, head_dim) = counts[group.rank], k.shape

    def send(block: Tensor, count: int) -> Callable[[], Tensor]:
        """Start sending a block to the next member; the returned wait gives the previous one's block of `count` tokens."""
        following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        parts = [block if p == following else block[:0] for p in range(group.size)]
        shapes = [(2, batch, heads, count, head_dim) if p == before else (0,) for p in range(group.size)]
        wait = group.start(parts, shapes)
        return lambda: wait()[before]

    # Blocks in order of arrival: this member's own, then those of the preceding members.
    sizes = [counts[(group.rank - hop) % group.size] for hop in range(group.size)]
    wait = send(torch.stack((k[:, :, :own], v[:, :, :own])), sizes[1])
    out, lse = attention_with_lse(q, k, v)  # including the text, which every member has
    for following in (*sizes[2:], None):
        block = wait()  # (2, B, K, count, D)
        if following is not None:
            wait = send(block, following)
        out, lse = merge(out, lse, *attention_with_lse(q, *block))
    return out.to(q.dtype)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two sets of keys by the log-sum-exp of each; at least in float32.

    `out` and `other` are (B, K, L, D), `lse` and `other_lse` (B, K, L).
    """
    both = torch.logaddexp(lse, other_lse)
    return out * torch.exp(lse - both)[..., None] + other * torch.exp(other_lse - both)[..., None], both


@custom_op("mochi::attend_together", mutates_args=())
def attend_together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """This thread's joint attention, as a single operation for `torch.compile`; all tensors are (B, K, n + L, D)."""
    return _current.attention(q, k, v).contiguous()


@attend_together.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
    return q.new_empty(q.shape)
