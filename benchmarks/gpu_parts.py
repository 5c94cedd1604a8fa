"""What `benchmarks.gpu` measures: `python -m benchmarks.gpu_parts forward-25 FILE` adds a part's missing results to a file."""

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
from benchmarks.gpu_results import STOPPED, Part, Results, Unit
from benchmarks.measure import MEDIAN, RATIO, Column, Timed, environment, in_process, peak
from benchmarks.peers import DEVICE, our_dit
from mochi_core import AsymmDiTConfig
from mochi_core.doctor.attempt import attempt
from mochi_core.doctor.machine import driver
from mochi_core.sampling.sample import prepared_velocities
from mochi_core.transformer.attention import Attention, choose_attention

ROOT = Path(__file__).parents[1]
MODULE = "benchmarks.gpu_parts"
TESTS = "pytest"
SHOWN_LINES = 25
PEERS = ["ours", *dit.COMFYUI, "diffusers"]
LIMITS_GIB = (5, 3)
MEMBERS = {f"one of {count}": count for count in (1, 2, 4, 8)}
SHARES = (
    "Members share the tokens outside attention and the heads inside it. Each exchange between the two is only a copy on this "
    "card here, so this is the most that can be gained before communication. Each member has whole latent frames, of 28 for 8 "
    "members 4, and its own text."
)


def parts(tiny: bool) -> dict[str, Part]:
    """Parts by name, most important first; their seconds leave half a minute of the ten for overhead."""
    forwards = {frames: new_case(frames, tiny) for frames in (25, 85, 163)}
    seconds = {25: 56, 85: 60, 163: 94}
    return {
        "tests": Part("`pytest -m gpu`: every path of a GPU against the plain one", 80, [("tests", {}, [TESTS])]),
        **{
            f"forward-{frames}": steps(f"One forward, {frames} frames", seconds[frames], case, PEERS)
            for frames, case in forwards.items()
        },
        "decode": decode(tiny),
        "8-bit": steps("Weights and products in 8 bits, 85 frames", 30, forwards[85], ["ours", *dit.IN_8_BITS]),
        "streamed": steps(
            "A guided step, resident and streamed, 163 frames", 44,
            new_case(163, tiny, guided=True), ["ours", "ours, streamed"],
        ),
        "whole-run": whole_run(tiny),
        "load": loading(tiny),
        "shares": shares(tiny),
    }  # fmt: skip


