"""The parts of `benchmarks.gpu`; each prints its markdown: `python -m benchmarks.gpu_parts forward-25`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import dit, load, vae
from benchmarks.measure import MEDIAN, RATIO, Timed, compare, environment, markdown, peak, table
from benchmarks.peers import DEVICE, our_dit
from mochi_core import AsymmDiTConfig
from mochi_core.doctor.attempt import attempt
from mochi_core.doctor.machine import driver
from mochi_core.sampling.sample import prepared_velocities
from mochi_core.transformer.attention import Attention, choose_attention

ROOT = Path(__file__).parents[1]
SHOWN_LINES = 25
CALLS = 3
PEERS = ["ours", *dit.COMFYUI, "diffusers"]
LIMITS_GIB = (5, 3)
MEMBERS = (1, 2, 4, 8)
SHARES = (
    "Members share the tokens outside attention and the heads inside it. Each exchange of one for the other is a copy on this "
    "card instead, so this is what is left to gain before communication. Each member has whole latent frames, of 28 for 8 "
    "members 4, and text of its own."
)


def tests(_: bool) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
        "tests/core",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = ["```", *(done.stdout + done.stderr).splitlines()[-SHOWN_LINES:], "```"]
    if done.returncode:
        print("\n".join(lines))
        raise SystemExit(done.returncode)
    return lines


def new_case(frames: int, tiny: bool, **more: bool) -> dict:
    """A case of `benchmarks.dit` at 848x480 and full depth; or one block and a few tokens, in what every CPU multiplies."""
    (latent,) = dit.on_gpu([frames])
    if tiny:
        return dit.new_case((latent[0] // 3, 4, 4), dtype="float32", depth=1, **more)
    return dit.new_case(latent, depth=48, **more)


def forward(tiny: bool, frames: int, contenders: list[str]) -> list[str]:
    return steps([new_case(frames, tiny)], contenders)


def steps(cases: list[dict], contenders: list[str]) -> list[str]:
    results = compare("benchmarks.dit", contenders, cases, CALLS, rounds=1)
    return table(dit.describe, cases, results, dit.COLUMNS)


def streamed(tiny: bool) -> list[str]:
    return steps([new_case(163, tiny, guided=True)], ["ours", "ours, streamed"])


def whole_run(tiny: bool) -> list[str]:
    cases = [new_case(25, tiny, guided=True, whole=True)]
    results = compare("benchmarks.dit", ["ours"], cases, calls=0, rounds=1)
    return [dit.WHOLE, "", *table(dit.describe, cases, results, dit.WHOLE_COLUMNS)]


def decode(tiny: bool) -> list[str]:
    case = {"latent": (28, 60, 106), "dtype": "bfloat16"}
    case = {"latent": (2, 4, 4), "dtype": "float32"} if tiny else case
    limited = [{**case, "memory_limit": gib * 2**30} for gib in LIMITS_GIB]
    columns = [MEDIAN, RATIO, peak("the model")]
    free = compare("benchmarks.vae", ["ours", "ComfyUI, tiled", "diffusers, tiled", "ComfyUI"], [case], 0, rounds=1)
    ours = compare("benchmarks.vae", ["ours"], limited, calls=0, rounds=1)
    return table(vae.describe, [case, *limited], [*free, *ours], columns)


def loading(tiny: bool) -> list[str]:
    config = AsymmDiTConfig(depth=1 if tiny else 48)
    with tempfile.TemporaryDirectory() as folder:
        path = load.write_original(Path(folder), "released", config)
        case = {"path": path, "depth": config.depth, "name": f"{load.megabytes(path):,.0f} MiB"}
        results = compare("benchmarks.load", ["ours", "ComfyUI's loader"], [case], calls=1, rounds=1)
    columns = [MEDIAN, RATIO, peak("what was held before", "host_mib"), *load.ON_DEVICE]
    return table(lambda case: case["name"], [case], results, columns)


def shares(tiny: bool) -> list[str]:
    whole = new_case(163, tiny)
    frames, *size = whole["latent"]
    cases = [
        {**dit.new_case((-(-frames // count), *size), dtype=whole["dtype"], depth=whole["depth"]), "members": count}
        for count in MEMBERS
    ]
    measured = [result["member"] for result in compare("benchmarks.gpu_parts", ["member"], cases, CALLS, rounds=1)]
    alone = measured[0].median
    rows = [
        (
            str(case["members"]),
            f"{dit.token_count(case['latent'])}",
            m.failure or f"{m.median:.3f}",
            f"{alone / m.median:.2f}",
        )
        for case, m in zip(cases, measured, strict=True)
    ]
    return [SHARES, "", *markdown(("members", "tokens of each", "median s", "times as fast as one"), rows)]


def member(case: dict) -> Timed:
    """A step of one of several members: its share of the tokens, with an exchange that goes nowhere."""
    dtype = getattr(torch, case["dtype"])
    model, (latents, conditions) = our_dit(AsymmDiTConfig(depth=case["depth"]), dtype), dit.inputs(case)
    choice = choose_attention("auto", DEVICE, dtype, model.config.head_dim)
    attention = null_exchange(choice.run, case["members"])
    run = prepared_velocities(model, latents, dit.SIGMAS, conditions, attention)
    return Timed(model, lambda: run(latents, dit.STEP, len(conditions)))


def null_exchange(attention: Attention, members: int) -> Attention:
    """Attention over 1 / `members` of the heads and `members` times the tokens, of tensors of the same total size."""

    def exchanged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, head_dim = q.shape
        one = batch, heads // members, length * members, head_dim
        return attention(*(t.reshape(one) for t in (q, k, v))).reshape(q.shape)

    return exchanged


CONTENDERS = {"member": member}
PARTS: dict[str, Callable[[bool], list[str]]] = {
    "tests": tests,
    **{f"forward-{frames}": partial(forward, frames=frames, contenders=PEERS) for frames in (25, 85, 163)},
    "decode": decode,
    "8-bit": partial(forward, frames=85, contenders=["ours", *dit.IN_8_BITS]),
    "streamed": streamed,
    "whole-run": whole_run,
    "load": loading,
    "shares": shares,
}


def head(device: str) -> str:
    """Card, driver and versions, in one line."""
    if device == "cuda" and DEVICE != "cuda":
        raise SystemExit("There is no GPU here; --device cpu --tiny shows that every part runs.")
    found = attempt(driver)
    return f"{environment()} Driver: {found if isinstance(found, str) else found['problem']}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["head", *PARTS])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default=DEVICE)
    options = parser.parse_args()
    print(head(options.device) if options.part == "head" else "\n".join(PARTS[options.part](options.tiny)))


if __name__ == "__main__":
    main()
