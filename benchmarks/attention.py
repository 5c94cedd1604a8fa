"""Time of the denoiser's attention: our choice, ComfyUI's, and every backend by itself.

On a CPU: 256, 1,024 and 2,048 visual tokens and 77 text tokens. On a GPU: 25, 85 and 163 frames of 480 x 848; a backend that is
unavailable there says why.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import RATIO, Column, compare, markdown, page, peak, table, write_report
from benchmarks.peers import DEVICE, use_comfyui
from mochi_core.transformer.attention import BACKENDS, choose_attention, sdpa

HEADS, HEAD_DIM, TEXT_TOKENS = 24, 128, 77
VISUAL = (7950, 23850, 44520) if DEVICE == "cuda" else (256, 1024, 2048)
DTYPES = ("bfloat16",) if DEVICE == "cuda" else ("bfloat16", "float32")
MEDIAN: Column = ("median ms", lambda _case, m, _ours: f"{m.median * 1e3:.1f}")
FASTEST: Column = ("fastest ms", lambda _case, m, _ours: f"{min(m.seconds) * 1e3:.1f}")


def qkv(case: dict) -> list[Tensor]:
    """q, k and v, (1, heads, length, head_dim) each, stored token by token as in the denoiser."""
    shape = 3, 1, case["length"], HEADS, HEAD_DIM
    return list(torch.randn(shape, device=DEVICE, dtype=getattr(torch, case["dtype"])).transpose(2, 3))


def backend(case: dict, name: str):
    choice = choose_attention(name, DEVICE, getattr(torch, case["dtype"]), HEAD_DIM)
    q, k, v = qkv(case)
    return lambda: choice.run(q, k, v).transpose(1, 2).flatten(2)


def comfyui(case: dict):
    attention, (q, k, v) = host_attention(), qkv(case)
    return lambda: attention(q, k, v, HEADS, skip_reshape=True)


def host_attention():
    use_comfyui()
    import comfy.ldm.modules.attention

    return comfy.ldm.modules.attention.optimized_attention


NAMES = [name for name, one in BACKENDS.items() if DEVICE == "cuda" or DEVICE in one.supported_dtypes]
CONTENDERS = {
    "ours, auto": partial(backend, name="auto"),
    "ComfyUI": comfyui,
    **{name: partial(backend, name=name) for name in NAMES},
}


def describe(case: dict) -> str:
    return f"{case['length']:,} tokens, {case['dtype']}"


def errors() -> list[tuple[str, str]]:
    """Error of every available contender in bf16, relative to attention in float64."""
    case, rows = {"length": 1024 + TEXT_TOKENS, "dtype": "bfloat16"}, []
    q, k, v = (tensor.double() for tensor in seeded(qkv, case))
    exact = sdpa(q, k, v).transpose(1, 2).flatten(2)
    for name, build in CONTENDERS.items():
        with suppress(ValueError):  # the table of times gives the reason
            difference = seeded(build, case)() - exact
            rows.append((name, f"{difference.norm() / exact.norm():.2%}"))
    return rows


def seeded(function, case: dict):
    """Run it on the same q, k and v for all contenders."""
    torch.manual_seed(0)
    return function(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=9, help="timed calls per process (default: %(default)s)")
    calls = parser.parse_args().calls
    cases = [{"length": count + TEXT_TOKENS, "dtype": dtype} for dtype in DTYPES for count in VISUAL]
    results = compare("benchmarks.attention", list(CONTENDERS), cases, calls)
    auto = choose_attention("auto", DEVICE, torch.bfloat16, HEAD_DIM)
    note = (
        f"{HEADS} heads of {HEAD_DIM}, {TEXT_TOKENS} of the tokens are text; from q, k and v as the denoiser has them to joined "
        f"heads; medians over two processes. `auto` is {auto.name}, {auto.reason}; ComfyUI's choice here is "
        f"`{host_attention().__name__}`."
    )
    lines = table(describe, cases, results, [MEDIAN, FASTEST, RATIO, peak("q, k and v")])
    lines += ["", "Relative error in bf16 at 1,101 tokens, against float64:", ""]
    write_report("attention", page("Attention", note, *lines, *markdown(("contender", "error"), errors())))


if __name__ == "__main__":
    main()