def new_case(frames: int, tiny: bool, **more: bool) -> dict:
    """A case of `benchmarks.dit` at 848x480 and full depth; if `tiny`, one block and a few tokens in a dtype for any CPU."""
    (latent,) = dit.on_gpu([frames])
    if tiny:
        return dit.new_case((latent[0] // 3, 4, 4), dtype="float32", depth=1, **more)
    return dit.new_case(latent, depth=48, **more)


def steps(title: str, seconds: float, case: dict, contenders: list[str]) -> Part:
    return Part(title, seconds, [(dit.describe(case), case, contenders)], dit.COLUMNS)


def whole_run(tiny: bool) -> Part:
    case, title = new_case(25, tiny, guided=True, whole=True), "A whole guided run of 64 steps, 25 frames"
    return Part(title, 40, [(dit.describe(case), case, ["ours"])], dit.WHOLE_COLUMNS, calls=0, note=dit.WHOLE)


def decode(tiny: bool) -> Part:
    case = {"latent": (28, 60, 106), "dtype": "bfloat16"}
    case = {"latent": (2, 4, 4), "dtype": "float32"} if tiny else case
    cases = [(case, ["ours", "ComfyUI, tiled", "diffusers, tiled", "ComfyUI"])]
    cases += [({**case, "memory_limit": gib * 2**30}, ["ours"]) for gib in LIMITS_GIB]
    named = [(vae.describe(case), case, contenders) for case, contenders in cases]
    return Part("Decode of 163 frames", 84, named, [MEDIAN, RATIO, peak("the model")], "benchmarks.vae", calls=1)


def loading(tiny: bool) -> Part:
    config = AsymmDiTConfig(depth=1 if tiny else 48)
    columns: list[Column] = [MEDIAN, RATIO, peak("what was held before", "host_mib"), *load.ON_DEVICE]
    cases = [(f"{config.depth} blocks", {"depth": config.depth}, [*LOADERS])]
    return Part("Loading the 20 GB of the released size", 46, cases, columns, MODULE, calls=1)


def shares(tiny: bool) -> Part:
    case = new_case(163, tiny)
    title = "A step with the share of tokens of one of several GPUs, 163 frames"
    return Part(title, 34, [(dit.describe(case), case, [*MEMBERS])], [MEDIAN, RATIO], MODULE, note=SHARES)


def member(case: dict, members: int) -> Timed:
    """A step of one of several members: its share of the tokens, with a dummy exchange."""
    dtype, (frames, *size) = getattr(torch, case["dtype"]), case["latent"]
    case = {**case, "latent": (-(-frames // members), *size)}
    model, (latents, conditions) = our_dit(AsymmDiTConfig(depth=case["depth"]), dtype), dit.inputs(case)
    choice = choose_attention("auto", DEVICE, dtype, model.config.head_dim)
    run = prepared_velocities(model, latents, dit.SIGMAS, conditions, null_exchange(choice.run, members))
    return Timed(model, lambda: run(latents, dit.STEP, len(conditions)))


def null_exchange(attend: Attention, members: int) -> Attention:
    """Attention over 1 / `members` of the heads and `members` times the tokens, of tensors of the same total size."""

    def exchanged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, head_dim = q.shape
        one = batch, heads // members, length * members, head_dim
        return attend(*(t.reshape(one) for t in (q, k, v))).reshape(q.shape)

    return exchanged


def loaded(case: dict, loader: Callable[[dict], Callable[[], object]]) -> Callable[[], object]:
    """The call of a contender of `benchmarks.load`; the first one makes the file, which is deleted with the part's folder."""
    path = Path(tempfile.gettempdir()) / "released.safetensors"
    if not path.exists():
        written = load.write_original(path.parent, "unfinished", AsymmDiTConfig(depth=case["depth"]))
        Path(written).replace(path)
    return loader({"path": str(path), "depth": case["depth"]})


LOADERS = {"ours": partial(loaded, loader=load.ours), "ComfyUI's loader": partial(loaded, loader=load.comfyui_loader)}
CONTENDERS = {**LOADERS, **{name: partial(member, members=count) for name, count in MEMBERS.items()}}


def run_tests() -> dict:
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
    said = "\n".join((done.stdout + done.stderr).splitlines()[-SHOWN_LINES:])
    return {"said": said, **({"failure": f"ended with {done.returncode}"} if done.returncode else {})}


def measure(part: Part, results: Results, about: dict) -> None:
    """Measure a part's missing results; a unit running when the process is killed stays recorded as stopped."""
    for unit in results.missing(part):
        results.add(unit, {"failure": STOPPED}, about)
        results.add(unit, run(unit), about)


def run(unit: Unit) -> dict:
    if unit.contender == TESTS:
        return run_tests()
    return in_process(unit.module, unit.contender, unit.case, unit.calls)


def about(device: str) -> dict[str, str]:
    """The commit; and card, driver and versions in one line."""
    if device == "cuda" and DEVICE != "cuda":
        raise SystemExit("There is no GPU here; --device cpu --tiny shows that every part runs.")
    found = attempt(driver)
    machine = f"{environment()} Driver: {found if isinstance(found, str) else found['problem']}."
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"commit": described.stdout.strip() or "unknown", "machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*parts(tiny=True)])
    parser.add_argument("results", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default=DEVICE)
    options = parser.parse_args()
    measure(parts(options.tiny)[options.part], Results(options.results), about(options.device))


if __name__ == "__main__":
    main()
