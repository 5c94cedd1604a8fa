"""A run shared by several members: what they exchange, what they must have in common, and how to stop them all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..parallel.group import Group
from ..parallel.team import Members
from ..transformer.model import AsymmDiT
from .block_cache import BlockCache
from .given import Given
from .guidance import Velocities

OnStep = Callable[[int, Tensor], bool | None]
"""(step, latents after that step) -> True to stop the run."""


def exchanged(velocities: Velocities, positive: int, group: Group, dtype: torch.dtype) -> Velocities:
    """Velocities of this dtype, shared by two members: the first one computes the first `positive`, those under the prompt."""

    def of_both(latents: Tensor, step: int, count: int) -> list[Tensor]:
        counts = min(count, positive), max(0, count - positive)
        own = latents.new_empty(0, *latents.shape, dtype=dtype)
        if works := counts[group.rank]:
            own = torch.stack(velocities(latents, step, works))
        return [*torch.cat(group.gather(own, [(number, *latents.shape) for number in counts]))]

    return of_both


def stopping_all(on_step: OnStep | None, members: Members) -> OnStep:
    """This member's `on_step`, extended so that all members stop if any member's returns True."""
    return lambda step, latents: members.any(bool(on_step is not None and on_step(step, latents)))


@contextmanager
def counted_together(cache: BlockCache | None, members: Members | None) -> Iterator[None]:
    """Make a cache count the forward passes of all conditions, including other members', as it would on one device."""
    if cache is None or members is None:
        yield
        return
    before = cache.forwards, cache.hits
    yield
    made = members.guidance.total(torch.tensor([cache.forwards - before[0], cache.hits - before[1]]))
    cache.forwards, cache.hits = (old + new for old, new in zip(before, made.tolist(), strict=True))


def facts(
    dit: AsymmDiT,
    state: Tensor,
    sigmas: Tensor,
    conditions: Sequence[tuple[Tensor, Tensor]],
    guidance: object,
    cache: BlockCache | None,
    given: Given | None,
) -> dict[str, str]:
    """What all members of a run must have in common, as short strings."""
    weights = {name: (tensor.shape, tensor.dtype) for name, tensor in dit.state_dict().items()}
    return {
        "the video has the shape": str(tuple(state.shape)),
        "the noise has the checksum": _checksum(state),
        "schedule and guidance have the checksum": _checksum(sigmas, str(guidance)),
        "the prompts have the checksum": _checksum(*(tensor for condition in conditions for tensor in condition)),
        "the given frames have the checksum": "none" if given is None else _checksum(*_parts(given)),
        "the transformer has the checksum": _checksum(dit.pos_frequencies, dit.x_embedder.proj.weight, str(weights)),
        "the block cache is": "none" if cache is None else str((cache.method, cache.threshold, cache.start, cache.end)),
    }


def _parts(given: Given) -> tuple[Tensor | str, ...]:
    """The parts of given frames that affect a run: not the latents where the level is 1."""
    return given.latents[:, :, given.levels.cpu() < 1].float(), given.levels, str(given.held)


def _checksum(*values: Tensor | str) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest.update(value.encode() if isinstance(value, str) else value)
    return digest.hexdigest()[:12]
