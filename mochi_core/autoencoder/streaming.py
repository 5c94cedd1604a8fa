"""Run frames through a stack of steps, depth first, in a bounded working set.

A step takes as many whole frames as the working set holds, and works through larger frames in strips of rows. What it needs from
earlier frames comes in as a cache, and it returns the next one. Its output goes on to the next step before it takes more
frames, so that large activations exist for few frames at a time. Only for a step that relates all frames to each other is the
whole clip collected first.

The result does not depend on the plan, except for the order in which sums are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .plan import Plan

# PyTorch's wording on CUDA, in cuBLAS and cuDNN (which tries other engines until none is left), and on the CPU under Linux,
# macOS and Windows.
ALLOCATION_FAILED = (
    "out of memory", "alloc_failed", "unable to find an engine", "can't allocate memory", "not enough memory",
)  # fmt: skip

MAIN_MEMORY_FULL = ("can't allocate memory", "not enough memory")
"""Phrases of PyTorch's allocator for the CPU."""

Neighbour = Callable[[nn.GroupNorm, Tensor], Tensor | None]
"""(norm, x) -> the two convolution input frames that precede `x` (B, C, f, H, W), normed and activated, or None at the start of
a clip. They may be on another device; in exchange, the last frames of `x` are sent on."""
Cache = tuple[Tensor | Neighbour, ...] | None
Result = TypeVar("Result")


class OutOfMemory(RuntimeError):  # noqa: N818 - as torch's own
    """The smallest plan did not fit."""


class OomRetry:
    """Runs steps under a plan, and shrinks the plan for all later steps when one runs out of memory.

    `on_step` is called before every step with the number of frames that have reached a `ClipStep` or the end so far; raise an
    exception in it to stop.
    """

    def __init__(self, plan: Plan, on_step: Callable[[int], object] = lambda _: None) -> None:
        self.plan, self.on_step = plan, on_step
        self.finished = 0
        self.clips: list[list[Tensor]] = []
        """Pieces collected so far or still to be read; they move when the plan's cache device changes."""

    def run(self, step: Callable[..., Result], *arguments: object) -> Result | None:
        """Return `step(*arguments, plan)`, or None if it ran out of memory: the caller then retries under a smaller plan.

        Raises:
            OutOfMemory: it ran out of memory under the smallest plan.
        """
        self.on_step(self.finished)
        try:
            return step(*arguments, self.plan)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            plan = self.plan.smaller()
            if plan is None:
                raise OutOfMemory(str(error)) from error
        # The error is released by now, and with it the step's tensors.
        self.plan = plan
        for clip in self.clips:
            clip[:] = [piece.to(plan.cache_device) for piece in clip]
        return None


class StreamStep(NamedTuple):
    """A step that takes a few frames at a time: `run(x, cache, plan)` returns its output and the next cache.

    `x` (B, C, f, H, W) is on the plan's device; `cache` is None at the start of a clip. A step that ran out of memory is
    called again with the same `x` and `cache`, so it must change neither.
    """

    run: Callable[[Tensor, Cache, Plan], tuple[Tensor, Cache]]
    expansion: float = 1
    """Values in use per value of `x`, at least 1."""
    convolutions: int = 0
    """Number of causal convolutions; `run` may be given a `Neighbour` in place of the cache of each."""
    time: int = 1
    """Output frames per input frame."""


class ClipStep(NamedTuple):
    """A step that relates all frames to each other: `run(pieces, retry)` changes the pieces of the whole clip in place."""

    run: Callable[[list[Tensor], OomRetry], None]


Step = StreamStep | ClipStep


@torch.no_grad()
def stream(steps: Sequence[Step], pieces: Iterable[Tensor], retry: OomRetry) -> Iterator[Tensor]:
    """Run a clip, in `pieces` (B, C, f, H, W) on any device, through `steps` and yield pieces of the result in order.

    Raises:
        OutOfMemory: a step ran out of memory under the smallest plan.
    """
    streamed: list[StreamStep] = []
    for step in steps:
        if isinstance(step, StreamStep):
            streamed.append(step)
            continue
        gathered: list[Tensor] = []
        retry.clips.append(gathered)
        for piece in _depth_first(streamed, pieces, retry):
            gathered.append(piece.to(retry.plan.cache_device))
        step.run(gathered, retry)
        streamed, pieces = [], _taken_from(gathered)
    yield from _depth_first(streamed, pieces, retry)


