"""Members that work on a video together and exchange tensors: `torch.distributed` processes, or threads of one process."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Shape = Sequence[int]
Wait = Callable[[], list[Tensor]]
"""Waits for an exchange in progress, and returns the tensors that the members sent."""
Result = TypeVar("Result")
Start = Callable[[int, Callable[[], None]], Callable[[], object]]
"""(rank, that member's work) -> a function that waits for the work, which was started elsewhere, to finish."""
MEETING_TIMEOUT = 600.0
"""Seconds that a thread waits for the others; the same as for processes, see `launch`."""


class Group(ABC):
    """A group of `size` members, from the point of view of the member `rank`, counted from 0."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent = 0
        """Bytes that this member has sent to the others so far."""

    def start(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait:
        """Start sending parts[p] to each member p, and receiving a tensor of shape shapes[p] and the same dtype from it.

        All members call this in the same order. The parts may be views, and may be overwritten once the wait is over.
        """
        others = (part for p, part in enumerate(parts) if p != self.rank)
        self.sent += sum(part.numel() * part.element_size() for part in others)
        return self._start(parts, shapes)

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Exchange tensors as in `start`, and return what every member sent."""
        return self.start(parts, shapes)()

    @abstractmethod
    def _start(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait: ...

    def gather(self, tensor: Tensor, shapes: Sequence[Shape] | None = None) -> list[Tensor]:
        """The tensors of all members by rank; pass `shapes` if they differ in shape."""
        return self.exchange([tensor] * self.size, shapes or [tensor.shape] * self.size)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of all members' tensors, of equal shape, added in order of rank: every member gets the same bits."""
        first, *others = self.gather(tensor)
        for other in others:
            first = first + other
        return first

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of member `source`; the other members pass one of the same shape and dtype."""
        own, nothing = self.rank == source, tensor.flatten()[:0]
        shapes = [tensor.shape if p == source else (0,) for p in range(self.size)]
        return self.exchange([tensor if own else nothing] * self.size, shapes)[source]

    @abstractmethod
    def grid(self, *sizes: int) -> tuple[Group, ...]:
        """Arrange the members in a grid, last axis fastest; for each axis, return the group along it that contains this member.

        All members call this; the product of the sizes must be the size of the group.
        """


class Alone(Group):
    """A group of one member."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _start(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait:
        received = [part.reshape(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
        return lambda: received

    def grid(self, *sizes: int) -> tuple[Group, ...]:
        return (self,) * len(sizes)


class Processes(Group):
    """The processes of a `torch.distributed` group, by default all."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        super().__init__(dist.get_rank(group), dist.get_world_size(group))

    def _start(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait:
        sizes = [prod(shape) for shape in shapes]
        packed = torch.cat([part.reshape(-1) for part in parts])
        received = packed.new_empty(sum(sizes))
        splits = [part.numel() for part in parts]
        work = dist.all_to_all_single(received, packed, sizes, splits, group=self.group, async_op=True)

        def wait() -> list[Tensor]:
            nonlocal packed
            if work is not None:
                work.wait()
            del packed
            return [part.view(tuple(shape)) for part, shape in zip(received.split(sizes), shapes, strict=True)]

        return wait

    def grid(self, *sizes: int) -> tuple[Group, ...]:
        """See `Group`; only for the group of all processes, because every process must take part in creating every group."""
        return tuple(self._axis(lines) for lines in _lines(sizes))

    def _axis(self, lines: list[list[int]]) -> Group:
        if len(lines) == 1:
            return self
        if len(lines[0]) == 1:
            return Alone()
        groups = [dist.new_group(line) for line in lines]
        (own,) = (group for group, line in zip(groups, lines, strict=True) if self.rank in line)
        return Processes(cast(dist.ProcessGroup, own))


def _lines(sizes: Sequence[int]) -> list[list[list[int]]]:
    """For each axis of a grid, the members of every line along it."""
    ranks = torch.arange(prod(sizes)).view(tuple(sizes))
    return [ranks.movedim(axis, -1).reshape(-1, size).tolist() for axis, size in enumerate(sizes)]


class Stopped(RuntimeError):  # noqa: N818 - not an error of this member
    """Another member has failed or was cancelled, so this one ends, too."""


class Threads:
    """Threads of one process as members, each with its own device.

    When one of them fails, is cancelled or ends early, all others raise `Stopped` when they wait for it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.error: BaseException | None = None
        """The exception of the first member that failed; `Stopped` if it waited in vain."""
        self._ended: set[int] = set()
        self._changed = threading.Condition()
        """Held while reading or writing the state that members wait on, and notified when it changes."""
        self._meetings: dict[tuple[int, ...], _Meeting] = {}

    def run(self, work: Callable[[Group], Result], start: Start | None = None) -> list[Result]:
        """Run `work` for each member, the first in this thread and the others in their own; returns the results by rank.

        `start` starts the work of another member, by default in a new thread, or raises if it cannot.

        Raises:
            The first error of any member.
        """
        results: dict[int, Result] = {}

        def run_member(rank: int) -> None:
            try:
                results[rank] = work(_Thread(self, tuple(range(self.size)), rank))
            except BaseException as error:
                self.stop(error)
            with self._changed:
                self._ended.add(rank)
                self._changed.notify_all()

        begin, waits = start or _start_thread, []
        try:
            for rank in range(1, self.size):
                waits.append(begin(rank, partial(run_member, rank)))
            run_member(0)
        except BaseException as error:  # a member could not be started
            self.stop(error)
        finally:
            for wait in waits:
                wait()
        if self.error is not None:
            raise self.error
        return [results[rank] for rank in range(self.size)]

    def stop(self, error: BaseException) -> None:
        """End all members because one of them raised `error`."""
        with self._changed:
            if self.error is None:
                self.error = error
            self._changed.notify_all()

    def meeting(self, ranks: tuple[int, ...]) -> _Meeting:
        """The meeting at which these members exchange tensors."""
        with self._changed:
            return self._meetings.setdefault(ranks, _Meeting(len(ranks)))

    def meet(self, ranks: tuple[int, ...]) -> None:
        """Wait until all these members have reached this point of their meeting.

        Raises:
            Stopped: one of them has ended or does not arrive in time, or any member has failed.
        """
        meeting = self.meeting(ranks)
        with self._changed:
            meeting.came += 1
            all_came = -(-meeting.came // len(ranks)) * len(ranks)

            def over() -> bool:
                return self.error is not None or meeting.came >= all_came or not self._ended.isdisjoint(ranks)

            self._changed.notify_all()
            self._changed.wait_for(over, MEETING_TIMEOUT)
            if self.error is not None:
                raise Stopped(f"Another member failed: {self.error}") from self.error
            if meeting.came < all_came:
                raise Stopped(f"Another member {'has already ended' if over() else 'did not arrive in time'}.")


def _start_thread(rank: int, work: Callable[[], None]) -> Callable[[], object]:
    thread = threading.Thread(target=work, name=f"member {rank}", daemon=True)
    thread.start()
    return thread.join


class _Meeting:
    """Where threads deposit what they send, between two waits for each other."""

    def __init__(self, size: int) -> None:
        self.came = 0
        """Number of arrivals so far, of all members together."""
        self.parts: list[Sequence[Tensor]] = [()] * size
        self.made: list[torch.cuda.Event | None] = [None] * size
        self.copied: list[torch.cuda.Event | None] = [None] * size


class _Thread(Group):
    """A group of members of `Threads`, from the point of view of one of them."""

    def __init__(self, threads: Threads, ranks: tuple[int, ...], rank: int) -> None:
        super().__init__(rank, len(ranks))
        self.threads, self.ranks, self.meeting = threads, ranks, threads.meeting(ranks)

    def _start(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait:
        meeting, device = self.meeting, parts[0].device
        meeting.parts[self.rank], meeting.made[self.rank] = parts, _reached(device)
        self.threads.meet(self.ranks)
        _await_events(meeting.made, device)
        received = [
            meeting.parts[p][self.rank].to(device, copy=True).reshape(tuple(shape)) for p, shape in enumerate(shapes)
        ]
        meeting.copied[self.rank] = _reached(device)
        self.threads.meet(self.ranks)
        # This member's parts may not be overwritten until the others' devices have finished copying them.
        _await_events(meeting.copied, device)
        meeting.parts[self.rank] = ()  # no longer needed, and would hold memory until the next exchange
        return lambda: received

    def grid(self, *sizes: int) -> tuple[Group, ...]:
        axes = []
        for lines in _lines(sizes):
            (line,) = (line for line in lines if self.rank in line)
            ranks = tuple(self.ranks[i] for i in line)
            axes.append(_Thread(self.threads, ranks, line.index(self.rank)) if len(line) > 1 else Alone())
        return tuple(axes)


def _reached(device: torch.device) -> torch.cuda.Event | None:
    """An event that marks the end of the work queued on the device; None for devices without a queue."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event


def _await_events(events: Sequence[torch.cuda.Event | None], device: torch.device) -> None:
    """Make the current stream of `device` wait for the events."""
    for event in events:
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)
