"""Templates as the server's prompts and as the editor's graphs; node definitions come from a server's /object_info."""

from __future__ import annotations

import uuid
from dataclasses import replace

from .editor import Graph, app, drawn, numbered
from .notes import files_note, task_note
from .source import Link, Template
from .specs import Json, inputs_of, title_of
from .subgraphs import NAMESPACE, definition_of, graph_around


def to_api(template: Template, definitions: Json) -> Json:
    """The form that the server runs: {id: {class_type, inputs, _meta}}, every input written out."""
    ids = numbered(template.nodes)
    return {
        str(ids[name]): {
            "class_type": node.type,
            "inputs": {
                key: [str(ids[value.node]), value.slot] if isinstance(value, Link) else value
                for key, value in inputs_of(node, definitions[node.type]).items()
            },
            "_meta": {"title": title_of(node, definitions)},
        }
        for name, node in template.nodes.items()
    }


def to_editor(template: Template, definitions: Json) -> Json:
    """The form that the editor opens (its format 0.4)."""
    files = files_note(template)
    graph = Graph(
        template.nodes,
        numbered(template.nodes),
        definitions,
        template.after_run,
        notes=(task_note(template), *([files] if files else [])),
    )
    inside = []
    if template.subgraph:
        graph, shown = graph_around(graph, template.subgraph), definition_of(graph, template.subgraph)
        inside = [shown]
    return _workflow(template.name, graph, inside) | {"extra": {"linearData": app(graph)}}


def to_blueprint(template: Template, definitions: Json) -> Json:
    """A subgraph that the editor lists among the nodes: a workflow of one node."""
    assert template.subgraph
    whole = Graph(template.nodes, numbered(template.nodes), definitions, template.after_run)
    outer, inside = graph_around(whole, template.subgraph), definition_of(whole, template.subgraph)
    alone = {"subgraph": replace(outer.nodes["subgraph"], inputs=_values_only(outer.nodes["subgraph"].inputs))}
    return _workflow(template.subgraph.name, replace(outer, nodes=alone, notes=()), [inside])


def _workflow(name: str, graph: Graph, subgraphs: list[Json]) -> Json:
    records, shown, groups = drawn(graph)
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


def _values_only(inputs: Json) -> Json:
    return {key: value for key, value in inputs.items() if not isinstance(value, Link)}
