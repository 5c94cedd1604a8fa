"""Weights that stay in main memory and visit the device: for a whole run, or block by block.

A visit is a copy that a parameter or buffer points to for a while; the tensor in main memory is never written, so going home
is forgetting the copy. What sits beside a layer, as LoRAs do, and weights of any kind travel alike.

mod_x and mod_y, 27 % of the weights, are called only when a run prepares its conditioning. Either way they visit the device for
that alone, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from .model import AsymmDiT


@contextmanager
def resident(dit: AsymmDiT, device: torch.device | str) -> Iterator[None]:
    """Have all of `dit` but its modulators on `device`. Afterwards all is as it was."""
    modulators = modulators_of(dit)
    with visiting(beside(modulators, dit), device), visiting_when_called(modulators, device):
        yield


@contextmanager
def streamed(dit: AsymmDiT, device: torch.device | str) -> Iterator[None]:
    """Have `dit` compute on `device` with at most two of its blocks there: one at work, the next on its way.

    Everything outside the blocks, 1 % of the weights, is there for the duration. Afterwards all is as it was; only that with
    CUDA, the blocks now are in pinned memory.
    """
    blocks, modulators = dit.joint_blocks(), modulators_of(dit)
    stream = BlockStream([beside(modulators, block) for block in blocks], torch.device(device))
    rest = Weights(tensor for name, tensor in named_tensors(dit) if not name.startswith("blocks."))
    hooks = [block.register_forward_pre_hook(lambda *_, i=i: stream.start(i)) for i, block in enumerate(blocks)]
    try:
        with visiting(rest, device), visiting_when_called(modulators, device):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        stream.stop()


class Weights:
    """Parameters and buffers that travel together."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.home = [tensor.data for tensor in self.tensors]

    def pin(self) -> None:
        """Into memory that the device can read by itself, tensor by tensor."""
        for i, tensor in enumerate(self.tensors):
            tensor.data = self.home[i] = self.home[i].pin_memory()

    def copies(self, device: torch.device | str) -> list[Tensor]:
        return [data.to(device, non_blocking=True, copy=True) for data in self.home]

    def visit(self, copies: list[Tensor]) -> None:
        for tensor, copy in zip(self.tensors, copies, strict=True):
            tensor.data = copy

    def go_home(self) -> None:
        self.visit(self.home)


@contextmanager
def visiting(weights: Weights, device: torch.device | str) -> Iterator[None]:
    try:
        weights.visit(weights.copies(device))
        yield
    finally:
        weights.go_home()


@contextmanager
def visiting_when_called(layers: dict[nn.Module, Weights], device: torch.device | str) -> Iterator[None]:
    hooks = []
    for layer, weights in layers.items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, w=weights: w.visit(w.copies(device))))
        hooks.append(layer.register_forward_hook(lambda *_, w=weights: w.go_home()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weights in layers.values():
            weights.go_home()


class BlockStream:
    """Brings blocks to the device in turn, each while the one before it is at work."""

    def __init__(self, blocks: list[Weights], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.at_work: int | None = None
        self.fetched: tuple[int, list[Tensor]] | None = None
        self.side = None
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)
            for block in blocks:
                block.pin()

    def start(self, index: int) -> None:
        """Have a block on the device, and the one after it on its way; the first is after the last."""
        if index == self.at_work:
            return
        self._end()
        if self.fetched is None or self.fetched[0] != index:
            self._fetch(index)
        self.blocks[index].visit(self._arrived())
        self.at_work = index
        self._fetch((index + 1) % len(self.blocks))

    def stop(self) -> None:
        """All home, once the device has done all that it was told to do with the copies."""
        try:
            if self.side is not None:
                torch.cuda.synchronize(self.device)
        finally:
            self._end()
            self.fetched = None

    def _end(self) -> None:
        if self.at_work is not None:
            self.blocks[self.at_work].go_home()
            self.at_work = None

    def _fetch(self, index: int) -> None:
        """Copies take the memory of the block that was at work before: they begin when the device is done with it."""
        self.fetched = None
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.side is None else torch.cuda.stream(self.side):
            self.fetched = index, self.blocks[index].copies(self.device)

    def _arrived(self) -> list[Tensor]:
        assert self.fetched is not None
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        (_, copies), self.fetched = self.fetched, None
        return copies


def modulators_of(dit: AsymmDiT) -> dict[nn.Module, Weights]:
    layers = [layer for block in dit.joint_blocks() for layer in (block.mod_x, block.mod_y)]
    return {layer: Weights(tensor for _, tensor in named_tensors(layer)) for layer in layers}


def beside(modulators: dict[nn.Module, Weights], module: nn.Module) -> Weights:
    """What a module holds that belongs to none of the modulators."""
    away = {id(tensor) for weights in modulators.values() for tensor in weights.tensors}
    return Weights(tensor for _, tensor in named_tensors(module) if id(tensor) not in away)


def named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
