"""Workflows in the editor's form: graphs of nodes with values by position, and a list of links with ids.

A workflow is a graph that may hold others, its subgraphs. The code below relies on files having been checked (`is_workflow`).
"""

from __future__ import annotations

from collections import defaultdict
from types import NoneType
from typing import Any, TypeGuard

from .downloads import downloads
from .graph import Link, Node, NodeId, Nodes
from .our_nodes import NEW_NODES
from .tables import MODEL_TYPES
from .unseen import add_unseen_links

Json = dict[str, Any]
"""A JSON object in a file."""
LINK_FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
# Required types of the fields in a readable file.
LIST, ID = (list, NoneType), (int, str)
GRAPH = {"nodes": list, "links": LIST, "inputs": LIST, "outputs": LIST, "state": (dict, NoneType)}
NODE = {
    "id": ID,
    "type": str,
    "inputs": LIST,
    "outputs": LIST,
    "widgets_values": (list, dict, NoneType),
    "properties": (dict, NoneType),
}
SLOT = {"name": str, "link": (*ID, NoneType), "links": LIST, "linkIds": LIST}
LINK = {"id": ID, "origin_id": ID, "origin_slot": ID, "target_id": ID, "target_slot": ID, "type": object}
INSIDE, OUTSIDE = -10, -20
"""Ids of the nodes that stand for a subgraph's inputs and outputs."""
PACK = "mochi-nodes"
FOREIGN_PROPERTIES = ("aux_id", "ver", "models")
"""Properties that name an old node's pack and files."""
SLOT_LOOKS = ("label", "shape", "dir")
OPTIONAL_SHAPE = 7
"""How the editor draws an optional input."""
GAP = 60
"""Pixels between and around the two nodes that replace an old one."""
NOTE_WIDTH, NOTE_LETTERS = 460, 60
"""Width of a note in pixels, and about how many characters fit into a line."""


def graphs(workflow: Json) -> list[Json]:
    """The workflow and its subgraphs."""
    return [workflow, *((workflow.get("definitions") or {}).get("subgraphs") or [])]


def group_nodes(workflow: Json) -> dict[str, set[str]]:
    """The types of the nodes in each group node in use; group nodes are an older kind of subgraph."""
    extra = workflow.get("extra")
    groups = extra.get("groupNodes") if isinstance(extra, dict) else None
    used = {node["type"] for graph in graphs(workflow) for node in graph["nodes"]}
    return {
        name: {node["type"] for node in group["nodes"] if _has(node, {"type": str})}
        for name, group in (groups.items() if isinstance(groups, dict) else ())
        if _has(group, {"nodes": list}) and used & {f"workflow>{name}", f"workflow/{name}"}
    }


def is_workflow(workflow: object) -> TypeGuard[Json]:
    """Whether a file can be read as a workflow in the editor's form, its subgraphs included."""
    if not _has(workflow, {"definitions": (dict, NoneType)}):
        return False
    subgraphs = (workflow.get("definitions") or {}).get("subgraphs")
    return isinstance(subgraphs, list | NoneType) and all(map(_is_graph, graphs(workflow)))


def _is_graph(graph: object) -> bool:
    if not _has(graph, GRAPH) or not all(isinstance(link, list | dict) for link in _links(graph)):
        return False
    slots = [slot for key in ("inputs", "outputs") for slot in graph.get(key) or []]
    return (
        all(map(_is_node, graph["nodes"]))
        and all(_has(_record(link), LINK) for link in _links(graph))
        and all(_has(slot, SLOT) for slot in slots)
    )


def _is_node(raw: object) -> bool:
    return _has(raw, NODE) and all(_has(slot, SLOT) for key in ("inputs", "outputs") for slot in raw.get(key) or [])


