"""A part of a graph as a subgraph: the graph around it, and its definition."""

from __future__ import annotations

import uuid
from dataclasses import replace

from .editor import INSIDE, OUTSIDE, Graph, Record, drawn, spec_of
from .source import Link, Node, Nodes, Subgraph
from .specs import Json, default

NAMESPACE = uuid.UUID("6b1d3a52-6c0b-4d4b-9f0e-5e1f5a0d7c11")


def graph_around(graph: Graph, subgraph: Subgraph) -> Graph:
    """The graph with one node in place of those in the subgraph."""
    kind = str(uuid.uuid5(NAMESPACE, subgraph.name))
    outputs = _outputs(graph, subgraph)
    inputs = {
        port.name: graph.nodes[port.node].inputs.get(port.input, default(spec_of(graph, port.node, port.input)))
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


def definition_of(graph: Graph, subgraph: Subgraph) -> Json:
    """The definition of a subgraph."""
    inside = {name: node for name, node in graph.nodes.items() if name not in subgraph.outside}
    ports = {(port.node, port.input): slot for slot, port in enumerate(subgraph.ports)}
    part = replace(graph, nodes=inside, ports=ports, notes=())
    records, nodes, groups = drawn(part)
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
        "inputs": [_input(graph, subgraph, slot, records) for slot in range(len(subgraph.ports))],
        "outputs": [_output(subgraph, record, right) for record in outward],
        "widgets": [],
        "nodes": nodes,
        "groups": groups,
        "links": [record._asdict() for record in [*records, *outward]],
        "extra": {},
        "category": subgraph.category,
        "description": subgraph.description,
    }


def _input(graph: Graph, subgraph: Subgraph, slot: int, records: list[Record]) -> Json:
    port = subgraph.ports[slot]
    return {
        "id": str(uuid.uuid5(NAMESPACE, f"{subgraph.name} {port.name}")),
        "name": port.name,
        "type": spec_of(graph, port.node, port.input)[0],
        "linkIds": [record.id for record in records if record[1:3] == (INSIDE, slot)],
        **({"label": port.label} if port.label else {}),
        "pos": [-30, 20 + 20 * slot],
    }


def _output(subgraph: Subgraph, record: Record, right: float) -> Json:
    return {
        "id": str(uuid.uuid5(NAMESPACE, f"{subgraph.name} {record.type}")),
        "name": record.type,
        "type": record.type,
        "linkIds": [record.id],
        "pos": [right + 100, 20 + 20 * record.target_slot],
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


def _port_spec(graph: Graph, name: str, key: str) -> list:
    """An input's spec on the subgraph's node, where a seed has no second widget."""
    kind, *options = spec_of(graph, name, key)
    return [kind, *({k: v for k, v in option.items() if k != "control_after_generate"} for option in options)]
