"""Templates as the server's prompts and as the editor's graphs; node definitions come from a server's /object_info."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from migrate.downloads import downloads

from .layout import RESULT, VIEWER, Box, columns, place
from .notes import files_note, task_note
from .source import YOUR_FILES, Link, Node, Nodes, Subgraph, Template

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
PACK, VERSION = "mochi-nodes", "0.1.0"
NAMESPACE = uuid.UUID("6b1d3a52-6c0b-4d4b-9f0e-5e1f5a0d7c11")
INSIDE, OUTSIDE = -10, -20
"""Ids of the nodes that stand for a subgraph's inputs and outputs."""
FIRST_NOTE = 101
"""Id of the first note, above any node's: the default renderer reuses a text's width for the same id in other subgraphs."""
AUTOGROW = "COMFY_AUTOGROW_V3"
SEEDS = ("seed", "noise_seed")
# Widgets whose own name says little by itself, in App mode: they get their node's title, or another name.
TITLED = {"LoadVideo": "file", "LoadImage": "image", "PrimitiveStringMultiline": "value", "CLIPTextEncode": "text"}
NAMED = {"EmptyMochiLatentVideo": {"length": "frames"}, "RandomNoise": {"noise_seed": "seed"}}
# Extra height of nodes: for a file's preview, for a forecast of one more line than fits anyway, or for taller widgets.
BELOW = {
    **{RESULT: VIEWER, "LoadVideo": 230, "LoadImage": 230},
    **dict.fromkeys(("Mochi1Sampler", "Mochi1Edit", "Mochi1T5Encode", "ContextWindowsManual"), 24),
}

Json = dict[str, Any]


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


def to_api(template: Template, definitions: Json) -> Json:
    """The form that the server runs: {id: {class_type, inputs, _meta}}, every input written out."""
    ids = _ids(template.nodes)
    return {
        str(ids[name]): {
            "class_type": node.type,
            "inputs": {
                key: [str(ids[value.node]), value.slot] if isinstance(value, Link) else value
                for key, value in _inputs(node, definitions[node.type]).items()
            },
            "_meta": {"title": _title(node, definitions)},
        }
        for name, node in template.nodes.items()
    }


def to_editor(template: Template, definitions: Json) -> Json:
    """The form that the editor opens (its format 0.4)."""
    files = files_note(template)
    graph = Graph(
        template.nodes,
        _ids(template.nodes),
        definitions,
        template.after_run,
        notes=(task_note(template), *([files] if files else [])),
    )
    inside = []
    if template.subgraph:
        graph, shown = _outer(graph, template.subgraph), _inner(graph, template.subgraph)
        inside = [shown]
    return _workflow(template.name, graph, inside) | {"extra": {"linearData": _app(graph)}}


def to_blueprint(template: Template, definitions: Json) -> Json:
    """A subgraph that the editor lists among the nodes: a workflow of one node."""
    assert template.subgraph
    whole = Graph(template.nodes, _ids(template.nodes), definitions, template.after_run)
    outer, inside = _outer(whole, template.subgraph), _inner(whole, template.subgraph)
    alone = {"subgraph": replace(outer.nodes["subgraph"], inputs=_values_only(outer.nodes["subgraph"].inputs))}
    return _workflow(template.subgraph.name, replace(outer, nodes=alone, notes=()), [inside])


