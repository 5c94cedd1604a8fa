"""One GPU's share of a forward on several GPUs, computed without the others; what they would send is made up.

Kernels, bytes sent and peak live memory are counted on a simulated GPU, at the released sizes and 848 x 480. If there is a GPU,
the share is also timed: a forward on several GPUs takes that time plus the transfer of the bytes. Takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import MIB, keep, markdown, page
from benchmarks.simulated_gpu import GpuCounter, no_attention, simulated_gpu, text_of_lengths
from mochi_core import AsymmDiT, AsymmDiTConfig
from mochi_core.parallel.group import Group, Shape, Wait
from mochi_core.parallel.sequence import TokenSplit
from mochi_core.transformer.attention import Attention, choose_attention

CONFIG, DTYPE, TEXT_TOKENS = AsymmDiTConfig(), torch.bfloat16, 256
FRAMES = (25, 85, 163)
MEMBERS = (1, 2, 4, 8)
CALLS = 5

NOTE = (
    "The share of one member of a Ulysses group in a forward under one condition, with an exchange that sends nothing and "
    "receives uninitialised memory. bf16, released sizes, 848 x 480, "
    f"{CONFIG.depth} blocks, {TEXT_TOKENS} text tokens. "
    "**Kernels, bytes and the peak are counted, not measured** (on fake CUDA tensors, attention left out); seconds, if any, "
    "were measured on the GPU of this machine. How long several GPUs would take is not here: no pair has been timed."
)


class Absent(Group):
    """A group whose other members do not exist."""

    def _start(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> Wait:
        received = [parts[0].new_empty(tuple(shape)) for shape in shapes]
        return lambda: received

    def grid(self, *sizes: int) -> tuple[Group, ...]:
        return tuple(Absent(0, size) for size in sizes)


def share(frames: int, members: int, attend: Attention) -> tuple[Callable[[], object], Group]:
    """A forward of the first of `members` members, and its group."""
    dit, group = AsymmDiT(CONFIG, device="cuda", dtype=DTYPE), Absent(0, members)
    x = torch.empty(1, 12, (frames + 5) // 6, 60, 106, device="cuda", dtype=DTYPE)
    text = text_of_lengths(dit, TEXT_TOKENS)
    modulation, rope = dit.modulation(torch.ones(1, device="cuda"), text.pooled), dit.rope(x.shape, x.device)
    split = TokenSplit(group) if members > 1 else None
    return partial(dit.denoise, x, text, modulation, rope, attend=attend, group=split), group


def counts(frames: int, members: int) -> tuple[str, ...]:
    with simulated_gpu():
        call, group = share(frames, members, no_attention)
        with GpuCounter() as counter:
            call()
    return f"{counter.starts:,}", f"{group.sent / 1e9:.2f}", f"{counter.peak / MIB:,.0f}"


@torch.no_grad()
def seconds(frames: int, members: int) -> str:
    """Median of several calls on this machine's GPU; "" if there is none."""
    if not torch.cuda.is_available():
        return ""
    attend = choose_attention("auto", "cuda", DTYPE, CONFIG.head_dim).run
    call, _ = share(frames, members, attend)
    times = []
    for _ in range(1 + CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return f"{statistics.median(times[1:]):.3f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    head = "frames", "members", "kernels", "GB sent", "peak, MiB", "seconds"
    rows = []
    for frames in FRAMES:
        for members in MEMBERS:
            rows.append((str(frames), str(members), *counts(frames, members), seconds(frames, members)))
            print(*rows[-1], flush=True)
    keep("parallel", page("A member's share", NOTE, *markdown(head, rows)))


if __name__ == "__main__":
    main()
