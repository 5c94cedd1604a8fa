"""Members that work on one video together and exchange tensors: processes of `torch.distributed`, or threads of one process."""

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
"""Waits until an exchange that was started is done, and gives what the other members sent."""
Result = TypeVar("Result")
Start = Callable[[int, Callable[[], None]], Callable[[], object]]
"""(rank, work of that member) -> a function that waits until the work, which has begun elsewhere, is done."""
MEETING_TIMEOUT = 600.0
"""Seconds that a thread waits for the others: as long as processes do, see `launch`."""


class Group(ABC):
    """Some members, seen by one of them: the one called `rank`, from 0, of `size`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent = 0
        """Bytes that this member has sent to the others so far."""

    def start(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait:
        """Begin to send parts[p] to member p, while member p sends a tensor of shapes[p], of the same dtype, to this one.

        All members call it, in the same order. The parts may be views, and be overwritten once the returned function is done.
        """
        others = (part for p, part in enumerate(parts) if p != self.rank)
        self.sent += sum(part.numel() * part.element_size() for part in others)
        return self._start(parts, shapes)

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """What the other members sent, see `start`."""
        return self.start(parts, shapes)()

    @abstractmethod
    def _start(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait: ...

    def gather(self, tensor: Tensor, shapes: Sequence[Shape] | None = None) -> list[Tensor]:
        """The tensors of all members by rank; `shapes` if they differ in shape."""
        return self.exchange([tensor] * self.size, shapes or [tensor.shape] * self.size)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of the tensors of all members, of one shape each, added by rank: every member gets the same bits."""
        first, *others = self.gather(tensor)
        for other in others:
            first = first + other
        return first

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of member `source`; the other members give one of the same shape and dtype."""
        own, nothing = self.rank == source, tensor.flatten()[:0]
        shapes = [tensor.shape if p == source else (0,) for p in range(self.size)]
        return self.exchange([tensor if own else nothing] * self.size, shapes)[source]

    @abstractmethod
    def grid(self, *sizes: int) -> tuple[Group, ...]:
        """Members in a grid, the last axis the fastest: for each axis, the group of those that differ from this one in it alone.

        All members call it, and the product of the sizes is that of the group.
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
    """The processes of a group of `torch.distributed`, by default of all."""

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
        """As for `Group`; of the group of all processes alone, because each of them takes part in making every group."""
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


class Stopped(RuntimeError):  # noqa: N818 - nothing is wrong with this member
    """Another member has failed or was cancelled, and this one ends with it."""


class Threads:
    """Threads of one process as members, with a device each.

    When one of them fails, is cancelled or ends early, all others that wait for it, or will, raise `Stopped`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.error: BaseException | None = None
        """What the first member that failed has raised; `Stopped` if it waited in vain."""
        self._ended: set[int] = set()
        self._changed = threading.Condition()
        """Held to read or write what members wait for, and notified when it has changed."""
        self._meetings: dict[tuple[int, ...], _Meeting] = {}

    def run(self, work: Callable[[Group], Result], start: Start | None = None) -> list[Result]:
        """What `work` returns for each member, in threads of their own, the first in this one; by rank.

        `start` begins the work of another member, by default in a new thread, or raises why it cannot.

        Raises:
            The first error of a member.
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
        except BaseException as error:  # a member has no thread to work in
            self.stop(error)
        finally:
            for wait in waits:
                wait()
        if self.error is not None:
            raise self.error
        return [results[rank] for rank in range(self.size)]

    def stop(self, error: BaseException) -> None:
        """End all members because of `error`, which one of them has raised."""
        with self._changed:
            if self.error is None:
                self.error = error
            self._changed.notify_all()

    def meeting(self, ranks: tuple[int, ...]) -> _Meeting:
        """Where these members exchange tensors."""
        with self._changed:
            return self._meetings.setdefault(ranks, _Meeting(len(ranks)))

    def meet(self, ranks: tuple[int, ...]) -> None:
        """Wait until all these members are at this point of their meeting.

        Raises:
            Stopped: they will not be, or one has failed that may not be among them.
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
                raise Stopped(f"Another member {'has ended already' if over() else 'did not come'}.")


def _start_thread(rank: int, work: Callable[[], None]) -> Callable[[], object]:
    thread = threading.Thread(target=work, name=f"member {rank}", daemon=True)
    thread.start()
    return thread.join


class _Meeting:
    """Where threads lay out what they send, between two waits for each other."""

    def __init__(self, size: int) -> None:
        self.came = 0
        """How often a member has come, all of them together."""
        self.parts: list[Sequence[Tensor]] = [()] * size
        self.made: list[torch.cuda.Event | None] = [None] * size
        self.copied: list[torch.cuda.Event | None] = [None] * size


class _Thread(Group):
    """Some of the members of `Threads`, seen by one of them."""

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
        # Others have read what this member sent when their devices come that far; until then it may not be overwritten.
        _await_events(meeting.copied, device)
        meeting.parts[self.rank] = ()  # nobody reads them again, and they would keep memory until the next exchange
        return lambda: received

    def grid(self, *sizes: int) -> tuple[Group, ...]:
        axes = []
        for lines in _lines(sizes):
            (line,) = (line for line in lines if self.rank in line)
            ranks = tuple(self.ranks[i] for i in line)
            axes.append(_Thread(self.threads, ranks, line.index(self.rank)) if len(line) > 1 else Alone())
        return tuple(axes)


def _reached(device: torch.device) -> torch.cuda.Event | None:
    """An event at what is queued on the device now; None where nothing is queued."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event


def _await_events(events: Sequence[torch.cuda.Event | None], device: torch.device) -> None:
    """Have the current stream of `device` wait for the events."""
    for event in events:
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)
