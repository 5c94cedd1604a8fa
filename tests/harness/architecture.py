"""The picture of the layers in docs/architecture.md, drawn from the imports and docstrings of the code.

    python -m tests.harness.architecture      # redraws it; needs only Python

A room is a module or package directly inside mochi_core, or migrate, nodes/bridge or the rest of nodes; a layer is the rooms that
only import from rooms in the layers below.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by python -m tests.harness.architecture -->\n", "<!-- end of the drawing -->\n"
HOUSES = ("mochi_core", "migrate", "nodes")
Graph = dict[str, set[str]]


def imports(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(dots, module, names) of every import in a file, at any level."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def module_graph(*packages: str) -> Graph:
    """{module: our modules that it imports, lazily or not} for all modules in these folders."""
    paths = {dotted(path): path for package in packages for path in (ROOT / package).rglob("*.py")}
    graph: Graph = {}
    for module, path in paths.items():
        here = list(path.relative_to(ROOT).parent.parts)
        graph[module] = set()
        for dots, target, names in imports(path):
            if dots:
                base = ".".join([*here[: len(here) + 1 - dots], *filter(None, target.split("."))])
                graph[module] |= {f"{base}.{name}" if f"{base}.{name}" in paths else base for name in names}
    return graph


def dotted(path: Path) -> str:
    """The module's name: mochi_core.lora for mochi_core/lora/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_graph() -> Graph:
    """{room: the other rooms that it imports}."""
    graph: Graph = {}
    for module, targets in module_graph(*HOUSES).items():
        graph.setdefault(room(module), set()).update(room(target) for target in targets)
    return {name: targets - {name} for name, targets in graph.items()}


def room(module: str) -> str:
    """`mochi_core.lora` for mochi_core.lora.files; migrate is one room, nodes is two: the bridge and the rest."""
    house, *inside = module.split(".")
    if house == "mochi_core":
        return ".".join([house, *inside[:1]])
    return "nodes.bridge" if inside[:1] == ["bridge"] else house


def layers(graph: Graph) -> list[list[str]]:
    """Rooms from the bottom up; each layer only needs those below it."""
    placed: list[list[str]] = []
    while rest := set(graph) - {name for layer in placed for name in layer}:
        placed.append(sorted(name for name in rest if not graph[name] & rest))
        assert placed[-1], f"a circle of imports in {sorted(rest)}"
    return placed


def direct(graph: Graph) -> Iterator[tuple[str, str]]:
    """The arrows to draw: imports not implied by others."""
    for name in sorted(graph):
        implied = {further for target in graph[name] for further in reachable(graph, target)}
        yield from ((name, target) for target in sorted(graph[name] - implied))


def reachable(graph: Graph, name: str) -> set[str]:
    """Everything that a room imports, directly or indirectly."""
    return graph[name].union(*(reachable(graph, target) for target in graph[name]))


def drawing() -> str:
    """A Mermaid diagram of the rooms, and a table of their docstrings."""
    graph = room_graph()
    arrows = [f"    {name} --> {target}" for name, target in direct(graph)]
    rows = [
        f"| {number} | `{name}` | {summary(name)} |"
        for number, layer in reversed(list(enumerate(layers(graph))))
        for name in layer
    ]
    picture = ["```mermaid", "graph TD", *arrows, "```"]
    return "\n".join(["", *picture, "", "| layer | room | |", "|---|---|---|", *rows, "", ""])


def summary(name: str) -> str:
    """The first sentence of a room's docstring."""
    path = ROOT.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].removesuffix(".").replace("|", "\\|")


def page() -> str:
    """The text of docs/architecture.md with the drawing replaced."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + drawing() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