def _has(value: object, fields: Json) -> TypeGuard[Json]:
    """Whether `value` is an object whose fields are of these types."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kinds) for name, kinds in fields.items())


def _links(graph: Json) -> list[Any]:
    """The links of a graph; in old files, some are null."""
    return [link for link in graph.get("links") or [] if link is not None]


def _record(link: Any) -> Json:
    """A link as an object; old files have a list of the fields."""
    return link if isinstance(link, dict) else dict(zip(LINK_FIELDS, link, strict=False))


def read(graph: Json) -> Nodes:
    """The nodes by id; a node OUTSIDE stands for a subgraph's outputs."""
    records = {record["id"]: record for record in map(_record, _links(graph))}
    where = f" in {graph['name']}" if "name" in graph else ""
    nodes = {raw["id"]: _node(raw, records, where) for raw in graph["nodes"]}
    add_unseen_links(graph, nodes)
    outward = [record for record in records.values() if record["target_id"] == OUTSIDE]
    if outward:
        links = {str(record["target_slot"]): _link(record) for record in outward}
        nodes[OUTSIDE] = Node(OUTSIDE, "", [], links, {}, f"The output{where}")
    return nodes


def _node(raw: Json, records: dict[Any, Json], where: str) -> Node:
    links: dict[str, Link] = {}
    for i, slot in enumerate(raw.get("inputs") or [], 1):
        if slot.get("link") in records:
            name = f"{slot['name']} (input {i})" if slot["name"] in links else slot["name"]
            links[name] = _link(records[slot["link"]])
    label = f"{raw.get('title') or raw['type']} (node {raw['id']}{where})"
    return Node(raw["id"], raw["type"], raw.get("widgets_values") or [], links, raw, label)


def _link(record: Json) -> Link:
    return Link(record["origin_id"], record["origin_slot"], record["id"])


def write(graph: Json, nodes: Nodes) -> None:
    """Replace the graph's nodes by `nodes`, with links that agree at both ends."""
    made = {key: _written(node) for key, node in nodes.items() if node.was is not None}
    for key, node in made.items():
        if nodes[key].raw["id"] != key:
            node["pos"] = _free_place(node, [*graph["nodes"], *(other for other in made.values() if other is not node)])
    kept = [made.pop(raw["id"], raw) for raw in graph["nodes"] if raw["id"] in nodes]
    graph["nodes"] = kept + list(made.values())
    targets = {link.number: (node, name) for node in nodes.values() for name, link in node.links.items()}
    links = [link for link in _links(graph) if _record(link)["id"] in targets]
    graph["links"] = [_relinked(link, *targets[_record(link)["id"]]) for link in links]
    _agree(graph)
    if made:
        _count_nodes(graph)


def _written(node: Node) -> Json:
    """A new node as the editor saves it, with the old one's position, title and colours."""
    raw, output = node.raw, NEW_NODES[node.type].output
    properties = {key: value for key, value in (raw.get("properties") or {}).items() if key not in FOREIGN_PROPERTIES}
    if raw["id"] != node.id:
        raw = {key: value for key, value in raw.items() if key != "title"} | {"pos": _below(raw)}
    return {
        **raw,
        "id": node.id,
        "type": node.type,
        "inputs": _inputs(node),
        "outputs": [{"name": output, "type": output, "links": []}],
        "properties": {**properties, "cnr_id": PACK, "Node name for S&R": node.type, **_files(node)},
        "widgets_values": list(node.by_name().values()),
    }


def _files(node: Node) -> Json:
    """The property that makes the editor offer the node's files for download."""
    files = downloads(node.by_name().values())
    return {"models": files} if files else {}


def _below(raw: Json) -> list[float]:
    """The position directly below a node."""
    (x, y), (_, height) = _pair(raw.get("pos")), _pair(raw.get("size"))
    return [x, y + height + GAP]


def _free_place(raw: Json, others: list[Json]) -> list[float]:
    """The position of a node, or the first one below it that overlaps no other node."""
    (x, y), (width, height) = _pair(raw.get("pos")), _pair(raw.get("size"))
    boxes = sorted((_pair(other.get("pos")) + _pair(other.get("size")) for other in others), key=lambda box: box[1])
    for left, top, wide, high in boxes:
        if left < x + width and x < left + wide and top - GAP < y + height and y < top + high + GAP:
            y = top + high + GAP
    return [x, y]


