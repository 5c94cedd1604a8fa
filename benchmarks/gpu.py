"""All that only a GPU can show, in calls of ten minutes: `COMFYUI_PATH=... python -m benchmarks.gpu`.

The most important parts come first, each in a process of its own with a time limit, so that one that fails or hangs does not
end the rest; all limits together fit into one call. Every contender's result is kept as soon as there is one, and what a file
has already is skipped, so what did not fit is measured by the next call. `--device cpu --tiny` shows on any machine that
every part runs; its figures mean nothing.
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
"""Length of a call for which the limits of the parts are given."""
SHOWN_LINES = 15
"""Lines that are shown of what a failed part said last."""


def run_parts(
    parts: dict[str, Part], commands: dict[str, Sequence[str]], page: Path, machine: str, minutes: float = MINUTES
) -> Results:
    """Run the command of each part that is not all measured, and write the page after each; `minutes` are for all of them.

    A part's limit grows with `minutes`, and it is not begun when less than that is left.

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
    """Run a command for at most `limit` seconds; what was wrong with it, if anything was."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,  # a part that is killed cleans nothing up
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
    """Kill a part and the processes that it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def environment(device: str) -> dict[str, str]:
    """Variables for the parts; on the CPU, no GPU is seen."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, **hidden}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="which, by the names that it prints (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--again", action="store_true", help="forget what the file has of these parts")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all together (default: %(default)s)")
    parser.add_argument("--output", type=Path, help=f"(default: {PAGE.name} in results, tiny in the temporary folder)")
    options = parser.parse_args()
    os.environ.update(environment(options.device))
    from benchmarks import gpu_parts  # PyTorch sees the GPU, or none, by what was just set

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
