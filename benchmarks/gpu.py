"""Everything that only a GPU can show, in calls of ten minutes: `COMFYUI_PATH=... python -m benchmarks.gpu`.

The most important parts come first, each in its own process with a time limit, so that one that fails or hangs does not stop the
rest; all limits together fit into one call. Each contender's result is saved at once, and units already in the file are skipped,
so that the next call measures what is missing. `--device cpu --tiny` shows on any machine that every part runs; its figures are
meaningless.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_results import Part, Results, write_page

PAGE = Path(__file__).parent / "results" / "gpu.md"
TINY_PAGE = Path(tempfile.gettempdir()) / "mochi_gpu_tiny.md"
MINUTES = 10
"""Length of a call that the parts' limits are given for."""
SHOWN_LINES = 15
"""Number of a failed part's last output lines that are shown."""


def run_parts(
    parts: dict[str, Part], commands: dict[str, Sequence[str]], page: Path, machine: str, minutes: float = MINUTES
) -> Results:
    """Run the command of each part that is not complete, and write the page after each; all of them share `minutes`.

    A part's limit scales with `minutes`; it is not started if less time is left.

    Raises:
        ValueError: the page's results are from another machine or other versions, which `machine` names.
    """
    results, deadline = Results(page.with_suffix(".jsonl")), time.monotonic() + 60 * minutes
    results.check(machine)
    for name, command in commands.items():
        missing, limit = results.missing(parts[name]), parts[name].seconds * minutes / MINUTES
        if not missing:
            print(f"{name}: in {results.path.name} already", flush=True)
        elif time.monotonic() + limit > deadline:
            print(f"{name}: no time left, run it again", flush=True)
        else:
            problem = run_part(command, limit)
            left = len(results.missing(parts[name]))
            print(f"{name}: {problem or 'done'}, {len(missing) - left} of {len(missing)} measured", flush=True)
            page.write_text(write_page(parts, machine, results), encoding="utf-8")
    return results


def run_part(command: Sequence[str], limit: float) -> str | None:
    """Run a command for at most `limit` seconds; returns what went wrong, or None."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,  # a killed part does not clean up
    ):
        process = subprocess.Popen(
            command, stdout=said, stderr=said, start_new_session=True, env={**os.environ, "TMPDIR": scratch}
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            return f"stopped after {limit:.0f} s"
        if process.returncode == 0:
            return None
        said.seek(0)
        print("\n".join(said.read().splitlines()[-SHOWN_LINES:]), file=sys.stderr)
        return f"ended with {process.returncode}"


def end(process: subprocess.Popen) -> None:
    """Kill a part and the processes that it started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def environment(device: str) -> dict[str, str]:
    """Environment variables for the parts; with `cpu`, GPUs are hidden."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, **hidden}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run, by the printed names (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--again", action="store_true", help="discard the file's results for these parts")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together (default: %(default)s)")
    parser.add_argument("--output", type=Path, help=f"(default: {PAGE.name} in results, tiny in the temporary folder)")
    options = parser.parse_args()
    os.environ.update(environment(options.device))
    from benchmarks import gpu_parts  # PyTorch sees a GPU or none depending on the environment just set

    page = options.output or (TINY_PAGE if options.tiny else PAGE)
    parts, results = gpu_parts.parts(options.tiny), Results(page.with_suffix(".jsonl"))
    if unknown := {*options.parts} - {*parts}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(parts)}")
    machine, names = gpu_parts.about(options.device)["machine"], options.parts or [*parts]
    if options.again:
        results.forget([unit for name in names for unit in parts[name].units()])
    tiny = ["--tiny"] if options.tiny else []
    command = [sys.executable, "-m", "benchmarks.gpu_parts"]
    commands = {name: [*command, name, str(results.path), "--device", options.device, *tiny] for name in names}
    try:
        run_parts(parts, commands, page, machine, options.minutes)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(page)
    raise SystemExit(any(results.missing(parts[name]) for name in names))


if __name__ == "__main__":
    main()
