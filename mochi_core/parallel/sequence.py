"""Tokens of one video shared out to members: each has some of them in every layer, and they meet in attention.

Two ways to attend, which combine:
- Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509): members exchange tokens for heads, attend with some heads over all tokens, and
  exchange back.
- Ring attention (arXiv 2310.01889): keys and values go round, and what each part of them gives is merged by the log of its sum of
  exponentials.

The text is not shared out: every member computes all of its small stream, so that prompts of any length, empty ones too, need no
padding. In a ring each member attends to its own copy of the text, once.
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
"""Share of their time for which members may idle where tokens are shared out in whole parts of a frame."""
_current = threading.local()
"""`attention` is what members that run compiled blocks attend with just now: operators take no functions as arguments."""


@dataclass(frozen=True)
class TokenSplit:
    """The members that share the tokens of a forward: in each ring position a Ulysses group."""

    ulysses: Group
    ring: Group = Alone()  # noqa: RUF009 - has no state but a counter that stays 0

    @property
    def size(self) -> int:
        return self.ulysses.size * self.ring.size

    @property
    def rank(self) -> int:
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    def share(self, frames: int, per_frame: int, *, by_frame: bool = False) -> Share:
        """This member's share of the tokens of so many latent frames; with `by_frame`, in equal parts within frames."""
        unit = unit_of(frames, per_frame, self.size) if by_frame else 1
        units = shares(frames * per_frame // unit, self.size)
        return Share(self, tuple(count * unit for count in units), per_frame, unit if by_frame else None)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of the tensors of all members, the same bits for each."""
        return self.ring.total(self.ulysses.total(tensor))


def shares(count: int, members: int) -> list[int]:
    """`count` things for so many members, as equal as can be.

    Raises:
        ValueError: there are more members than things.
    """
    if count < members:
        raise ValueError(f"{count} tokens cannot be shared out to {members} members; use fewer of them.")
    few, more = divmod(count, members)
    return [few + (member < more) for member in range(members)]


def unit_of(frames: int, per_frame: int, members: int) -> int:
    """Tokens in which frames are shared out: the largest equal parts of a frame with which members idle at most `MOST_IDLE`."""
    for parts in (parts for parts in range(1, per_frame) if per_frame % parts == 0):
        count = frames * parts
        if -(-count // members) * members <= (1 + MOST_IDLE) * count:
            return per_frame // parts
    return 1


@dataclass(frozen=True)
class Share:
    """The tokens of one member."""

    split: TokenSplit
    counts: tuple[int, ...]
    """Tokens of each member."""
    per_frame: int
    unit: int | None
    """Tokens that lie in one frame, of which the share consists, or None if nothing depends on frames."""

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
        """Attention over the tokens of all members and the text, for the q, k and v of this member's tokens and the text.

        `attention` computes a member's part of it; in a ring, `attention_with_lse` does.
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
        """Values (B, n, F) of this member's tokens to those of all, (B, N, F)."""
        for group, counts in (
            (self.split.ulysses, self._rings[self.split.ring.rank]),
            (self.split.ring, self._ring_counts),
        ):
            x = torch.cat(group.gather(x, [(len(x), count, x.shape[2]) for count in counts]), dim=1)
        return x

    @property
    def _rings(self) -> list[tuple[int, ...]]:
        """Tokens of the members of each Ulysses group."""
        size = self.split.ulysses.size
        return [self.counts[start : start + size] for start in range(0, len(self.counts), size)]

    @property
    def _ring_counts(self) -> list[int]:
        return [sum(counts) for counts in self._rings]


def attend_by_heads(
    group: Group, counts: Sequence[int], attention: Attention, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention over the tokens of all members and the text, by Ulysses.

    Args:
        counts: tokens of each member, N in all.
        q, k, v: (B, K, n + L, D), of the n tokens of this member and then of the text.

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
    """Attention over the tokens of all members and the text, while keys and values go round; arguments as `attend_by_heads`."""
    own, (batch, heads, _, head_dim) = counts[group.rank], k.shape

    def send(block: Tensor, count: int) -> Callable[[], Tensor]:
        """Begin to send a block to the next member; what is waited for has `count` tokens of the one before."""
        following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        parts = [block if p == following else block[:0] for p in range(group.size)]
        shapes = [(2, batch, heads, count, head_dim) if p == before else (0,) for p in range(group.size)]
        wait = group.start(parts, shapes)
        return lambda: wait()[before]

    # Blocks by the way that they come in: this member's own, then those of the members before it.
    sizes = [counts[(group.rank - hop) % group.size] for hop in range(group.size)]
    wait = send(torch.stack((k[:, :, :own], v[:, :, :own])), sizes[1])
    out, lse = attention_with_lse(q, k, v)  # with the text, which is here in every member
    for following in (*sizes[2:], None):
        block = wait()  # (2, B, K, count, D)
        if following is not None:
            wait = send(block, following)
        out, lse = merge(out, lse, *attention_with_lse(q, *block))
    return out.to(q.dtype)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each, with the log of its sum of exponentials; at least in float32.

    `out` and `other` are (B, K, L, D), `lse` and `other_lse` (B, K, L).
    """
    both = torch.logaddexp(lse, other_lse)
    return out * torch.exp(lse - both)[..., None] + other * torch.exp(other_lse - both)[..., None], both


@custom_op("mochi::attend_together", mutates_args=())
def attend_together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of the members that this thread works for, as one operation to `torch.compile`; (B, K, n + L, D) each."""
    return _current.attention(q, k, v).contiguous()


@attend_together.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
    return q.new_empty(q.shape)
