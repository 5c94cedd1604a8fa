"""Temporally parallel decoding: each member decodes some of the latent frames, layer by layer.

Before each causal convolution, a member sends its last two input frames to the members whose frames follow, and receives those
before its own; nobody waits for a whole layer. Norms are per frame, so nothing else is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoder.layers import CONV_SIZE, RGB, frame_norm
from ..autoencoder.memory import decoder_memory_estimate
from ..autoencoder.model import AsymmVAE, OnProgress
from ..autoencoder.plan import MAX_WORKING_SET, WORKING_SETS, Plan, free_memory
from ..autoencoder.steps import decoder_steps
from ..autoencoder.streaming import StreamStep
from .group import Group
from .sequence import shares


@torch.no_grad()
def decode_together(
    vae: AsymmVAE,
    latents: Tensor,
    group: Group,
    memory_limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Latents (B, 12, T, H, W) to video (B, 3, 6(T - 1) + 1, 8H, 8W), both identical in all members.

    `memory_limit` and `on_progress` are as for `AsymmVAE.decode`, for each member.

    Raises:
        ValueError: see `AsymmVAE.decode`.
    """
    if group.size == 1:
        return vae.decode(latents, memory_limit, on_progress)
    decoder = vae.check_decoder(latents.shape)
    device = next(decoder.parameters()).device
    steps = [step for step in decoder_steps(decoder) if isinstance(step, StreamStep)]
    plan, most = _plan(vae, latents, group, free_memory(device) if memory_limit is None else memory_limit, device)
    out = torch.empty(vae.decoded_shape(latents.shape), dtype=vae.dtype, device=latents.device)
    for i, one in enumerate(latents.to(device, vae.dtype).split(1)):
        borders, done = Borders(group, rounds_of(latents.shape[2], group.size, most)), 0
        while borders.next_round():
            piece = _decode_some(steps, one, borders, plan, out.shape[3:])
            for part in group.gather(piece, [(1, RGB, frames, *out.shape[3:]) for frames in borders.frames]):
                out[i : i + 1, :, done : done + part.shape[2]] = part
                done += part.shape[2]
            if on_progress:
                on_progress(i * out.shape[2] + done, len(out) * out.shape[2])
    return out


def _plan(vae: AsymmVAE, latents: Tensor, group: Group, limit: int, device: torch.device) -> tuple[Plan, int]:
    """The plan for each step, and how many latent frames fit in the limit of the member with the least memory."""
    kind = device.type if device.type in MAX_WORKING_SET else "default"
    plan = Plan(device, device, MAX_WORKING_SET[kind])
    estimate = decoder_memory_estimate(vae.config, latents.shape[3], latents.shape[4], vae.dtype.itemsize)
    frames = (limit - WORKING_SETS[kind] * plan.working_set) // estimate.frame_bytes
    of_a_latent = vae.decoded_shape((1, 1, 2, 1, 1))[2] - 1
    return plan, min(int(room) for room in group.gather(torch.tensor(frames // of_a_latent)))


def rounds_of(latents: int, members: int, most: int) -> list[list[int]]:
    """Latent frames per member in each round: at most `most`, but at least one for everyone if there are enough."""
    workers = min(members, latents)
    rounds = min(max(1, latents // workers), -(-latents // (workers * max(1, most))))
    return [[*shares(count, workers), *[0] * (members - workers)] for count in shares(latents, rounds)]


def _decode_some(steps: list[StreamStep], latents: Tensor, borders: Borders, plan: Plan, size: Sequence[int]) -> Tensor:
    """This member's part of the video in this round, (1, 3, f, 8H, 8W) with frames of `size`; f may be 0."""
    x, works = latents[:, :, borders.own], borders.own.start < borders.own.stop
    at_start = None if borders.own.start == 0 else ()
    for step in steps:
        if works:
            x, _ = step.run(x, (borders,) * step.convolutions or at_start, plan)
        else:
            for _ in range(step.convolutions):
                borders.pass_by(latents)
        borders.expansion *= step.time
    return x if works else latents.new_empty(1, RGB, 0, *size)


class Borders:
    """Exchanges frames at the borders between members, as the `Neighbour` of every convolution in a round.

    Frames are counted from the start of the clip in the current layer, where the first latent frame has become one frame and
    each of the others `expansion` frames.
    """

    def __init__(self, group: Group, rounds: list[list[int]]) -> None:
        self.group, self.rounds = group, rounds
        self.round, self.starts = -1, [0]
        self.expansion = 1
        # In the first member: the last one or two input frames of each convolution, from the previous and from this round.
        self.before: list[Tensor] = []
        self.kept: list[Tensor] = []

    def next_round(self) -> bool:
        """Go on to the next round, if there is one."""
        self.round += 1
        if self.round == len(self.rounds):
            return False
        starts = [self.starts[-1]]
        for count in self.rounds[self.round]:
            starts.append(starts[-1] + count)
        self.starts, self.expansion, self.before, self.kept = starts, 1, self.kept, []
        return True

    @property
    def own(self) -> slice:
        """This member's latent frames."""
        return slice(*self.starts[self.group.rank :][:2])

    @property
    def frames(self) -> list[int]:
        """Number of frames that each member has in this layer."""
        return [
            self._frame(stop) - self._frame(start) for start, stop in zip(self.starts, self.starts[1:], strict=False)
        ]

    def _frame(self, latent: int) -> int:
        """Index of a latent frame's first frame."""
        return latent and self.expansion * (latent - 1) + 1

    def _sent(self, source: int, target: int) -> range:
        """The frames that member `source` sends to `target`: those of the two before the target's frames that it has.

        The first member's frames in the next round follow those of the last member.
        """
        follows = target or self.group.size
        is_last = self.round == len(self.rounds) - 1
        idle = self.starts[target] == self.starts[target + 1] if target else is_last
        if idle or source >= follows:
            return range(0)
        end = self._frame(self.starts[follows])
        first = (
            self._frame(self.starts[source]) if source else 0
        )  # the first member also has frames from before the round
        return range(max(end - CONV_SIZE + 1, first), min(end, self._frame(self.starts[source + 1])))

    def __call__(self, norm: nn.GroupNorm, x: Tensor) -> Tensor | None:
        """As a `Neighbour`: sends on the last frames of `x`, and returns those that precede it."""
        tail = F.silu(frame_norm(norm, x[:, :, 1 - CONV_SIZE :]))
        if self.group.rank:
            past = self._exchange(tail)
        else:
            past = self.before[len(self.kept)] if self.round else None
            self.kept.append(self._exchange(tail if past is None else torch.cat((past, tail), dim=2)))
        if past is not None and past.shape[2] == 1:
            past = torch.cat((past, past), dim=2)  # the first frame of the clip counts twice
        return past

    def pass_by(self, like: Tensor) -> None:
        """Take part in a convolution's exchange without any frames."""
        self._exchange(like[:, :, :0])

    def _exchange(self, tail: Tensor) -> Tensor:
        """Send the frames of `tail`, which ends with this member's last one, to the members that need them; returns theirs."""
        members, rank = range(self.group.size), self.group.rank
        offset = self._frame(self.own.stop) - tail.shape[2]
        sent = [self._sent(rank, target) for target in members]
        parts = [tail[:, :, frames.start - offset :][:, :, : len(frames)] for frames in sent]
        counts = [len(self._sent(source, rank)) for source in members]
        received = self.group.exchange(parts, [(*tail.shape[:2], count, *tail.shape[3:]) for count in counts])
        return torch.cat(received, dim=2)
