"""The API form: {id: {"class_type", "inputs"}}, where a link is [id, output] among the inputs."""

from __future__ import annotations

from typing import Any

from .graph import Link, Node, Nodes
from .tables import AFTER_SEED

Prompt = dict[str, dict[str, Any]]


def is_prompt(workflow: Any) -> bool:
    return isinstance(workflow, dict) and any(map(_is_node, workflow.values()))


def _is_node(raw: Any) -> bool:
    return isinstance(raw, dict) and isinstance(raw.get("class_type"), str) and isinstance(raw.get("inputs"), dict)


def read(prompt: Prompt) -> Nodes:
    """The nodes by id, without those that are none."""
    return {name: _node(name, raw) for name, raw in prompt.items() if _is_node(raw)}


def _node(name: str, raw: dict[str, Any]) -> Node:
    links = {key: Link(*value) for key, value in raw["inputs"].items() if is_link(value)}
    meta = raw.get("_meta")
    title = (meta.get("title") if isinstance(meta, dict) else None) or raw["class_type"]
    return Node(name, raw["class_type"], dict(raw["inputs"]), links, raw, f"{title} (node {name})")


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def write(prompt: Prompt, nodes: Nodes) -> Prompt:
    """The prompt with its nodes as they are now; what is no node stays."""
    kept = {name: raw for name, raw in prompt.items() if name in nodes or not _is_node(raw)}
    return kept | {name: _written(node) for name, node in nodes.items()}


def _written(node: Node) -> dict[str, Any]:
    kind = node.raw["class_type"] if node.was is None else node.type
    return {**node.raw, "class_type": kind, "inputs": _inputs(node)}


def _inputs(node: Node) -> dict[str, Any]:
    links = {name: [link.origin, link.slot] for name, link in node.links.items()}
    values = {name: value for name, value in dict(node.values).items() if not is_link(value)}
    if node.was is not None:
        values.pop(AFTER_SEED, None)
    kept = {name: (values | links)[name] for name in dict(node.values) if name in values or name in links}
    return kept | links
