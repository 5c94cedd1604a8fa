"""Workflows in API form: {id: {"class_type", "inputs"}}, where an input that is a link is [id, output]."""

from __future__ import annotations

from typing import Any, TypeGuard

from .graph import Link, Node, Nodes
from .our_nodes import AFTER_SEED

Prompt = dict[str, Any]
"""{id: node}; the values in a file may be anything, see `is_node`."""


def is_prompt(workflow: object) -> TypeGuard[Prompt]:
    """Whether this is a workflow in API form: at least one of its values is a node."""
    return isinstance(workflow, dict) and any(map(is_node, workflow.values()))


def is_node(raw: object) -> TypeGuard[dict[str, Any]]:
    """Whether a value of a prompt has the fields of a node."""
    return isinstance(raw, dict) and isinstance(raw.get("class_type"), str) and isinstance(raw.get("inputs"), dict)


def read(prompt: Prompt) -> Nodes:
    """The nodes by id; values of the prompt that are not nodes are left out."""
    return {name: _node(name, raw) for name, raw in prompt.items() if is_node(raw)}


def _node(name: str, raw: dict[str, Any]) -> Node:
    links = {key: Link(*value) for key, value in raw["inputs"].items() if is_link(value)}
    meta = raw.get("_meta")
    title = (meta.get("title") if isinstance(meta, dict) else None) or raw["class_type"]
    return Node(name, raw["class_type"], dict(raw["inputs"]), links, raw, f"{title} (node {name})")


def is_link(value: object) -> TypeGuard[list[Any]]:
    """Whether an input's value is a link, [id, output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def write(prompt: Prompt, nodes: Nodes) -> Prompt:
    """The prompt with its nodes replaced by `nodes`; other values and the order stay."""
    kept = {name: raw for name, raw in prompt.items() if name in nodes or not is_node(raw)}
    return kept | {str(name): _written(node) for name, node in nodes.items()}


def _written(node: Node) -> dict[str, Any]:
    kind = node.raw["class_type"] if node.was is None else node.type
    return {**node.raw, "class_type": kind, "inputs": _inputs(node)}


def _inputs(node: Node) -> dict[str, object]:
    """Values and links in the node's original order."""
    links = {name: [link.origin, link.slot] for name, link in node.links.items()}
    values = {name: value for name, value in node.by_name().items() if not is_link(value)}
    if node.was is not None:
        values.pop(AFTER_SEED, None)
    kept = {name: (values | links)[name] for name in node.by_name() if name in values or name in links}
    return kept | links