def _depth_first(steps: Sequence[StreamStep], pieces: Iterable[Tensor], retry: OomRetry) -> Iterator[Tensor]:
    caches: list[Cache] = [None] * len(steps)
    for piece in pieces:
        waiting = [(0, piece)]
        while waiting:
            index, x = waiting.pop()
            if index == len(steps):
                retry.finished += x.shape[2]
                yield x
                continue
            step, count = steps[index], retry.plan.frames(x, steps[index].expansion)
            if count < x.shape[2]:
                waiting.append((index, x[:, :, count:]))
            x = x[:, :, :count]
            made = retry.run(_run, step, x, caches[index])
            if made is None:
                caches = [_moved(cache, retry.plan.cache_device) for cache in caches]
                waiting.append((index, x))
                continue
            x, caches[index] = made
            if x.shape[2]:
                waiting.append((index + 1, x))


def _run(step: StreamStep, x: Tensor, cache: Cache, plan: Plan) -> tuple[Tensor, Cache]:
    return step.run(x.to(plan.device), cache, plan)


def _taken_from(pieces: list[Tensor]) -> Iterator[Tensor]:
    """Yield each piece after removing it from the list, so that it is freed when the next is requested."""
    while pieces:
        yield pieces.pop(0)


def by_strips(strips: list[slice], compute: Callable[[slice], Tensor], scale: int = 1) -> Tensor:
    """Join the results of `compute` for each strip of rows; each has `scale` times as many rows."""
    if len(strips) == 1:
        return compute(strips[0])
    out = None
    for rows in strips:
        part = compute(rows)
        if out is None:
            out = part.new_empty(*part.shape[:3], strips[-1].stop * scale, part.shape[4])
        out[..., rows.start * scale : rows.stop * scale, :] = part
    assert out is not None
    return out


def strip_step(compute: Callable[[Tensor], Tensor], expansion: float = 1) -> StreamStep:
    """A step without a cache whose `compute` takes rows of frames, (B, C, f, r, W), independent of their neighbours."""

    def run(x: Tensor, _: Cache, plan: Plan) -> tuple[Tensor, Cache]:
        return by_strips(plan.strips(x, expansion), lambda rows: compute(x[..., rows, :])), ()

    return StreamStep(run, expansion)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device: only CUDA has an exception class of its own."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in said for phrase in ALLOCATION_FAILED)
    )


def memory_problem(error: BaseException) -> str:
    """One or two sentences for an error that `is_out_of_memory`: which memory is full."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return said.split(" GPU ")[0]  # what follows is about PyTorch's settings
    in_main_memory = isinstance(error, MemoryError) or any(phrase in said.lower() for phrase in MAIN_MEMORY_FULL)
    return "Main memory is full." if in_main_memory else "The device is out of memory."


def empty_cache(x: Tensor, frames: int, device: torch.device) -> Tensor:
    """An uninitialised cache on `device` for `frames` frames like those of `x` (B, C, T, H, W).

    For a GPU's cache in main memory, a strip of rows is contiguous in pinned memory: only then are copies asynchronous.
    """
    batch, channels, _, height, width = x.shape
    if device == x.device:
        return x.new_empty(batch, channels, frames, height, width)
    shape, dtype = (height, batch, channels, frames, width), x.dtype
    try:
        rows = torch.empty(shape, dtype=dtype, device=device, pin_memory=x.is_cuda)
    except RuntimeError:  # systems limit pinned memory
        rows = torch.empty(shape, dtype=dtype, device=device)
    return rows.permute(1, 2, 3, 0, 4)


def store(frames: Tensor, cache: Tensor) -> None:
    """Copy frames, or some of their rows, into an `empty_cache`; it may next be read only by a copy queued on the device."""
    if cache.device != frames.device and cache.stride() != frames.stride():
        frames = torch.empty_like(cache, device=frames.device).copy_(frames)  # rows outermost, as in the cache
    cache.copy_(
        frames, non_blocking=frames.is_cuda
    )  # only CUDA has pinned memory: elsewhere `frames` may change mid-copy


def release_pinned_memory() -> None:
    """Release the pinned memory that PyTorch caches for reuse; before 2.10 that is not possible."""
    release = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    if release is not None:
        release()


def _moved(cache: Cache, device: torch.device) -> Cache:
    return cache and tuple(past.to(device) if isinstance(past, Tensor) else past for past in cache)
