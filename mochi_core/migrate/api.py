"""The API form: {id: {"class_type", "inputs"}}, where a link is [id, output] among the inputs."""

from __future__ import annotations

from typing import Any

from .graph import Link, Node, Nodes
from .tables import AFTER_SEED

Prompt = dict[str, dict[str, Any]]


def is_prompt(workflow: Any) -> bool:
    return isinstance(workflow, dict) and bool(workflow) and all(map(_is_node, workflow.values()))


def _is_node(raw: Any) -> bool:
    if not isinstance(raw, dict) or not isinstance(raw.get("_meta") or {}, dict):
        return False
    return isinstance(raw.get("class_type"), str) and isinstance(raw.get("inputs"), dict)


def read(prompt: Prompt) -> Nodes:
    return {name: _node(name, raw) for name, raw in prompt.items()}


def _node(name: str, raw: dict[str, Any]) -> Node:
    links = {key: Link(*value) for key, value in raw["inputs"].items() if is_link(value)}
    title = (raw.get("_meta") or {}).get("title") or raw["class_type"]
    return Node(name, raw["class_type"], raw["inputs"], links, raw, f"{title} (node {name})")


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def write(nodes: Nodes) -> Prompt:
    return {name: {**node.raw, "class_type": node.type, "inputs": _inputs(node)} for name, node in nodes.items()}


def _inputs(node: Node) -> dict[str, Any]:
    links = {name: [link.origin, link.slot] for name, link in node.links.items()}
    values = {name: value for name, value in dict(node.values).items() if not is_link(value) and name != AFTER_SEED}
    kept = {name: (values | links)[name] for name in dict(node.values) if name in values or name in links}
    return kept | links