def add_note(workflow: Json, title: str, text: str) -> None:
    """Add a Markdown note to the left of all nodes."""
    places = [_pair(node.get("pos")) for node in workflow["nodes"]] or [(0, 0)]
    lines = sum(1 + len(line) // NOTE_LETTERS for line in text.splitlines())
    number = max([0, *(node["id"] for node in workflow["nodes"] if isinstance(node["id"], int))]) + 1
    note = {
        "id": number,
        "type": "MarkdownNote",
        "pos": [min(x for x, _ in places) - NOTE_WIDTH - GAP, min(y for _, y in places)],
        "size": [NOTE_WIDTH, 60 + 20 * lines],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": title,
        "properties": {},
        "widgets_values": [text],
    }
    workflow["nodes"].append(note)
    _count_nodes(workflow)


def _pair(value: object) -> tuple[float, float]:
    """A position or size, a list or an object with the keys 0 and 1; missing numbers are 0."""
    values = list(value.values()) if isinstance(value, dict) else value
    first, second, *_ = [*(values if isinstance(values, list) else []), 0, 0]
    return first if isinstance(first, int | float) else 0, second if isinstance(second, int | float) else 0


def _inputs(node: Node) -> list[Json]:
    """The inputs of a new node as the editor saves them: all that only take links, and widgets that have one."""
    new, was = NEW_NODES[node.type], node.was or {}
    old = {slot["name"]: slot for slot in node.raw.get("inputs") or []}
    inputs = []
    for name in [*new.slots, *(name for name in node.links if name not in new.slots)]:
        before = old.get(was.get(name, ""), {})
        slot = {"shape": OPTIONAL_SHAPE} if name in new.optional else {}
        slot |= {key: value for key, value in before.items() if key in SLOT_LOOKS}
        slot |= {"name": name, "type": new.slots.get(name) or before.get("type"), "link": None}
        if name in node.links:
            slot["link"] = node.links[name].number
        inputs.append(slot if name in new.slots else {**slot, "widget": {"name": name}})
    return inputs


def _relinked(link: Any, node: Node, name: str) -> Any:
    """A link of the graph, still a list or an object, redirected to the input `name` of `node`."""
    record, source = _record(link), node.links[name]
    record |= {"origin_id": source.origin, "origin_slot": source.slot}
    if node.was is not None:
        record["target_slot"] = [slot["name"] for slot in _inputs(node)].index(name)
    _use_todays_type(record)
    return record if isinstance(link, dict) else list(record.values())


def _use_todays_type(link_or_slot: Json) -> None:
    """Replace the wrapper's link types by ComfyUI's."""
    kind = link_or_slot.get("type")
    if isinstance(kind, str) and kind in MODEL_TYPES:
        link_or_slot["type"] = MODEL_TYPES[kind]


def _agree(graph: Json) -> None:
    """Make inputs and outputs list exactly the existing links, with ComfyUI's types."""
    numbers, starts, ends = set(), defaultdict(list), defaultdict(list)
    for record in map(_record, graph["links"]):
        numbers.add(record["id"])
        starts[record["origin_id"], record["origin_slot"]].append(record["id"])
        ends[record["target_id"], record["target_slot"]].append(record["id"])
    for node in graph["nodes"]:
        for slot in node.get("inputs") or []:
            _use_todays_type(slot)
            if slot.get("link") not in numbers:
                slot["link"] = None
        _list_links(node.get("outputs"), "links", starts, node["id"])
    _list_links(graph.get("inputs"), "linkIds", starts, INSIDE)
    _list_links(graph.get("outputs"), "linkIds", ends, OUTSIDE)


def _list_links(slots: Any, key: str, by_slot: dict[tuple[NodeId, int], list[NodeId]], node_id: NodeId) -> None:
    """Set `key` of each slot to the ids of its links, in their previous order."""
    for i, slot in enumerate(slots or []):
        _use_todays_type(slot)
        numbers = dict.fromkeys(by_slot.get((node_id, i), ()))
        before = slot.get(key) or []
        kept = [number for number in before if isinstance(number, ID) and number in numbers]
        today = list(dict.fromkeys([*kept, *numbers]))
        if today != before:
            slot[key] = today


def _count_nodes(graph: Json) -> None:
    """Raise the graph's id counters, if any, to the highest node id."""
    last = max((node["id"] for node in graph["nodes"] if isinstance(node["id"], int)), default=0)
    for counters, name in ((graph, "last_node_id"), (graph.get("state") or {}, "lastNodeId")):
        if isinstance(counters.get(name), int):
            counters[name] = max(last, counters[name])