def _workflow(name: str, graph: Graph, subgraphs: list[Json]) -> Json:
    records, shown, groups = _shown(graph)
    last = max([*(node["id"] for node in shown), *(node["id"] for part in subgraphs for node in part["nodes"])])
    return {
        "id": str(uuid.uuid5(NAMESPACE, name)),
        "revision": 0,
        "last_node_id": last,
        "last_link_id": max([len(records), *(part["state"]["lastLinkId"] for part in subgraphs)]),
        "nodes": shown,
        "links": [list(record) for record in records],
        "groups": groups,
        **({"definitions": {"subgraphs": subgraphs}} if subgraphs else {}),
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _outer(graph: Graph, subgraph: Subgraph) -> Graph:
    """The graph with one node in place of those in the subgraph."""
    kind = str(uuid.uuid5(NAMESPACE, subgraph.name))
    outputs = _outputs(graph, subgraph)
    inputs = {
        port.name: graph.nodes[port.node].inputs.get(port.input, _default(_spec(graph, port.node, port.input)))
        for port in subgraph.ports
    }
    definition = {
        "display_name": subgraph.name,
        "input": {"required": {port.name: _port_spec(graph, port.node, port.input) for port in subgraph.ports}},
        "input_order": {"required": [port.name for port in subgraph.ports]},
        "output": [kind for _, kind in outputs],
        "output_name": [kind for _, kind in outputs],
        "labels": {port.name: port.label for port in subgraph.ports if port.label},
    }
    nodes: Nodes = {}
    for name in (name for name in graph.nodes if name in subgraph.outside):
        node = graph.nodes[name]
        moved = {
            key: Link("subgraph", [link for link, _ in outputs].index(value))
            if isinstance(value, Link) and value.node not in subgraph.outside
            else value
            for key, value in node.inputs.items()
        }
        nodes[name] = replace(node, inputs=moved)
    nodes = {name: node for name, node in nodes.items() if name != "save"} | {
        "subgraph": Node(kind, inputs),
        "save": nodes["save"],
    }
    ids = graph.ids | {"subgraph": len(graph.ids) + 1}
    return replace(graph, nodes=nodes, ids=ids, definitions=graph.definitions | {kind: definition})


def _inner(graph: Graph, subgraph: Subgraph) -> Json:
    """The definition of a subgraph."""
    inside = {name: node for name, node in graph.nodes.items() if name not in subgraph.outside}
    ports = {(port.node, port.input): slot for slot, port in enumerate(subgraph.ports)}
    part = replace(graph, nodes=inside, ports=ports, notes=())
    records, nodes, groups = _shown(part)
    outputs = _outputs(graph, subgraph)
    outward = [
        Record(len(records) + 1 + slot, graph.ids[link.node], link.slot, OUTSIDE, slot, kind)
        for slot, (link, kind) in enumerate(outputs)
    ]
    for record in outward:
        (origin,) = (node for node in nodes if node["id"] == record.origin_id)
        origin["outputs"][record.origin_slot]["links"].append(record.id)
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    inlet = 28 + 6 * max(len(port.label or port.name) for port in subgraph.ports)
    return {
        "id": str(uuid.uuid5(NAMESPACE, subgraph.name)),
        "version": 1,
        "state": {
            "lastGroupId": len(groups),
            "lastNodeId": max(node["id"] for node in nodes),
            "lastLinkId": len(records) + len(outward),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": subgraph.name,
        "inputNode": {"id": INSIDE, "bounding": [-30 - inlet, 0, inlet, 40 + 20 * len(ports)]},
        "outputNode": {"id": OUTSIDE, "bounding": [right + 80, 0, 120, 60]},
        "inputs": [
            {
                "id": str(uuid.uuid5(NAMESPACE, f"{subgraph.name} {port.name}")),
                "name": port.name,
                "type": _spec(graph, port.node, port.input)[0],
                "linkIds": [record.id for record in records if record[1:3] == (INSIDE, slot)],
                **({"label": port.label} if port.label else {}),
                "pos": [-30, 20 + 20 * slot],
            }
            for slot, port in enumerate(subgraph.ports)
        ],
        "outputs": [
            {
                "id": str(uuid.uuid5(NAMESPACE, f"{subgraph.name} {kind}")),
                "name": kind,
                "type": kind,
                "linkIds": [outward[slot].id],
                "pos": [right + 100, 20 + 20 * slot],
            }
            for slot, (_, kind) in enumerate(outputs)
        ],
        "widgets": [],
        "nodes": nodes,
        "groups": groups,
        "links": [record._asdict() for record in [*records, *outward]],
        "extra": {},
        "category": subgraph.category,
        "description": subgraph.description,
    }


def _outputs(graph: Graph, subgraph: Subgraph) -> list[tuple[Link, str]]:
    """Outputs of nodes inside that nodes outside use, with their types."""
    taken = [
        value
        for name in subgraph.outside
        for value in graph.nodes[name].inputs.values()
        if isinstance(value, Link) and value.node not in subgraph.outside
    ]
    return [
        (link, graph.definitions[graph.nodes[link.node].type]["output"][link.slot]) for link in dict.fromkeys(taken)
    ]


def _values_only(inputs: Json) -> Json:
    return {key: value for key, value in inputs.items() if not isinstance(value, Link)}


def _shown(graph: Graph) -> tuple[list[Record], list[Json], list[Json]]:
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


def _app(graph: Graph) -> Json:
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
    specs = _specs(node, graph.definitions[node.type])
    return (
        key in specs
        and _is_widget(specs[key])
        and not isinstance(node.inputs.get(key), Link)
        and not node.title.startswith("Negative")
        and node.type != "ImageFromBatch"
    )


def _ids(nodes: Nodes) -> dict[str, int]:
    return {name: number for number, name in enumerate(nodes, 1)}


def _title(node: Node, definitions: Json) -> str:
    return node.title or definitions[node.type]["display_name"] or node.type


def _specs(node: Node, definition: Json) -> dict[str, list]:
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


def _spec(graph: Graph, name: str, key: str) -> list:
    node = graph.nodes[name]
    return _specs(node, graph.definitions[node.type])[key]


def _port_spec(graph: Graph, name: str, key: str) -> list:
    """An input's spec on the subgraph's node, where a seed has no second widget."""
    kind, *options = _spec(graph, name, key)
    return [kind, *({k: v for k, v in option.items() if k != "control_after_generate"} for option in options)]


def _kind(spec: list) -> str:
    """The type of an input; older nodes list their choices in its place."""
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def _is_widget(spec: list) -> bool:
    return _kind(spec) in WIDGETS


def _default(spec: list) -> Any:
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    if spec[0] == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    return choices[0] if choices else None


def _inputs(node: Node, definition: Json) -> Json:
    """Values and links of all inputs that have one, in the node's order."""
    specs = _specs(node, definition)
    unknown = node.inputs.keys() - specs.keys()
    if unknown:
        raise ValueError(f"{node.type} has no input {', '.join(sorted(unknown))}.")
    return {
        key: node.inputs[key] if key in node.inputs else _default(spec)
        for key, spec in specs.items()
        if key in node.inputs or _is_widget(spec)
    }


def _records(graph: Graph) -> Iterator[Record]:
    number = 0
    for name, node in graph.nodes.items():
        for slot, key in enumerate(_sockets(graph, name)):
            value = node.inputs.get(key)
            if (name, key) in graph.ports:
                origin = (INSIDE, graph.ports[name, key], _spec(graph, name, key)[0])
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
        for key, spec in _specs(node, graph.definitions[node.type]).items()
        if name == "subgraph"
        or (name, key) in graph.ports
        or key in _labels(node)
        or not _is_widget(spec)
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
        spec = _specs(node, definition)[key]
        widget = {"widget": {"name": key}} if _is_widget(spec) else {}
        label = {"label": labels[key]} if key in labels else {}
        sockets.append({**label, "name": key, "type": _kind(spec), "link": into.get(slot), **widget})
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
        "title": _title(node, graph.definitions),
        "properties": _properties(node, "subgraph" if name == "subgraph" else node.type),
        "widgets_values": list(_widget_values(node, definition, graph.after_run)),
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


def _widget_values(node: Node, definition: Json, after_run: str) -> Iterator[Any]:
    """Values by position. A linked widget keeps its default, and a seed is followed by its control_after_generate."""
    for key, spec in _specs(node, definition).items():
        if _is_widget(spec):
            value = node.inputs.get(key, _default(spec))
            yield _default(spec) if isinstance(value, Link) else "" if value in YOUR_FILES else value
            if len(spec) > 1 and spec[1].get("control_after_generate"):
                yield after_run


def _height(node: Node, definition: Json) -> int:
    specs = _specs(node, definition)
    rows = max(sum(not _is_widget(spec) for spec in specs.values()), len(definition["output"]))
    rows += sum(_is_widget(spec) for spec in specs.values())
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
