"""Nodes, links, notes and groups as the editor saves them (its format 0.4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from migrate.downloads import downloads

from .layout import RESULT, VIEWER, Box, columns, place
from .source import Link, Node, Nodes
from .specs import Json, input_specs, is_widget, kind_of, title_of, widget_values

PACK, VERSION = "mochi-nodes", "0.1.0"
INSIDE, OUTSIDE = -10, -20
"""Ids of the nodes that stand for a subgraph's inputs and outputs."""
FIRST_NOTE = 101
"""Id of the first note, above any node's: the default renderer reuses a text's width for the same id in other subgraphs."""
SEEDS = ("seed", "noise_seed")
# Widgets whose own name says little by itself, in App mode: they get their node's title, or another name.
TITLED = {"LoadVideo": "file", "LoadImage": "image", "PrimitiveStringMultiline": "value", "CLIPTextEncode": "text"}
NAMED = {"EmptyMochiLatentVideo": {"length": "frames"}, "RandomNoise": {"noise_seed": "seed"}}
# Extra height of nodes: for a file's preview, for a forecast of one more line than fits anyway, or for taller widgets.
BELOW = {
    **{RESULT: VIEWER, "LoadVideo": 230, "LoadImage": 230},
    **dict.fromkeys(("Mochi1Sampler", "Mochi1Edit", "Mochi1T5Encode", "ContextWindowsManual"), 24),
}


class Record(NamedTuple):
    """A link, with its fields in the editor's order."""

    id: int
    origin_id: int
    origin_slot: int
    target_id: int
    target_slot: int
    type: str


@dataclass(frozen=True)
class Graph:
    """Nodes that are shown together: all of a template's, or those inside or outside its subgraph."""

    nodes: Nodes
    ids: dict[str, int]
    definitions: Json
    after_run: str
    ports: dict[tuple[str, str], int] = field(default_factory=dict)
    """Slots of the subgraph's inputs by (node, input)."""
    notes: tuple[str, ...] = ()


def numbered(nodes: Nodes) -> dict[str, int]:
    return {name: number for number, name in enumerate(nodes, 1)}


def drawn(graph: Graph) -> tuple[list[Record], list[Json], list[Json]]:
    """Links, nodes (notes last) and groups of a graph."""
    records = list(_records(graph))
    heights = {name: _height(node, graph.definitions[node.type]) for name, node in graph.nodes.items()}
    boxes, note_boxes, groups = place(graph.nodes, heights, graph.notes)
    nodes = [
        _editor_node(graph, name, order, boxes[name], records) for order, name in enumerate(_in_order(graph.nodes))
    ]
    notes = [
        _note(text, FIRST_NOTE + number, len(nodes) + number, box)
        for number, (text, box) in enumerate(zip(graph.notes, note_boxes, strict=True))
    ]
    return records, [*nodes, *notes], groups


def _in_order(nodes: Nodes) -> list[str]:
    """Names by column, which is also a valid order of execution."""
    return [name for column in columns(nodes) for name in column]


def app(graph: Graph) -> Json:
    """The contents of the editor's App mode: the video to start from, prompt, length, seed, and the result."""
    inputs = [
        [graph.ids[name], key]
        for keys in (
            ("file", "image"),
            ("source_prompt",),
            ("prompt", "text", "value"),
            ("seconds", "num_frames", "length"),
            SEEDS,
        )
        for name, node in graph.nodes.items()
        for key in keys
        if _is_shown_in_app(graph, node, key)
    ]
    return {"inputs": inputs, "outputs": [graph.ids["save"]]}


def _is_shown_in_app(graph: Graph, node: Node, key: str) -> bool:
    specs = input_specs(node, graph.definitions[node.type])
    return (
        key in specs
        and is_widget(specs[key])
        and not isinstance(node.inputs.get(key), Link)
        and not node.title.startswith("Negative")
        and node.type != "ImageFromBatch"
    )


