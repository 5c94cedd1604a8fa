"""Results of `benchmarks.gpu`: a file with one line of JSON per contender and case, and the page made from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.measure import OUT_OF_MEMORY, Column, Measurement, markdown, table

STOPPED = "stopped before it was done"
COMMIT: Column = ("commit", lambda _case, m, _ours: m.runs[-1].get("commit", ""))
NOTE = (
    "Anything missing, or failed other than by running out of memory, is measured by the next call. Unless stated otherwise, "
    "`ours` is a step inside a prepared run, with random weights of the released sizes, in bf16, at 848x480. Each line of the "
    "file next to this page is one result, with commit, versions, device and time."
)


@dataclass(frozen=True)
class Unit:
    """One contender on one case."""

    module: str
    contender: str
    case: dict
    calls: int

    @property
    def key(self) -> str:
        return json.dumps([self.module, self.contender, self.case, self.calls], sort_keys=True)


@dataclass(frozen=True)
class Part:
    """A table of the page."""

    title: str
    seconds: float
    """Time limit within a call of ten minutes."""
    cases: Sequence[tuple[str, dict, Sequence[str]]]
    """Name, case and contenders; the first contender is ours."""
    columns: Sequence[Column] = ()
    module: str = "benchmarks.dit"
    calls: int = 3
    note: str = ""

    def unit(self, case: dict, contender: str) -> Unit:
        return Unit(self.module, contender, case, self.calls)

    def units(self) -> list[Unit]:
        return [self.unit(case, contender) for _, case, contenders in self.cases for contender in contenders]


class Results:
    """The file that every process appends to; if a unit has several results, the last one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, unit: Unit, run: dict, about: dict) -> None:
        """`about` is the commit and the machine, as from `gpu_parts.about`."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = {"unit": unit.key, "run": run, **about, "time": now}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> dict[str, dict]:
        """Lines by their unit's key; truncated lines are ignored."""
        found = {}
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            found[line["unit"]] = line
        return found

    def forget(self, units: Sequence[Unit]) -> None:
        keys = {unit.key for unit in units}
        kept = [line for key, line in self.read().items() if key not in keys]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def missing(self, part: Part) -> list[Unit]:
        """Units of a part still to be measured; failed ones come last, so that they block nothing else."""
        found = self.read()
        units = [unit for unit in part.units() if unit.key not in found or not is_result(found[unit.key]["run"])]
        return sorted(units, key=lambda unit: unit.key in found)

    def check(self, machine: str) -> None:
        """Raises ValueError if the file has results from another machine or other versions."""
        others = {line["machine"] for line in self.read().values()} - {machine}
        if others:
            raise ValueError(
                f"{self.path} has results from another machine or other versions ({others.pop()}); use another --output, or "
                "remove it."
            )


def is_result(run: dict) -> bool:
    return run.get("failure", OUT_OF_MEMORY) == OUT_OF_MEMORY


def write_page(parts: dict[str, Part], machine: str, results: Results) -> str:
    found = results.read()
    counts = [(part.title, len(part.units()), len(results.missing(part))) for part in parts.values()]
    rows = [(title, f"{count - missing} of {count}") for title, count, missing in counts]
    lines = ["# On a GPU", "", machine, "", NOTE, "", *markdown(("part", "measured"), rows)]
    for part in parts.values():
        lines += ["", f"## {part.title}", "", *([part.note, ""] if part.note else []), *section(part, found)]
    return "\n".join(lines) + "\n"


def section(part: Part, found: dict[str, dict]) -> list[str]:
    """The table of a part, followed by its contenders' output, if any."""
    measured = [
        {contender: Measurement([run_of(found.get(part.unit(case, contender).key))]) for contender in contenders}
        for _, case, contenders in part.cases
    ]
    cases = [{**case, "name": name} for name, case, _ in part.cases]
    lines = table(lambda case: case["name"], cases, measured, [*part.columns, COMMIT])
    said = [run["said"] for each in measured for m in each.values() for run in m.runs if "said" in run]
    return [*lines, *(line for text in said for line in ("", "```", text, "```"))]


def run_of(line: dict | None) -> dict:
    return {"failure": "not measured yet"} if line is None else {**line["run"], "commit": line["commit"]}
