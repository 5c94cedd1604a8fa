"""Offloading: weights are kept in main memory, and are on the device for a whole run or block by block.

It works by swapping `param.data`: a device copy is assigned for the duration, then the CPU tensor, which is never written, is
restored. All weights are handled alike, including quantised ones and LoRAs. A tensor that is assigned from outside in the
meantime, as when a LoRA's strength changes, is used from then on and kept; a LoRA loaded in the meantime moves with its layer.

mod_x and mod_y, 27 % of the weights, are called only when a run prepares its conditioning. Both offloading modes have each of
them on the device only for that call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..mapped_files import check_mapped_files, named_tensors
from .model import AsymmDiT


@contextmanager
def offload_modulation(dit: AsymmDiT, device: torch.device | str) -> Iterator[None]:
    """Keep all of `dit` except mod_x and mod_y on `device` for the duration, then restore it."""
    check_mapped_files(dit)
    modulators = modulators_of(dit)
    with on_device(without(modulators, dit), device), on_device_when_called(modulators, device):
        yield


@contextmanager
def stream_blocks(dit: AsymmDiT, device: torch.device | str) -> Iterator[None]:
    """Run `dit` on `device` with at most two of its blocks there: one in use, the next being copied.

    Everything outside the blocks, 1 % of the weights, is on the device for the duration. Afterwards everything is restored,
    except that with CUDA the blocks are in pinned memory.
    """
    check_mapped_files(dit)
    blocks, modulators = dit.joint_blocks(), modulators_of(dit)
    stream = BlockStream([without(modulators, block) for block in blocks], torch.device(device))
    rest = Weights(lambda: [tensor for name, tensor in named_tensors(dit) if not name.startswith("blocks.")])
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

    def __init__(self, find: Callable[[], Iterable[Tensor]]) -> None:
        """`find` returns the parameters and buffers; it is called before each swap, as LoRAs come and go."""
        self.find = find
        self.originals = {tensor: tensor.data for tensor in find()}
        # What was last assigned to them here, kept alive so that no other tensor can have the same address.
        self.assigned = dict(self.originals)

    def pin(self) -> None:
        """Move the originals, tensor by tensor, to pinned memory, which a device can read directly."""
        for tensor, original in self.originals.items():
            tensor.data = self.originals[tensor] = self.assigned[tensor] = original.pin_memory()

    def copies(self, device: torch.device | str) -> dict[Tensor, Tensor]:
        """Copies of the originals on `device`; from pinned memory, they may still be in flight."""
        self._keep_changes()
        pinned = torch.device(device).type == "cuda"  # elsewhere a copy must be complete when it is returned
        return {t: data.to(device, non_blocking=pinned, copy=True) for t, data in self.originals.items()}

    def assign(self, copies: dict[Tensor, Tensor], device: torch.device | str) -> None:
        """Make the parameters and buffers use `copies`, from the method `copies`; those new or changed since are copied now."""
        for tensor in self._keep_changes():
            copies[tensor] = self.originals[tensor].to(device)
        self._swap(copies)

    def restore(self) -> None:
        """Make the parameters and buffers use the originals again."""
        self._keep_changes()
        self._swap(self.originals)

    def _swap(self, tensors: dict[Tensor, Tensor]) -> None:
        for tensor in self.originals:
            tensor.data = self.assigned[tensor] = tensors[tensor]

    def _keep_changes(self) -> list[Tensor]:
        """Adopt tensors added or assigned from outside since the last call as originals and return them; forget removed ones."""
        found = list(self.find())
        home = next((data.device for data in self.originals.values()), torch.device("cpu"))
        changed = [t for t in found if t not in self.assigned or t.data_ptr() != self.assigned[t].data_ptr()]
        self.originals = {t: self.originals.get(t, t.data) for t in found}
        self.assigned = {t: self.assigned.get(t, t.data) for t in found}
        for tensor in changed:
            self.originals[tensor], self.assigned[tensor] = tensor.data.to(home), tensor.data
        return changed


@contextmanager
def on_device(weights: Weights, device: torch.device | str) -> Iterator[None]:
    """Keep `weights` on `device` for the duration."""
    try:
        weights.assign(weights.copies(device), device)
        yield
    finally:
        weights.restore()


@contextmanager
def on_device_when_called(layers: dict[nn.Module, Weights], device: torch.device | str) -> Iterator[None]:
    """Keep the weights of each layer on `device` only during its forward, for as long as the context lasts."""
    hooks = []
    for layer, weights in layers.items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, w=weights: w.assign(w.copies(device), device)))
        hooks.append(layer.register_forward_hook(lambda *_, w=weights: w.restore()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weights in layers.values():
            weights.restore()


class BlockStream:
    """Copies blocks to the device in order, each while the previous one is running."""

    def __init__(self, blocks: list[Weights], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.current: int | None = None
        self.prefetched: tuple[int, dict[Tensor, Tensor]] | None = None
        self.copy_stream = None
        if device.type == "cuda":
            self.copy_stream = torch.cuda.Stream(device)
            for block in blocks:
                block.pin()

    def start(self, index: int) -> None:
        """Put a block on the device, and start copying the next one; after the last comes the first."""
        if index == self.current:
            return
        self._end()
        if self.prefetched is None or self.prefetched[0] != index:
            self._prefetch(index)
        self.blocks[index].assign(self._take_prefetched(), self.device)
        self.current = index
        self._prefetch((index + 1) % len(self.blocks))

    def stop(self) -> None:
        """Restore all blocks, once the device has finished all queued work that uses the copies."""
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
        """Start copying a block, once the device is done with the block before, whose memory the copies reuse."""
        self.prefetched = None
        if self.copy_stream is not None:
            self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.copy_stream is None else torch.cuda.stream(self.copy_stream):
            self.prefetched = index, self.blocks[index].copies(self.device)

    def _take_prefetched(self) -> dict[Tensor, Tensor]:
        assert self.prefetched is not None
        if self.copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copy_stream)
        (_, copies), self.prefetched = self.prefetched, None
        return copies


def modulators_of(dit: AsymmDiT) -> dict[nn.Module, Weights]:
    """mod_x and mod_y of every block, with their weights."""
    layers = [layer for block in dit.joint_blocks() for layer in (block.mod_x, block.mod_y)]
    return {layer: Weights(lambda layer=layer: [tensor for _, tensor in named_tensors(layer)]) for layer in layers}


def without(modulators: dict[nn.Module, Weights], module: nn.Module) -> Weights:
    """The weights of `module` without those of the modulators."""

    inside = [layer for layer in module.modules() if layer in modulators]

    def find() -> list[Tensor]:
        excluded = {tensor for layer in inside for _, tensor in named_tensors(layer)}
        return [tensor for _, tensor in named_tensors(module) if tensor not in excluded]

    return Weights(find)
