"""How much a step of the autoencoder processes at a time, where its caches are kept, and what fits in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

MIB, GIB = 2**20, 2**30
# A larger working set is no faster: weight reads are already amortised over this much work, and processor caches are small.
MAX_WORKING_SET = {"cpu": 32 * MIB, "default": 256 * MIB}
# A smaller working set costs speed, so moving the caches off the device is the better way to save memory.
MOVE_CACHES_BELOW = 8 * MIB
# Smaller still costs a lot of time and saves next to nothing: only for when memory has really run out.
SMALLEST_FIRST_CHOICE = MIB
# Working sets in memory at once: a padded strip is three frames if it yields one, and a convolution may copy its input and
# output. Measured on the CPU; on a GPU counted, then doubled for cuDNN's workspace.
WORKING_SETS = {"cpu": 16, "default": 6}

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """How many bytes a step on `device` takes at once, and where caches are kept."""

    device: torch.device
    cache_device: torch.device
    working_set: int
    """Bytes of input, times its expansion, that a step takes at once; its peak is up to `WORKING_SETS` times as many."""

    def items(self, one: Tensor, expansion: float = 1) -> int:
        """How many tensors like `one` to take at once; `expansion`, at least 1, is values in use per input value."""
        return max(1, int(self.working_set // (one.numel() * one.element_size() * expansion)))

    def frames(self, x: Tensor, expansion: float = 1) -> int:
        """How many frames of x (B, C, T, H, W) to take at once."""
        return self.items(x[:, :, :1], expansion)

    def rows(self, x: Tensor, expansion: float = 1) -> int:
        """How many rows of x (B, C, T, H, W) to take at once."""
        return self.items(x[:, :, :, :1], expansion)

    def strips(self, x: Tensor, expansion: float = 1) -> list[slice]:
        """The rows of x (B, C, T, H, W) in strips of nearly equal height."""
        height = x.shape[3]
        rows = -(-height // -(-height // self.rows(x, expansion)))
        return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]

    def smaller(self) -> Plan | None:
        """A plan with half the working set or, when that is small already, caches in main memory; None if nothing is left."""
        if self.working_set <= MOVE_CACHES_BELOW and self.cache_device != CPU:
            return replace(self, cache_device=CPU)
        # A working set of one byte means strips of one row.
        return replace(self, working_set=self.working_set // 2) if self.working_set > 1 else None


class MemoryEstimate(NamedTuple):
    """Bytes that a stack of steps holds under every plan; a plan's working sets are added to it."""

    cache_bytes: int
    """Bytes of frames that steps cache, and of a collected clip; they may be kept in main memory."""
    frame_bytes: int
    """Bytes of the whole frames that a step works on, and of those that wait between steps."""

    def choose_plan(self, limit: int, device: torch.device) -> Plan:
        """The fastest plan that stays within `limit` bytes on `device`.

        If none does, the smallest worth starting with; whole frames and caches may then exceed the limit by any amount.
        """
        most, sets = _of(MAX_WORKING_SET, device), _of(WORKING_SETS, device)
        working_set = (limit - self.frame_bytes - self.cache_bytes) // sets
        if working_set >= MOVE_CACHES_BELOW:
            return Plan(device, device, min(working_set, most))
        working_set = (limit - self.frame_bytes - (self.cache_bytes if device == CPU else 0)) // sets
        return Plan(device, CPU, min(max(working_set, SMALLEST_FIRST_CHOICE), most))

    def peak_bytes(self, plan: Plan) -> int:
        """Peak bytes on the plan's device, excluding weights and output."""
        caches = self.cache_bytes if plan.cache_device == plan.device else 0
        return self.frame_bytes + caches + _of(WORKING_SETS, plan.device) * plan.working_set


def _of(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["default"])


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    import psutil  # for the CPU, and for devices that do not report free memory; optional with CUDA

    return psutil.virtual_memory().available
