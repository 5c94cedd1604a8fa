"""All that only a GPU can show, in calls of ten minutes: `COMFYUI_PATH=... python -m benchmarks.gpu`.

The most important parts come first, each in a process of its own with a time limit, so that one that fails or hangs does not
end the rest. All results go into one file; parts that it has already are skipped, so what did not fit into the time is measured
by the next call. `--device cpu --tiny` shows on any machine that every part runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent / "results" / "gpu.md"
TINY_PAGE = Path(tempfile.gettempdir()) / "mochi_gpu_tiny.md"
NOTE = (
    "One line per part: what was measured is below, what failed is repeated by the next call. `ours` is a step inside a "
    "prepared run, random weights of the released sizes, bf16, 848x480, where nothing else is said."
)
SECTION = re.compile(r"<!-- part (\S+): (ok|failed) after (\d+) s -->\n(.*?)\n<!-- end of \1 -->", re.S)
LEAST_SECONDS = 5
"""A part is not begun when less time than this is left."""
SHOWN_LINES = 15
"""Of what a failed part said last."""


@dataclass(frozen=True)
class Part:
    name: str
    title: str
    command: Sequence[str]
    """Prints markdown; ends with another status than 0 if it fails."""
    limit: float
    """Seconds that it may take."""


@dataclass(frozen=True)
class Result:
    ok: bool
    seconds: int
    text: str


NAMES = {
    "tests": ("`pytest -m gpu`: every path of a GPU against the plain one", 120),
    "forward-25": ("One forward, 25 frames", 90),
    "forward-85": ("One forward, 85 frames", 100),
    "forward-163": ("One forward, 163 frames", 150),
    "decode": ("Decode of 163 frames", 150),
    "8-bit": ("Weights and products in 8 bits, 85 frames", 90),
    "streamed": ("A guided step, resident and streamed, 163 frames", 120),
    "whole-run": ("A whole guided run of 64 steps, 25 frames", 120),
    "load": ("Loading the 20 GB of the released size", 150),
    "shares": ("A step with the share of tokens of one of several GPUs, 163 frames", 120),
}
"""Title and limit in seconds of every part of `benchmarks.gpu_parts`, in the order of importance."""
TINY_LIMIT = 600
"""Seconds for a tiny part, on a CPU of any speed."""


def run_parts(
    parts: Sequence[Part], path: Path, head: str, seconds: float, again: bool = False, only: Sequence[str] = ()
) -> dict[str, Result]:
    """Run what the page at `path` does not have yet, for at most `seconds` in all, and write the page after each part.

    `only` names those to run, if not all; `again` repeats those, too, that the page has. What else it has stays.

    Raises:
        ValueError: the page is from another card or other versions, which `head` names.
    """
    results = read_page(path, head)
    deadline, done = time.monotonic() + seconds, () if again else [name for name in results if results[name].ok]
    for part in parts:
        if only and part.name not in only:
            continue
        if part.name in done:
            print(f"{part.name}: in {path.name} already", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"{part.name}: no time left, run it again", flush=True)
            continue
        results[part.name] = run_part(part, min(part.limit, left))
        outcome = "ok" if results[part.name].ok else "FAILED"
        print(f"{part.name}: {outcome} after {results[part.name].seconds} s", flush=True)
        path.write_text(write_page(parts, head, results), encoding="utf-8")
    return results


def run_part(part: Part, limit: float) -> Result:
    """Run one part for at most `limit` seconds; what it said last if it fails."""
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,  # a part that is killed cleans nothing up
    ):
        process = subprocess.Popen(
            part.command, stdout=subprocess.PIPE, stderr=said, text=True, errors="replace", start_new_session=True,
            env={**os.environ, "TMPDIR": scratch},
        )  # fmt: skip
        try:
            text, _ = process.communicate(timeout=limit)
            problem = None if process.returncode == 0 else f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            end(process)
            text, problem = process.communicate()[0], f"stopped after {limit:.0f} s"
        said.seek(0)
        last = [*said.read().splitlines(), *text.splitlines()][-SHOWN_LINES:]
    seconds = round(time.monotonic() - began)
    if problem is None:
        return Result(True, seconds, text.strip())
    return Result(False, seconds, "\n".join([f"It {problem}:", "", "```", *last, "```"]))


def end(process: subprocess.Popen) -> None:
    """Kill a part and the processes that it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def write_page(parts: Sequence[Part], head: str, results: dict[str, Result]) -> str:
    lines = ["# On a GPU", "", head, "", NOTE, "", "| part | outcome | seconds |", "|---|---|---|"]
    for part in parts:
        result = results.get(part.name)
        outcome = "not run yet" if result is None else "ok" if result.ok else "failed"
        lines.append(f"| {part.title} | {outcome} | {'' if result is None else result.seconds} |")
    for part in parts:
        if (result := results.get(part.name)) is not None:
            outcome = "ok" if result.ok else "failed"
            lines += ["", f"## {part.title}", "", f"<!-- part {part.name}: {outcome} after {result.seconds} s -->"]
            lines += [result.text, f"<!-- end of {part.name} -->"]
    return "\n".join(lines) + "\n"


def read_page(path: Path, head: str) -> dict[str, Result]:
    """The parts of a page that `write_page` has written, none if there is no such page; ValueError if its head differs."""
    if not path.exists():
        return {}
    page = path.read_text(encoding="utf-8")
    if head not in page.splitlines():
        raise ValueError(
            f"{path} was made on another machine or with other versions; use another --output, or remove it."
        )
    return {name: Result(outcome == "ok", int(s), text) for name, outcome, s, text in SECTION.findall(page)}


def environment(device: str) -> dict[str, str]:
    """Variables for the parts; on the CPU, no GPU is seen."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, **hidden}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *NAMES], help="which (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--again", action="store_true", help="repeat what the file has already")
    parser.add_argument("--minutes", type=float, default=10, help="for all together (default: %(default)s)")
    parser.add_argument("--output", type=Path, help=f"(default: {PAGE.name} in results, tiny in the temporary folder)")
    options = parser.parse_args()
    os.environ.update(environment(options.device))
    tiny = ["--tiny"] if options.tiny else []
    command = [sys.executable, "-m", "benchmarks.gpu_parts"]
    head = subprocess.run(
        [*command, "head", "--device", options.device], stdout=subprocess.PIPE, text=True, check=False
    )
    if head.returncode:
        raise SystemExit(head.returncode)  # it has said why
    parts = [
        Part(name, title, [*command, name, *tiny], TINY_LIMIT if tiny else limit)
        for name, (title, limit) in NAMES.items()
    ]
    path = options.output or (TINY_PAGE if options.tiny else PAGE)
    try:
        results = run_parts(parts, path, head.stdout.strip(), options.minutes * 60, options.again, options.parts)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(path)
    raise SystemExit(0 if all(name in results and results[name].ok for name in options.parts or NAMES) else 1)


if __name__ == "__main__":
    main()
