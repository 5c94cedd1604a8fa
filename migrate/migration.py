"""Convert a workflow: nodes of MochiWrapper and MochiEdit, and on request those of ComfyUI's built-in Mochi, become ours."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from . import api, editor
from .graph import NodeId, Nodes, Rules, convert, passes_on
from .stock import LATENT, has_mochi, stock_rules
from .tables import REMOVED, WRAPPER

STOCK_HINT = "The nodes for ComfyUI's built-in Mochi stay as they are, and work; --stock puts ours in their place."


@dataclass(frozen=True)
class Migration:
    """The result of a conversion."""

    workflow: dict[str, Any]
    """In its original form."""
    notes: list[str]
    """One sentence for each change."""


def migrate(workflow: object, *, stock: bool = False) -> Migration:
    """Convert a workflow in the editor's or the API form; the given one is not changed.

    Args:
        workflow: as returned by `json.loads`.
        stock: also replace ComfyUI's own nodes in graphs for its built-in Mochi.

    Raises:
        ValueError: not a workflow, or nothing to convert.
    """
    try:
        workflow = deepcopy(workflow)
    except RecursionError:
        raise ValueError("This is not a ComfyUI workflow: it is nested too deeply.") from None
    if api.is_prompt(workflow):
        return migrate_prompt(workflow, stock=stock)
    if not editor.is_workflow(workflow):
        raise ValueError("This is not a ComfyUI workflow, neither in the editor's form nor in API form.")
    graphs = editor.graphs(workflow)
    every = [editor.read(graph) for graph in graphs]
    notes = _convert(every, _ids_above(chain(*every)), stock, _group_hint(workflow, stock))
    for graph, nodes in zip(graphs, every, strict=True):
        editor.write(graph, nodes)
    return Migration(workflow, notes)


def migrate_prompt(prompt: api.Prompt, *, stock: bool = False, runs: Collection[str] = ()) -> Migration:
    """Convert a workflow in API form, without copying what stays.

    Args:
        runs: node types that the server has: old nodes of these types stay as they are.

    Raises:
        ValueError: there is nothing to convert.
    """
    nodes = api.read(prompt)
    for node in nodes.values():
        if node.type in runs and (node.type in WRAPPER or node.type in REMOVED):
            node.type = ""  # no rule matches it
    notes = _convert([nodes], map(str, _ids_above(prompt)), stock, [])
    return Migration(api.write(prompt, nodes), notes)


def _group_hint(workflow: editor.Json, stock: bool) -> list[str]:
    """A sentence about group nodes that contain old nodes, if there are any."""
    old = {*WRAPPER, LATENT} if stock else WRAPPER.keys()
    names = [name for name, types in editor.group_nodes(workflow).items() if types & old]
    hint = f"Group nodes are not looked into; ungroup those with old nodes first: {', '.join(names)}."
    return [hint] if names else []


def _ids_above(ids: Iterable[NodeId]) -> Iterator[int]:
    """Ids for new nodes, above all numeric ones."""
    return count(1 + max((int(key) for key in ids if str(key).isdecimal()), default=0))


def _convert(graphs: list[Nodes], ids: Iterator[NodeId], stock: bool, hints: list[str]) -> list[str]:
    """Convert all graphs of a workflow; returns notes. `hints` are always included, even in the error."""
    rules = [_wrapper_rules(nodes) for nodes in graphs]
    if any(map(has_mochi, graphs)):
        if stock:
            found, left = zip(*map(stock_rules, graphs), strict=True)
            rules = [{**ours, **more} for ours, more in zip(rules, found, strict=True)]
            hints = [*chain(*left), *hints]
        else:
            hints = [*hints, STOCK_HINT]
    if not any(rules) and not any(map(passes_on, graphs)):
        sought = "MochiWrapper, or of ComfyUI for Mochi," if stock else "MochiWrapper"
        raise ValueError(" ".join([f"There is no node of {sought} in this workflow.", *hints]))
    notes = [convert(nodes, found, lambda: next(ids)) for nodes, found in zip(graphs, rules, strict=True)]
    return [*chain(*notes), *hints]


def _wrapper_rules(nodes: Nodes) -> Rules:
    return {key: WRAPPER[node.type] for key, node in nodes.items() if node.type in WRAPPER}
