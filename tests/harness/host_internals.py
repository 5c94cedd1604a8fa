"""docs/host_internals.md as data, and what the code in nodes/ uses of ComfyUI, found in its syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "host_internals.md"
NODES = ROOT / "nodes"
HOST = {"comfy", "comfy_aimdo", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server"}


@dataclass(frozen=True)
class Internal:
    """One of ComfyUI's internals: a dotted path, or a string in a module's source."""

    text: str
    """As written on the page."""
    path: str
    files: tuple[str, ...]
    """Files in nodes/ that use it."""
    key: str | None = None
    positional: tuple[str, ...] | None = None
    """Arguments passed in this order; None if the page does not mention arguments."""
    named: tuple[str, ...] = ()

    @property
    def last(self) -> str:
        """The part that appears in the source of the files that use it."""
        return (self.key or self.path.rpartition(".")[2]).removeprefix("{}_")


@dataclass(frozen=True)
class Use:
    """A dotted path in a file, and how it is called there, if at all."""

    path: str
    file: str
    line: int
    positional: int | None = None
    named: tuple[str, ...] = ()


def listed() -> list[Internal]:
    """All entries of the page."""
    rows = (line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `"))
    return [
        _internal(text, tuple(files.split(", "))) for cell, files, _ in rows for text in re.findall(r"`([^`]+)`", cell)
    ]


def _internal(text: str, files: tuple[str, ...]) -> Internal:
    if match := re.fullmatch(r'([\w.]+): "(.+)"', text):
        return Internal(text, match[1], files, key=match[2])
    match = re.fullmatch(r"(.*?\w)(?:\(([^()]*)\))?", text)
    assert match, f"{text}: not understood"
    if match[2] is None:
        return Internal(text, match[1], files)
    arguments = [argument for argument in match[2].split(", ") if argument]
    positional = tuple(argument for argument in arguments if not argument.endswith("="))
    return Internal(text, match[1], files, None, positional, tuple(a[:-1] for a in arguments if a.endswith("=")))


def used() -> list[Use]:
    """Every attribute of ComfyUI's modules that nodes/ uses."""
    return [use for path in sorted(NODES.rglob("*.py")) for use in _uses(path)]


def _uses(path: Path) -> Iterator[Use]:
    tree, file = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(NODES).as_posix()
    names = dict(_imported(tree))
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        dotted = _dotted(node, names) if id(node) not in inner else None
        if dotted is None or not isinstance(node, ast.expr):
            continue
        call = calls.get(id(node))
        if "__name__" in dotted:
            dotted, call = dotted[: dotted.index("__name__") + len("__name__")], None
        if call is None:
            yield Use(dotted, file, node.lineno)
        else:
            named = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
            yield Use(dotted, file, node.lineno, len(call.args), named)


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Names that imports of ComfyUI's modules bind, also inside functions -> what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in HOST:
                    whole = alias.asname or alias.name.split(".")[0]
                    yield whole, alias.name if alias.asname else whole
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in HOST:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value, names)):
        return f"{before}.{node.attr}"
    return None
