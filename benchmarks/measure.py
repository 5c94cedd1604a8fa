"""Run each contender in a process of its own, turn about, and tabulate.

A contender is a function `(case) -> callable`: it builds a model and its inputs, and returns what is to be timed. Every
process reports the seconds of several calls and the peak memory above what was held before the first of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROUNDS = 2
MIB = 2**20


@dataclass
class Measurement:
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compare(
    module: str, contenders: list[str], cases: list[dict], calls: int, rounds: int = ROUNDS, **environment: str
) -> list[dict[str, Measurement]]:
    """Measure every contender on every case; contenders take turns so that a slow minute hits all of them.

    `environment` holds variables that the processes are to see.
    """
    results = [{name: Measurement() for name in contenders} for _ in cases]
    for _ in range(rounds):
        for case, measured in zip(cases, results, strict=True):
            for name in contenders:
                run = _in_process(module, name, case, calls, environment)
                measured[name].seconds += run["seconds"]
                measured[name].peak_mib = max(measured[name].peak_mib, run["peak_mib"])
                print(f"{case} {name}: {statistics.median(run['seconds']):.3f} s", file=sys.stderr, flush=True)
    return results


def _in_process(module: str, contender: str, case: dict, calls: int, environment: dict[str, str]) -> dict:
    command = [sys.executable, "-m", "benchmarks.measure", module, contender, json.dumps(case), str(calls)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "OutOfMemoryError" in done.stderr:
        return {"seconds": [math.inf], "peak_mib": math.inf}
    if done.returncode:
        raise RuntimeError(f"{contender} failed on {case}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def measure(build: Callable[[dict], Callable[[], object]], case: dict, calls: int) -> dict:
    """Seconds per call after a first one, or of that one if `calls` is 0; and its peak memory above the model."""
    call = build(case)
    held = _reset_peak()
    first = _seconds(call)
    peak = _peak() - held
    return {"seconds": [_seconds(call) for _ in range(calls)] or [first], "peak_mib": peak / MIB}


def _seconds(call: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> int:
    """Forget earlier peaks; returns the bytes held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _peak()


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(
    title: str, cases: list[str], results: list[dict[str, Measurement]], note: str, above: str = "the model"
) -> str:
    """A markdown page; ratios are the peer's median time over ours, memory is told above what was held before."""
    lines = [
        f"# {title}",
        "",
        environment(),
        "",
        note,
        "",
        f"| case | contender | median s | fastest s | time / ours | peak memory above {above}, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for case, measured in zip(cases, results, strict=True):
        ours = next(iter(measured.values()))
        for name, m in measured.items():
            ratio = m.median / ours.median
            row = (case, name, f"{m.median:.3f}", f"{min(m.seconds):.3f}", f"{ratio:.2f}", f"{m.peak_mib:.0f}")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def environment() -> str:
    """Hardware and versions in one line."""
    import diffusers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, ComfyUI {comfyui_version()}"
    return f"{device} ({platform.machine()}), Python {platform.python_version()}, {versions}."


def comfyui_version() -> str:
    from benchmarks.peers import use_comfyui

    use_comfyui()
    return importlib.import_module("comfyui_version").__version__


def write_report(name: str, page: str) -> None:
    """Print the page and keep it beside the script, one file per kind of device."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    path = Path(__file__).parent / "results" / f"{name}_{kind}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page)
    print(page)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("contender")
    parser.add_argument("case", type=json.loads)
    parser.add_argument("calls", type=int)
    options = parser.parse_args()
    build = importlib.import_module(options.module).CONTENDERS[options.contender]
    print(json.dumps(measure(build, options.case, options.calls)))


if __name__ == "__main__":
    main()
