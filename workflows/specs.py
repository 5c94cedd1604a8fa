"""Inputs of nodes by their definitions, which come from a server's /object_info."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .source import YOUR_FILES, Link, Node

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
AUTOGROW = "COMFY_AUTOGROW_V3"

Json = dict[str, Any]


def input_specs(node: Node, definition: Json) -> dict[str, list]:
    """Type and options of every input, in the node's order; for a growing list, only the inputs that this node has."""
    specs: dict[str, list] = {}
    for kind in ("required", "optional"):
        for key in definition["input_order"].get(kind, []):
            spec = definition["input"][kind][key]
            if spec[0] == AUTOGROW:
                specs |= {name: ["*", {}] for name in node.inputs if name.startswith(f"{key}.")}
            else:
                specs[key] = spec
    return specs


def kind_of(spec: list) -> str:
    """The type of an input; older nodes list their choices in its place."""
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def is_widget(spec: list) -> bool:
    return kind_of(spec) in WIDGETS


def default(spec: list) -> Any:
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    if spec[0] == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    return choices[0] if choices else None


def inputs_of(node: Node, definition: Json) -> Json:
    """Values and links of all inputs that have one, in the node's order."""
    specs = input_specs(node, definition)
    unknown = node.inputs.keys() - specs.keys()
    if unknown:
        raise ValueError(f"{node.type} has no input {', '.join(sorted(unknown))}.")
    return {
        key: node.inputs[key] if key in node.inputs else default(spec)
        for key, spec in specs.items()
        if key in node.inputs or is_widget(spec)
    }


def title_of(node: Node, definitions: Json) -> str:
    return node.title or definitions[node.type]["display_name"] or node.type


def widget_values(node: Node, definition: Json, after_run: str) -> Iterator[Any]:
    """Values by position. A linked widget keeps its default, and a seed is followed by its control_after_generate."""
    for key, spec in input_specs(node, definition).items():
        if is_widget(spec):
            value = node.inputs.get(key, default(spec))
            yield default(spec) if isinstance(value, Link) else "" if value in YOUR_FILES else value
            if len(spec) > 1 and spec[1].get("control_after_generate"):
                yield after_run
