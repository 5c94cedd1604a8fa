"""What an animated preview costs, alone and as a share of the step before it, for 480 x 848."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.dit import GPU, TEXT_TOKENS, forward_flops, new_case, ours, token_count
from benchmarks.measure import markdown, measure, page, write_report
from benchmarks.peers import DEVICE, use_pack
from mochi_core import AsymmDiTConfig

LATENTS, CALLS, BLOCKS = (5, 15, 28), 9, 48
CONTENTS = ("noise", "smooth")
FROM_ONE = (
    f"The step is {BLOCKS} times what one block took for 25 frames, scaled by FLOPs for more frames: attention, whose share "
    "grows, is slower than that, so longer steps take at least this long. "
)


def latents(count: int, content: str) -> Tensor:
    """Noise is the hardest to compress; smooth is noise on an 8 times coarser grid, the same in every frame."""
    generator = torch.Generator().manual_seed(0)
    if content == "noise":
        return torch.randn(1, 12, count, 60, 106, generator=generator).to(DEVICE)
    coarse = torch.randn(1, 12, 8, 14, generator=generator)
    frame = F.interpolate(coarse, (60, 106), mode="bicubic")
    return frame[:, :, None].expand(-1, -1, count, -1, -1).contiguous().to(DEVICE)


def median_seconds(call: Callable[[], Any]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return statistics.median(seconds() for _ in range(CALLS))


def step_seconds() -> dict[int, float]:
    """Seconds of a guided step by latent frames; on a CPU, extrapolated from one block and the shortest video."""
    if GPU:
        return {t: measure(ours, new_case((t, 60, 106), guided=True), calls=1)["seconds"][0] for t in LATENTS}
    shortest, config = (LATENTS[0], 60, 106), AsymmDiTConfig()
    block = measure(ours, {**new_case(shortest, guided=True), "depth": 1}, calls=0)["seconds"][0]

    def work(t: int) -> int:
        return sum(forward_flops(config, token_count((t, 60, 106)), text) for text in (TEXT_TOKENS, 0))

    return {t: BLOCKS * block * work(t) / work(LATENTS[0]) for t in LATENTS}


def cost(count: int, content: str) -> tuple[float, float, int]:
    """Seconds for the colours and for the file, and the file's bytes."""
    from pack.nodes.bridge.preview import AnimatedPreview, MochiLatents, latents_to_rgb

    denoised, latent_format = latents(count, content), MochiLatents()
    frames = latents_to_rgb(denoised, latent_format)
    colours = median_seconds(lambda: latents_to_rgb(denoised, latent_format))
    file = median_seconds(lambda: AnimatedPreview(frames))
    return colours, file, len(AnimatedPreview(frames).content)


def row(count: int, content: str, step: float) -> tuple[str, ...]:
    from pack.nodes.bridge.preview import MAX_TIME_FRACTION

    colours, file, size = cost(count, content)
    every = max(1, math.ceil(file / step / MAX_TIME_FRACTION))
    cells = f"{colours * 1e3:.1f}", f"{file * 1e3:.1f}", f"{size / 1e3:.0f}", f"{step:,.1f}"
    return f"{6 * count - 5} frames, {content}", *cells, f"{(colours + file) / step:.4%}", str(every)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    use_pack()
    steps = step_seconds()
    torch.set_num_threads(1)  # more threads would only wait for each other
    rows = [row(count, content, steps[count]) for count in LATENTS for content in CONTENTS]
    note = (
        "A preview is one frame for every latent frame, 106 x 60, in an animated WebP file. Its cost is a linear fit of colours "
        "and the file; noise is the hardest to compress, as in the first steps. A step is guided, at the released size in "
        f"bf16. {'' if GPU else FROM_ONE}The pack makes a preview after a step unless the files of all earlier ones took more "
        "than 1 % of the time: otherwise it is made only once in several steps, as given in the last column."
    )
    head = ("video", "colours, ms", "file, ms", "kB", "step, s", "share of a step", "made once in steps")
    write_report("preview", page("Moving previews", note, *markdown(head, rows)))


if __name__ == "__main__":
    main()
