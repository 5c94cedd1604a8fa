"""Old workflows with our nodes in their place: those of the wrapper pack and, if asked for, of ComfyUI's built-in Mochi."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from . import api, editor
from .graph import Node, Nodes, convert, named_values, passes_on, source
from .tables import STOCK, WRAPPER, Rule

STOCK_HINT = "The nodes for ComfyUI's built-in Mochi stay as they are, and work; --stock puts ours in their place."
LOADER_FILES = {"UNETLoader": "unet_name", "VAELoader": "vae_name"}
LOADED_INPUTS = {"CLIPTextEncode": "clip", "VAEDecode": "vae", "VAEDecodeTiled": "vae"}


@dataclass(frozen=True)
class Migration:
    """A workflow in the form it had, and one sentence for each thing that is not as it was."""

    workflow: dict[str, Any]
    notes: list[str]


def migrate(workflow: Any, *, stock: bool = False) -> Migration:
    """Convert a workflow in the editor's or the API form; the one that is given stays as it is.

    Raises:
        ValueError: it is no workflow, or has nothing to convert.
    """
    workflow = deepcopy(workflow)
    if api.is_prompt(workflow):
        nodes = api.read(workflow)
        notes = _convert([nodes], (str(number) for number in _ids_above(nodes)), stock)
        return Migration(api.write(nodes), notes)
    if not editor.is_workflow(workflow):
        raise ValueError("This is no workflow of ComfyUI, neither in the editor's form nor in API form.")
    graphs = editor.graphs(workflow)
    every = [editor.read(graph) for graph in graphs]
    notes = _convert(every, _ids_above(chain(*every)), stock)
    for graph, nodes in zip(graphs, every, strict=True):
        editor.write(graph, nodes)
    return Migration(workflow, notes)


def _ids_above(ids: Iterable[Any]) -> Iterator[int]:
    return count(1 + max((int(key) for key in ids if str(key).isdecimal()), default=0))


def _convert(graphs: list[Nodes], ids: Iterator[Any], stock: bool) -> list[str]:
    rules = [_wrapper_rules(nodes) for nodes in graphs]
    hint = []
    if any(map(_has_stock_mochi, graphs)):
        if stock:
            rules = [{**found, **_stock_rules(nodes)} for found, nodes in zip(rules, graphs, strict=True)]
        else:
            hint = [STOCK_HINT]
    if not any(rules) and not any(map(passes_on, graphs)):
        sought = "MochiWrapper, or of ComfyUI for Mochi," if stock else "MochiWrapper"
        raise ValueError(" ".join([f"There is no node of {sought} in this workflow.", *hint]))
    notes = [convert(nodes, found, lambda: next(ids)) for nodes, found in zip(graphs, rules, strict=True)]
    return [*chain(*notes), *hint]


def _wrapper_rules(nodes: Nodes) -> dict[Any, Rule]:
    return {key: WRAPPER[node.type] for key, node in nodes.items() if node.type in WRAPPER}


def _has_stock_mochi(nodes: Nodes) -> bool:
    return any(
        node.type == "EmptyMochiLatentVideo" or (node.type == "UNETLoader" and _names_mochi(node))
        for node in nodes.values()
    )


def _names_mochi(node: Node) -> bool:
    file = named_values(node, tuple(STOCK[node.type].widgets)).get(LOADER_FILES[node.type])
    return "mochi" in str(file).lower()


def _stock_rules(nodes: Nodes) -> dict[Any, Rule]:
    """The loaders whose files say mochi, or that are the only ones; and what is linked to them."""
    loaders = {key for key, node in nodes.items() if _loads_mochi(node, nodes)}
    users = {key: node for key, node in nodes.items() if node.type in LOADED_INPUTS}
    links = {key: source(nodes, node.links.get(LOADED_INPUTS[node.type])) for key, node in users.items()}
    chosen = loaders | {key for key, link in links.items() if link and link.origin in loaders}
    return {key: STOCK[node.type] for key, node in nodes.items() if key in chosen}


def _loads_mochi(node: Node, nodes: Nodes) -> bool:
    if node.type == "CLIPLoader":
        return "mochi" in named_values(node, tuple(STOCK["CLIPLoader"].widgets)).values()
    alone = sum(other.type == node.type for other in nodes.values()) == 1
    return node.type in LOADER_FILES and (alone or _names_mochi(node))
