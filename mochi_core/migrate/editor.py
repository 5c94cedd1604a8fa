"""The editor's form: a graph, or a subgraph, of nodes with values by position, and a list of links with numbers."""

from __future__ import annotations

from typing import Any

from .graph import Link, Node, Nodes
from .tables import MODEL_TYPES, NEW_NODES

Graph = dict[str, Any]
LINK_FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
INSIDE, OUTSIDE = -10, -20  # where links start and end that come from a subgraph's inputs, or go to its outputs
PACK = "mochi-nodes"
FOREIGN_PROPERTIES = ("aux_id", "ver")
SLOT_LOOKS = ("label", "shape", "dir")
OPTIONAL_SHAPE = 7
GAP = 60  # pixels between a node and the one that was made of it


def graphs(workflow: Graph) -> list[Graph]:
    """The workflow and its subgraphs."""
    return [workflow, *(workflow.get("definitions") or {}).get("subgraphs", [])]


def is_workflow(workflow: Any) -> bool:
    return isinstance(workflow, dict) and all(map(_is_graph, graphs(workflow)))


def _is_graph(graph: Any) -> bool:
    if not isinstance(graph, dict) or not isinstance(graph.get("nodes"), list):
        return False
    links = graph.get("links") or []
    return all(map(_is_node, graph["nodes"])) and all(set(LINK_FIELDS) <= set(_record(link)) for link in links)


def _is_node(raw: Any) -> bool:
    if not isinstance(raw, dict) or "id" not in raw or not isinstance(raw.get("type"), str):
        return False
    return all(isinstance(slot, dict) and "name" in slot for slot in raw.get("inputs") or [])


def _record(link: Any) -> dict[str, Any]:
    """A link by field: in old files it is a list."""
    return link if isinstance(link, dict) else dict(zip(LINK_FIELDS, link, strict=False))


def read(graph: Graph) -> Nodes:
    """The nodes by id, and what a subgraph's outputs are linked to."""
    records = {record["id"]: record for record in map(_record, graph.get("links") or [])}
    where = f" in {graph['name']}" if "name" in graph else ""
    nodes = {raw["id"]: _node(raw, records, where) for raw in graph["nodes"]}
    outside = {
        str(record["target_slot"]): _link(record) for record in records.values() if record["target_id"] == OUTSIDE
    }
    return {**nodes, OUTSIDE: Node(OUTSIDE, "", [], outside, {}, f"The output{where}")} if outside else nodes


def _node(raw: dict[str, Any], records: dict[Any, dict[str, Any]], where: str) -> Node:
    slots = [slot for slot in raw.get("inputs") or [] if slot.get("link") in records]
    links = {slot["name"]: _link(records[slot["link"]]) for slot in slots}
    label = f"{raw.get('title') or raw['type']} (node {raw['id']}{where})"
    return Node(raw["id"], raw["type"], raw.get("widgets_values") or [], links, raw, label)


def _link(record: dict[str, Any]) -> Link:
    return Link(record["origin_id"], record["origin_slot"], record["id"])


def write(graph: Graph, nodes: Nodes) -> None:
    """Bring the graph, in place, into agreement with its nodes."""
    made = {key: _written(node) for key, node in nodes.items() if node.was is not None}
    kept = [made.pop(raw["id"], raw) for raw in graph["nodes"] if raw["id"] in nodes]
    graph["nodes"] = kept + list(made.values())
    targets = {link.number: (node, name) for node in nodes.values() for name, link in node.links.items()}
    links = [link for link in graph.get("links") or [] if _record(link)["id"] in targets]
    graph["links"] = [_relinked(link, *targets[_record(link)["id"]]) for link in links]
    _agree(graph)
    if made:
        _count_nodes(graph)


def _written(node: Node) -> dict[str, Any]:
    """The node as the editor saves it: where the old one was, with its title and colours."""
    raw, output = node.raw, NEW_NODES[node.type].output
    properties = {key: value for key, value in (raw.get("properties") or {}).items() if key not in FOREIGN_PROPERTIES}
    if raw["id"] != node.id:
        raw = {**raw, "pos": _below(raw), "title": output}
    return {
        **raw,
        "id": node.id,
        "type": node.type,
        "inputs": _inputs(node),
        "outputs": [{"name": output, "type": output, "links": []}],
        "properties": {**properties, "cnr_id": PACK, "Node name for S&R": node.type},
        "widgets_values": list(dict(node.values).values()),
    }


def _below(raw: dict[str, Any]) -> list[float]:
    (x, y), (_, height) = _pair(raw.get("pos")), _pair(raw.get("size"))
    return [x, y + height + GAP]


def _pair(value: Any) -> tuple[float, float]:
    """Positions and sizes are lists, or objects with the keys 0 and 1."""
    first, second, *_ = [*(value.values() if isinstance(value, dict) else value or []), 0, 0]
    return first, second


def _inputs(node: Node) -> list[dict[str, Any]]:
    """All inputs that take a link, and those widgets that have one."""
    new, was = NEW_NODES[node.type], node.was or {}
    old = {slot["name"]: slot for slot in node.raw.get("inputs") or []}
    inputs = []
    for name in [*new.slots, *(name for name in node.links if name not in new.slots)]:
        before = old.get(was.get(name, ""), {})
        slot = {"shape": OPTIONAL_SHAPE} if name in new.optional else {}
        slot |= {key: value for key, value in before.items() if key in SLOT_LOOKS}
        slot |= {"name": name, "type": new.slots.get(name) or before["type"], "link": None}
        if name in node.links:
            slot["link"] = node.links[name].number
        inputs.append(slot if name in new.slots else {**slot, "widget": {"name": name}})
    return inputs


def _relinked(link: Any, node: Node, name: str) -> Any:
    record, source = _record(link), node.links[name]
    record |= {"origin_id": source.origin, "origin_slot": source.slot}
    if node.was is not None:
        record["target_slot"] = [slot["name"] for slot in _inputs(node)].index(name)
    record["type"] = _type_today(record["type"])
    return record if isinstance(link, dict) else list(record.values())


def _type_today(kind: Any) -> Any:
    return MODEL_TYPES.get(kind, kind) if isinstance(kind, str) else kind


def _agree(graph: Graph) -> None:
    """Inputs and outputs name the links that there are, and today's types."""
    records = [_record(link) for link in graph["links"]]
    numbers = {record["id"] for record in records}
    for node in graph["nodes"]:
        for slot in node.get("inputs") or []:
            slot["type"] = _type_today(slot.get("type"))
            if slot.get("link") not in numbers:
                slot["link"] = None
        _list_links(node.get("outputs"), "links", records, "origin", node["id"])
    _list_links(graph.get("inputs"), "linkIds", records, "origin", INSIDE)
    _list_links(graph.get("outputs"), "linkIds", records, "target", OUTSIDE)


def _list_links(slots: Any, key: str, records: list[dict[str, Any]], end: str, node_id: Any) -> None:
    for i, slot in enumerate(slots or []):
        slot["type"] = _type_today(slot.get("type"))
        numbers = [record["id"] for record in records if (record[f"{end}_id"], record[f"{end}_slot"]) == (node_id, i)]
        if set(numbers) != set(slot.get(key) or []):
            slot[key] = numbers


def _count_nodes(graph: Graph) -> None:
    last = max(node["id"] for node in graph["nodes"] if isinstance(node["id"], int))
    for counters, name in ((graph, "last_node_id"), (graph.get("state") or {}, "lastNodeId")):
        if name in counters:
            counters[name] = max(last, counters[name])
