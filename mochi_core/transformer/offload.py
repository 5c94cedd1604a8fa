"""Offloading: the weights stay in main memory and are on the device for a whole run, or block by block.

It works by swapping `param.data`: a device copy is assigned for the duration, then the CPU tensor is put back; that one is
never written. Weights of any kind, quantised ones and LoRAs beside a layer too, are handled alike. A tensor that somebody else
assigns in the meantime, as a LoRA does whose strength is changed, is used from then on and stays.

mod_x and mod_y, 27 % of the weights, are called only when a run prepares its conditioning. Both ways of offloading have each
of them on the device for that call alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from ..mapped_files import check_mapped_files
from .model import AsymmDiT


@contextmanager
def offload_modulation(dit: AsymmDiT, device: torch.device | str) -> Iterator[None]:
    """Have all of `dit` but mod_x and mod_y on `device` for the duration, and then all as it was."""
    check_mapped_files(dit)
    modulators = modulators_of(dit)
    with on_device(without(modulators, dit), device), on_device_when_called(modulators, device):
        yield


@contextmanager
def stream_blocks(dit: AsymmDiT, device: torch.device | str) -> Iterator[None]:
    """Have `dit` compute on `device` with at most two of its blocks there: one at work, the next being copied.

    Everything outside the blocks, 1 % of the weights, is there for the duration. Afterwards all is as it was, except that with
    CUDA the blocks are in pinned memory.
    """
    check_mapped_files(dit)
    blocks, modulators = dit.joint_blocks(), modulators_of(dit)
    stream = BlockStream([without(modulators, block) for block in blocks], torch.device(device))
    rest = Weights(tensor for name, tensor in named_tensors(dit) if not name.startswith("blocks."))
    hooks = [block.register_forward_pre_hook(lambda *_, i=i: stream.start(i)) for i, block in enumerate(blocks)]
    try:
        with on_device(rest, device), on_device_when_called(modulators, device):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        stream.stop()


class Weights:
    """Parameters and buffers that are swapped together between main memory and a device."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.originals = [tensor.data for tensor in self.tensors]
        # What they were last given here. Held, so that no other tensor can have the same address.
        self.assigned = list(self.originals)

    def pin(self) -> None:
        """Move the originals, tensor by tensor, into pinned memory, which a device can read by itself."""
        for i, tensor in enumerate(self.tensors):
            tensor.data = self.originals[i] = self.assigned[i] = self.originals[i].pin_memory()

    def copies(self, device: torch.device | str) -> list[Tensor]:
        """Copies of the originals on `device`; from pinned memory, they may still be on their way."""
        self._keep_changes()
        pinned = torch.device(device).type == "cuda"  # elsewhere a copy has to be complete when it is given out
        return [data.to(device, non_blocking=pinned, copy=True) for data in self.originals]

    def assign(self, copies: list[Tensor]) -> None:
        """Have the parameters and buffers use `copies`, made by `copies`; what has changed since is copied again."""
        changed = self._keep_changes()
        self._swap([self.originals[i].to(c.device) if i in changed else c for i, c in enumerate(copies)])

    def restore(self) -> None:
        """Have the parameters and buffers use the originals again."""
        self._keep_changes()
        self._swap(self.originals)

    def _swap(self, tensors: list[Tensor]) -> None:
        for i, (tensor, data) in enumerate(zip(self.tensors, tensors, strict=True)):
            tensor.data = self.assigned[i] = data

    def _keep_changes(self) -> set[int]:
        """Make what others have assigned since the last call the originals; returns which."""
        changed = set()
        for i, tensor in enumerate(self.tensors):
            if tensor.data_ptr() != self.assigned[i].data_ptr():
                self.originals[i] = tensor.data.to(self.originals[i].device)
                self.assigned[i] = tensor.data
                changed.add(i)
        return changed


@contextmanager
def on_device(weights: Weights, device: torch.device | str) -> Iterator[None]:
    """Have `weights` on `device` for the duration."""
    try:
        weights.assign(weights.copies(device))
        yield
    finally:
        weights.restore()


@contextmanager
def on_device_when_called(layers: dict[nn.Module, Weights], device: torch.device | str) -> Iterator[None]:
    """Have the weights of each layer on `device` during its forward, for as long as the context lasts."""
    hooks = []
    for layer, weights in layers.items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, w=weights: w.assign(w.copies(device))))
        hooks.append(layer.register_forward_hook(lambda *_, w=weights: w.restore()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weights in layers.values():
            weights.restore()


class BlockStream:
    """Copies blocks to the device in order, each while the one before it is at work."""

    def __init__(self, blocks: list[Weights], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.current: int | None = None
        self.prefetched: tuple[int, list[Tensor]] | None = None
        self.copy_stream = None
        if device.type == "cuda":
            self.copy_stream = torch.cuda.Stream(device)
            for block in blocks:
                block.pin()

    def start(self, index: int) -> None:
        """Have a block on the device, and begin to copy the one after it; after the last comes the first."""
        if index == self.current:
            return
        self._end()
        if self.prefetched is None or self.prefetched[0] != index:
            self._prefetch(index)
        self.blocks[index].assign(self._take_prefetched())
        self.current = index
        self._prefetch((index + 1) % len(self.blocks))

    def stop(self) -> None:
        """Put all blocks back, once the device has finished all work that was queued with the copies."""
        try:
            if self.copy_stream is not None:
                torch.cuda.synchronize(self.device)
        finally:
            self._end()
            self.prefetched = None

    def _end(self) -> None:
        if self.current is not None:
            self.blocks[self.current].restore()
            self.current = None

    def _prefetch(self, index: int) -> None:
        """Begin to copy a block, when the device is done with the block before, whose memory the copies take."""
        self.prefetched = None
        if self.copy_stream is not None:
            self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.copy_stream is None else torch.cuda.stream(self.copy_stream):
            self.prefetched = index, self.blocks[index].copies(self.device)

    def _take_prefetched(self) -> list[Tensor]:
        assert self.prefetched is not None
        if self.copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copy_stream)
        (_, copies), self.prefetched = self.prefetched, None
        return copies


def modulators_of(dit: AsymmDiT) -> dict[nn.Module, Weights]:
    """mod_x and mod_y of every block, with their weights."""
    layers = [layer for block in dit.joint_blocks() for layer in (block.mod_x, block.mod_y)]
    return {layer: Weights(tensor for _, tensor in named_tensors(layer)) for layer in layers}


def without(modulators: dict[nn.Module, Weights], module: nn.Module) -> Weights:
    """The weights of `module` without those that belong to one of the modulators."""
    excluded = {id(tensor) for weights in modulators.values() for tensor in weights.tensors}
    return Weights(tensor for _, tensor in named_tensors(module) if id(tensor) not in excluded)


def named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """All parameters and buffers by name."""
    return chain(module.named_parameters(), module.named_buffers())
