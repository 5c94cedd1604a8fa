"""Run each contender in its own process, taking turns, and tabulate the results.

A contender is a function `(case) -> callable`: it builds a model and its inputs, and returns the call to be timed. Every process
reports the seconds of several calls, and the peak memory above what was held before the first. One that runs out of memory, or is
refused, gets a row that says so.
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
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

ROUNDS = 2
MIB = 2**20
PRODUCTS = 10
FAILURE_LENGTH = 200
OUT_OF_MEMORY = "out of memory"


@dataclass
class Timed:
    """A call, and the model whose weights are measured."""

    model: nn.Module
    call: Callable[[], object]
    warm_up: Callable[[], object] | None = None
    """A shorter call before the first one, to build things once, such as kernels."""

    def __call__(self) -> object:
        return self.call()


@dataclass
class Measurement:
    """The reports of one contender's processes on one case."""

    runs: list[dict] = field(default_factory=list)

    @property
    def failure(self) -> str | None:
        return next((run["failure"] for run in self.runs if "failure" in run), None)

    @property
    def seconds(self) -> list[float]:
        """Seconds of all calls; infinite if one failed."""
        return [math.inf] if self.failure else [second for run in self.runs for second in run["seconds"]]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def largest(self, figure: str) -> float:
        """The largest value of one of `measure`'s figures; infinite if a run failed."""
        return math.inf if self.failure else max(run[figure] for run in self.runs)


Column = tuple[str, Callable[[dict, Measurement, Measurement], str]]
"""A title, and a function (case, measurement, our measurement) -> cell."""
MEDIAN: Column = ("median s", lambda _case, m, _ours: f"{m.median:.3f}")
FASTEST: Column = ("fastest s", lambda _case, m, _ours: f"{min(m.seconds):.3f}")
RATIO: Column = ("time / ours", lambda _case, m, ours: "" if ours.failure else f"{m.median / ours.median:.2f}")


def peak(above: str, figure: str = "peak_mib") -> Column:
    return f"peak memory above {above}, MiB", lambda _case, m, _ours: f"{m.largest(figure):.0f}"


def compare(
    module: str, contenders: list[str], cases: list[dict], calls: int, rounds: int = ROUNDS, **environment: str
) -> list[dict[str, Measurement]]:
    """Measure every contender on every case; contenders take turns, so that a slow minute affects all of them.

    `environment` holds extra variables for the processes.
    """
    results = [{name: Measurement() for name in contenders} for _ in cases]
    for _ in range(rounds):
        for case, measured in zip(cases, results, strict=True):
            for name in contenders:
                run = in_process(module, name, case, calls, **environment)
                measured[name].runs.append(run)
                outcome = run.get("failure") or f"{statistics.median(run['seconds']):.3f} s"
                print(f"{case} {name}: {outcome}", file=sys.stderr, flush=True)
    return results


def in_process(module: str, contender: str, case: dict, calls: int, **environment: str) -> dict:
    """`attempt` in its own process, with the extra variables `environment`."""
    # Not with -m: contenders import this module, and would get a second copy.
    program = "from benchmarks.measure import main; main()"
    command = [sys.executable, "-c", program, module, contender, json.dumps(case), str(calls)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:  # what Python cannot report itself, such as being killed for lack of memory
        return {"failure": f"ended with {done.returncode}: {done.stderr[-FAILURE_LENGTH:].strip()}"}
    run = json.loads(done.stdout.splitlines()[-1])
    if "failure" in run:
        print(done.stderr, file=sys.stderr)
    return run


def attempt(build: Callable[[dict], Callable[[], object]], case: dict, calls: int) -> dict:
    """`measure`'s result, or why it failed."""
    try:
        return measure(build, case, calls)
    except torch.OutOfMemoryError:
        return {"failure": OUT_OF_MEMORY}
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {"failure": reason[:FAILURE_LENGTH].replace("|", "/")}


@torch.inference_mode()
def measure(build: Callable[[dict], Callable[[], object]], case: dict, calls: int) -> dict:
    """Seconds per call after a first one, or of the first if `calls` is 0, and the memory that the first took.

    weights_mib counts the weights of a `Timed` model that are on the device between calls. peak_mib is the device's memory above
    what was held before the first call; host_mib the same for the process; device_mib the total held at the peak. On a CPU, all
    three are the process's. If a case has a tflop, the rate of a matrix product in its dtype is added, in FLOP/s.
    """
    call = build(case)
    if isinstance(call, Timed) and call.warm_up is not None:
        call.warm_up()
    held, held_by_host = _reset_peaks()
    first = _seconds(call)
    device, host = _peaks()
    return {
        "seconds": [_seconds(call) for _ in range(calls)] or [first],
        "weights_mib": weight_bytes(call.model) / MIB if isinstance(call, Timed) else 0.0,
        "peak_mib": (device - held) / MIB,
        "host_mib": (host - held_by_host) / MIB,
        "device_mib": device / MIB,
        "rate": matrix_rate(getattr(torch, case["dtype"])) if "tflop" in case else None,
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that are on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type == device)


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    torch.matmul(a, b)
    return 2 * size**3 / statistics.median(_seconds(lambda: a @ b) for _ in range(PRODUCTS))


def _seconds(call: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peaks() -> tuple[int, int]:
    """Reset the peaks; returns what is held now, like `_peaks`."""
    _synchronize()  # also so that CUDA's own memory is allocated
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _peaks()


def _peaks() -> tuple[int, int]:
    """Peak bytes of the device's memory and of the process; on a CPU they are the same."""
    host = _host_peak()
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else host), host


def _host_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(
    describe: Callable[[dict], str], cases: list[dict], results: list[dict[str, Measurement]], columns: Sequence[Column]
) -> list[str]:
    """One row for each case and contender; the first contender is ours."""
    rows = []
    for case, measured in zip(cases, results, strict=True):
        ours = next(iter(measured.values()))
        for name, m in measured.items():
            cells = (
                [m.failure] + [""] * (len(columns) - 1) if m.failure else [cell(case, m, ours) for _, cell in columns]
            )
            rows.append((describe(case), name, *cells))
    return markdown(("case", "contender", *(title for title, _ in columns)), rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def page(title: str, note: str, *lines: str) -> str:
    """A report in Markdown, with hardware and versions."""
    return "\n".join([f"# {title}", "", environment(), "", note, "", *lines]) + "\n"


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
    """Print the page and save it in `results`, one file per kind of device."""
    keep(f"{name}_{'gpu' if torch.cuda.is_available() else 'cpu'}", page)


def keep(name: str, page: str) -> None:
    """Print the page and save it in `results`."""
    path = Path(__file__).parent / "results" / f"{name}.md"
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
    print(json.dumps(attempt(build, options.case, options.calls)))