def spec_of(graph: Graph, name: str, key: str) -> list:
    node = graph.nodes[name]
    return input_specs(node, graph.definitions[node.type])[key]


def _records(graph: Graph) -> Iterator[Record]:
    number = 0
    for name, node in graph.nodes.items():
        for slot, key in enumerate(_sockets(graph, name)):
            value = node.inputs.get(key)
            if (name, key) in graph.ports:
                origin = (INSIDE, graph.ports[name, key], spec_of(graph, name, key)[0])
            elif isinstance(value, Link):
                kind = graph.definitions[graph.nodes[value.node].type]["output"][value.slot]
                origin = (graph.ids[value.node], value.slot, kind)
            else:
                continue
            number += 1
            yield Record(number, origin[0], origin[1], graph.ids[name], slot, origin[2])


def _sockets(graph: Graph, name: str) -> list[str]:
    """Inputs saved as sockets: non-widgets, linked or renamed widgets, and all inputs of a subgraph's node."""
    node = graph.nodes[name]
    return [
        key
        for key, spec in input_specs(node, graph.definitions[node.type]).items()
        if name == "subgraph"
        or (name, key) in graph.ports
        or key in _labels(node)
        or not is_widget(spec)
        or isinstance(node.inputs.get(key), Link)
    ]


def _labels(node: Node) -> dict[str, str]:
    titled = {TITLED[node.type]: node.title} if node.title and node.type in TITLED else {}
    return titled | NAMED.get(node.type, {})


def _editor_node(graph: Graph, name: str, order: int, box: Box, records: list[Record]) -> Json:
    node, number = graph.nodes[name], graph.ids[name]
    definition = graph.definitions[node.type]
    labels = definition.get("labels", {}) | _labels(node)
    into = {record.target_slot: record.id for record in records if record.target_id == number}
    sockets = []
    for slot, key in enumerate(_sockets(graph, name)):
        spec = input_specs(node, definition)[key]
        widget = {"widget": {"name": key}} if is_widget(spec) else {}
        label = {"label": labels[key]} if key in labels else {}
        sockets.append({**label, "name": key, "type": kind_of(spec), "link": into.get(slot), **widget})
    outputs = [
        {"name": title, "type": kind, "links": [record.id for record in records if record[1:3] == (number, slot)]}
        for slot, (title, kind) in enumerate(zip(definition["output_name"], definition["output"], strict=True))
    ]
    return {
        "id": number,
        "type": node.type,
        "pos": [box.x, box.y],
        "size": [box.width, box.height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": sockets,
        "outputs": outputs,
        "title": title_of(node, graph.definitions),
        "properties": _properties(node, "subgraph" if name == "subgraph" else node.type),
        "widgets_values": list(widget_values(node, definition, graph.after_run)),
    }


def _properties(node: Node, kind: str) -> Json:
    if kind == "subgraph":
        return {"cnr_id": PACK, "ver": VERSION}
    ours = kind.startswith("Mochi1")
    files = downloads(value for value in node.inputs.values() if isinstance(value, str))
    return {
        **({"cnr_id": PACK, "ver": VERSION} if ours else {"cnr_id": "comfy-core"}),
        "Node name for S&R": kind,
        **({"models": files} if files else {}),
    }


def _height(node: Node, definition: Json) -> int:
    specs = input_specs(node, definition)
    rows = max(sum(not is_widget(spec) for spec in specs.values()), len(definition["output"]))
    rows += sum(is_widget(spec) for spec in specs.values())
    text = sum(
        40 if node.title.startswith("Negative") else 110
        for spec in specs.values()
        if len(spec) > 1 and spec[1].get("multiline")
    )
    return 50 + 26 * rows + text + BELOW.get(node.type, 0)


def _note(text: str, number: int, order: int, box: Box) -> Json:
    title, _, body = text.partition("\n")
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [box.x, box.y],
        "size": [box.width, round(box.height)],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": title.removeprefix("# "),
        "properties": {},
        "widgets_values": [body.strip() + "\n"],
    }
