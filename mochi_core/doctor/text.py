"""The report as text: lines of at most 100 columns, about two screens for the three models."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from ..shown import sentence
from .machine import NOT_INSTALLED

WIDTH = 100
MAX_LINES = 2
"""Most lines per finding; longer ones are cut in the text, but complete in the data."""
MAX_DEVICES = 8
GB, MB, GIB = 1e9, 1e6, 2**30
PROBLEM = "could not be determined: "


def render(report: dict[str, Any]) -> str:
    """Format the report of `examine` as text; a probe that failed gets a line, too."""
    lines = [f"Mochi doctor, for work on {report['device']}"]
    for name, tell in SECTIONS.items():
        found = report[name]
        lines += [f"{name}: {PROBLEM}{found['problem']}"] if _is_problem(found) else tell(found)
    for file in report["files"]:
        lines += _file(file)
    lines.append(_verdict(failures(report)))
    return "\n".join(wrapped for line in lines for wrapped in _wrap(sentence(line)))


def failures(report: dict[str, Any]) -> list[str]:
    """Names of failed probes, single checks and unusable files; an unavailable alternative is not a failure."""
    names = [name for name in SECTIONS if _is_problem(report[name])]
    names += [f"device {one['device']}" for one in _parts(report["devices"], list) if _is_problem(one)]
    for section in CHECKED:
        names += [f"{section} {name}" for name, one in _parts(report[section], dict).items() if _has_failed(one)]
    files = (file for file in report["files"] if any(map(_is_problem, (file, *file.values()))))
    return names + [f"file {file['file']}" for file in files]


def _parts(found: Any, kind: type) -> Any:
    """A probe's finding; empty if it failed."""
    return kind() if _is_problem(found) else found


def _has_failed(one: dict[str, Any]) -> bool:
    return _is_problem(one) or not one.get("ok", True)


def _verdict(failed: list[str]) -> str:
    if not failed:
        return 'Nothing failed; "no" marks alternatives that are not available here.'
    return f"{len(failed)} {'check has' if len(failed) == 1 else 'checks have'} FAILED: {', '.join(failed)}"


def _wrap(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=indent, max_lines=MAX_LINES, placeholder=" ...", break_on_hyphens=False
    )


def _is_problem(found: Any) -> bool:
    return isinstance(found, dict) and "problem" in found


def _versions(found: dict[str, str]) -> list[str]:
    there = [f"{name} {version}" for name, version in found.items() if version != NOT_INSTALLED]
    missing = [name for name, version in found.items() if version == NOT_INSTALLED]
    return [f"versions: {', '.join(there)}", *([f"not installed: {', '.join(missing)}"] if missing else [])]


def _one(name: str) -> Callable[[str], list[str]]:
    return lambda found: [f"{name}: {found}"]


def _devices(found: list[dict[str, Any]]) -> list[str]:
    lines = [f"device {one['device']}: {_device(one)}" for one in found[:MAX_DEVICES]]
    return lines + ([f"and {len(found) - MAX_DEVICES} more devices"] if len(found) > MAX_DEVICES else [])


def _device(one: dict[str, Any]) -> str:
    if _is_problem(one):
        return PROBLEM + one["problem"]
    free = "" if one["free_bytes"] is None else f", {one['free_bytes'] / GIB:.1f} free"
    return f"{one['name']}, {one['total_bytes'] / GIB:.1f} GiB{free}"


def _chosen(name: str) -> Callable[[dict[str, Any]], list[str]]:
    return lambda found: [f"{name}: {found['chosen']}" + (f", because {found['reason']}" if found["reason"] else "")]


def _checked(title: str) -> Callable[[dict[str, Any]], list[str]]:
    return lambda found: [title, *_outcomes(found)]


def _outcomes(found: dict[str, Any]) -> Iterator[str]:
    for name, one in found.items():
        yield f"  {name:<12} {_outcome(one)}"


def _outcome(one: dict[str, Any]) -> str:
    """A check's error and verdict, or why there is none."""
    if _is_problem(one):
        return f"FAILED: {one['problem']}"
    if "chosen" in one:
        return f"{one['chosen']}: {one['reason']}"
    if not one["works"]:
        return f"no: {one['reason']}"
    return f"{'ok' if one['ok'] else 'FAILED'}, largest error {one['error']:.2%}"


def _file(file: dict[str, Any]) -> list[str]:
    if _is_problem(file):
        return [f"file {file['file']}: {file['problem']}"]
    lines = [f"file {file['file']}: {file['is']}"]
    for part, tell in PARTS.items():
        if part in file:
            found = file[part]
            lines += [f"  {part}: {found['problem']}"] if _is_problem(found) else tell(found)
    return lines if len(lines) > 1 else [lines[0] + "; not a Mochi model"]


def _transformer(found: dict[str, Any]) -> list[str]:
    weights = ", ".join(f"{way} {_gb(count)}" for way, count in found["weights"].items())
    lengths = [
        f"{frames} frames {_gib(one['working_bytes'])}, {one['plan'] or 'nothing fits'}"
        for frames, one in found["frames"].items()
    ]
    return [
        f"  weights on the device in {found['dtype']}: {weights}",
        f"  working memory at 848x480, guided: {'; '.join(lengths)}",
    ]


def _vae(found: dict[str, Any]) -> list[str]:
    lines = [f"  weights in {found['dtype']}: {_gb(found['weights'])}"]
    if "decode" not in found:
        return [*lines, "  no decoder"]
    plan = found["decode"]
    video = ", ".join(f"{frames} frames {_gib(count)}" for frames, count in found["video_bytes"].items())
    return [
        *lines,
        f"  decode of any length: {_gib(plan['working_bytes'])}, caches on {plan['caches_on']}, pieces of "
        f"{plan['working_set'] / 2**20:.0f} MiB; at least {_gib(plan['least_bytes'])}",
        f"  the video itself: {video}",
    ]


def _t5(found: dict[str, Any]) -> list[str]:
    return [
        f"  weights in {found['dtype']}: {_gb(found['weights'])}, in fp32 {_gb(found['weights_fp32'])}; once per prompt"
    ]


def _tiny_vae(found: dict[str, Any]) -> list[str]:
    return [f"  weights in {found['dtype']}: {_gb(found['weights'])}; for previews"]


def _gb(count: int) -> str:
    return f"{count / GB:.2f} GB" if count > GB / 10 else f"{count / MB:.1f} MB"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


SECTIONS = {
    "versions": _versions,
    "system": _one("system"),
    "driver": _one("driver"),
    "devices": _devices,
    "kernels": _chosen("kernels"),
    "convolutions": _chosen("convolutions"),
    "networks": _checked("networks in bf16, compared with plain float32 on the CPU"),
    "attention": _checked("attention in bf16, compared with float64"),
    "products": _checked("layers with quantised weights, compared with float64"),
}
"""How each probe of the report is formatted."""
CHECKED = ("networks", "attention", "products")
"""Probes that consist of several checks."""
PARTS = {"transformer": _transformer, "vae": _vae, "t5": _t5, "tiny_vae": _tiny_vae}
