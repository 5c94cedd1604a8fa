"""Working memory of one forward of the denoiser at real sizes, ours next to ComfyUI's own class and diffusers.

At these sizes attention takes hours on a CPU, and would show nothing here: it is replaced by an empty result for all. The memory
that it would hold besides its result, a float32 for each token and head, is 4 MiB for 163 frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import dit
from benchmarks.measure import Timed, compare, markdown, page, write_report

CASES = [dit.new_case((t, 60, 106)) for t in (5, 15, 28)]
NOTE = (
    f"Released width, {CASES[0]['depth']} blocks (more would not hold more: blocks run one after another), bf16, 480 x 848. Peak "
    f"of a forward above the weights, prepared conditioning and inputs; {dit.TEXT_TOKENS} text tokens. Attention is replaced by "
    "an empty result for all: on a CPU it would take hours. `guided pair` is the conditional forward and that of an empty "
    "prompt in one pass over the blocks, which the peers do not have."
)


def without_attention(build: Callable[[dict], Timed], guided: bool = False) -> Callable[[dict], Timed]:
    def contender(case: dict) -> Timed:
        timed = build({**case, "guided": guided})
        # In the layout of PyTorch's flash attention: the same as q's.
        F.scaled_dot_product_attention = lambda q, *_, **__: torch.empty_like(q)
        return timed

    return contender


CONTENDERS = {
    "ours": without_attention(dit.ours),
    "ours, guided pair": without_attention(dit.ours, guided=True),
    "ComfyUI": without_attention(partial(dit.comfyui, attention="flash")),
    "diffusers": without_attention(dit.diffusers),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    give_back = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    results = compare("benchmarks.memory", list(CONTENDERS), CASES, calls=0, rounds=1, **give_back)
    rows = []
    for case, measured in zip(CASES, results, strict=True):
        peaks = (f"{measured[name].largest('peak_mib'):.0f}" for name in CONTENDERS)
        rows.append((f"{6 * case['latent'][0] - 5}", f"{dit.token_count(case['latent'])}", *peaks))
    head = ("frames", "tokens", *(f"{name}, MiB" for name in CONTENDERS))
    write_report("memory", page("Working memory of one forward", NOTE, *markdown(head, rows)))


if __name__ == "__main__":
    main()
