"""Workflows as nodes with values and links, independent of their form; replaces the old nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from .our_nodes import AFTER_SEED, NEW_NODES
from .tables import CLIP_LOADERS, DROPPED, PASSES_ALL_ON, PASSES_ON, REMOVED, SENDERS, Part, ReplacementRule

NodeId: TypeAlias = int | str
Nodes: TypeAlias = dict[NodeId, "Node"]
Rules: TypeAlias = dict[NodeId, ReplacementRule]
"""The rule for each node to be replaced."""


@dataclass(frozen=True)
class Link:
    """Where an input's value comes from."""

    origin: NodeId
    slot: NodeId
    """Output of that node, counted from 0; from the file, and only checked to be a number or a name."""
    number: NodeId | None = None
    """The link's id in the editor's form; None in API form."""


@dataclass
class Node:
    """A node of a workflow, or a new one that replaces it."""

    id: NodeId
    type: str
    """The node's type; no rule matches ""."""
    values: list[object] | dict[str, object]
    """Values by name, or in the editor's order."""
    links: dict[str, Link]
    """Links by input name."""
    raw: dict[str, Any]
    """The node as in the file; for a new node, the one that it replaces."""
    label: str
    """The node's name in notes."""
    was: dict[str, str] | None = None
    """For a new node: {its input: the old node's input}."""

    def by_name(self) -> dict[str, object]:
        """The values of a node in API form, or of a new one."""
        assert isinstance(self.values, dict)
        return self.values


def named_values(node: Node, names: tuple[str, ...]) -> dict[str, object]:
    """The node's values by name, where `names` is the editor's order; a node saved by another version may have more or fewer."""
    if isinstance(node.values, dict):
        return {name: value for name, value in node.values.items() if name not in node.links}
    values = dict(zip(names, node.values, strict=False))
    if not isinstance(values.get(AFTER_SEED, ""), str):
        del values[AFTER_SEED]
    return values


def sources(nodes: Nodes) -> Callable[[Link | None], Link | None]:
    """A function that traces a link to its origin, through nodes and outputs that only pass an input on.

    It returns None for a cycle and for a dead end. Each output is visited once, however many links come from it.
    """
    known: dict[tuple[NodeId, NodeId], Link | None] = {}

    def source(link: Link | None) -> Link | None:
        way = []
        while link is not None and (link.origin, link.slot) not in known:
            known[link.origin, link.slot] = None  # until the origin is found, which a cycle lacks
            way.append((link.origin, link.slot))
            name = _passed_input(nodes, link)
            if name is None:
                known[way[-1]] = link
            else:
                link = nodes[link.origin].links.get(name)
        end = None if link is None else known[link.origin, link.slot]
        known.update(dict.fromkeys(way, end))
        return end

    return source


def _passed_input(nodes: Nodes, link: Link) -> str | None:
    """The input that is passed on by the output which `link` comes from; None if that output makes something itself."""
    node = nodes.get(link.origin)
    if node is not None and node.type in PASSES_ALL_ON:
        return next(iter(node.links), "")
    return PASSES_ON.get((node.type, link.slot)) if node is not None else None


def convert(nodes: Nodes, rules: Rules, new_id: Callable[[], NodeId]) -> list[str]:
    """Replace the nodes that have a rule, changing `nodes` in place; returns notes, one sentence for each change.

    `new_id` makes ids for additional nodes, if an old one becomes several.
    """
    notes = _use_mochi_clip(nodes, rules)
    notes += _shorten_links(nodes)
    moved: dict[tuple[NodeId, NodeId], Link] = {}  # old node's output -> new node's
    for key, rule in rules.items():
        notes += _replace(nodes, nodes[key], rule, moved, new_id)
    removed = {key: nodes.pop(key) for key in list(nodes) if nodes[key].type in REMOVED}
    notes += [f"{node.label} is removed; {REMOVED[node.type]}." for node in removed.values()]
    for node in list(nodes.values()):
        for name, link in list(node.links.items()):
            if link.origin in removed:
                notes.append(_cut(nodes, node, name, removed[link.origin]))
            elif new := moved.get((link.origin, link.slot)):
                node.links[name] = Link(new.origin, new.slot, link.number)
    return notes


def _cut(nodes: Nodes, node: Node, name: str, removed: Node) -> str:
    """Remove the link of the input `name`, or the whole node if it only showed the removed node's output."""
    if node.type == "PreviewImage":
        nodes.pop(node.id, None)
        return f"{node.label} is removed with it; it showed nothing else."
    del node.links[name]
    return f"{node.label} has lost the link to {name}, which came from {removed.label}."


def _use_mochi_clip(nodes: Nodes, rules: Rules) -> list[str]:
    """Set CLIP loaders for MochiTextEncode to mochi: the wrapper extracted T5 from any CLIP, usually one for sd3."""
    notes: list[str] = []
    loaders: Nodes = {}
    source = sources(nodes)
    for encoder in [nodes[key] for key in rules if nodes[key].type == "MochiTextEncode"]:
        link = source(encoder.links.get("clip"))
        loader = nodes.get(link.origin) if link else None
        if loader is None or loader.type not in (*CLIP_LOADERS, "Mochi1LoadT5"):
            notes.append(f"{encoder.label} needs a CLIP from Load Mochi T5, or from Load CLIP with type mochi.")
        elif loader.type in CLIP_LOADERS:
            loaders[loader.id] = loader
    others = _other_users(nodes, rules) if loaders else {}
    return notes + [note for key, loader in loaders.items() for note in _set_clip_type(loader, others.get(key))]


def _other_users(nodes: Nodes, rules: Rules) -> dict[NodeId, str]:
    """{node: label of a node that uses it}, for users that are neither replaced nor nodes of this pack."""
    users: dict[NodeId, str] = {}
    source = sources(nodes)
    for node in nodes.values():
        if node.id not in rules and node.type not in (*NEW_NODES, *PASSES_ALL_ON, *SENDERS):
            found = [source(link) for link in node.links.values()]
            users |= {link.origin: node.label for link in found if link}
    return users


def _set_clip_type(loader: Node, other_user: str | None) -> list[str]:
    """Set a CLIP loader's type to mochi, unless another node uses it too; returns notes."""
    names = CLIP_LOADERS[loader.type]
    old = named_values(loader, names).get("type")
    if old == "mochi" or (isinstance(loader.values, list) and len(loader.values) < len(names)):
        return []
    if other_user:
        remedy = "give T5 Encode a Load CLIP of its own with type mochi"
        return [f"{loader.label} keeps its type {old}, as {other_user} uses it, too; {remedy}."]
    if isinstance(loader.values, list):
        loader.values[names.index("type")] = "mochi"
    else:
        loader.values["type"] = "mochi"
    return [f"{loader.label}: type {old} becomes mochi."]


def passes_on(nodes: Nodes) -> list[tuple[Node, str]]:
    """(node, input) for inputs linked to an output that only passes an input on, see `PASSES_ON`."""
    return [
        (node, name)
        for node in nodes.values()
        for name, link in node.links.items()
        if link.origin in nodes and (nodes[link.origin].type, link.slot) in PASSES_ON
    ]


def _shorten_links(nodes: Nodes) -> list[str]:
    """Relink the users of outputs that only pass an input on to that input's source: the new nodes have no such outputs."""
    notes: list[str] = []
    source = sources(nodes)
    for node, name in passes_on(nodes):
        link = node.links[name]
        if found := source(link):
            node.links[name] = Link(found.origin, found.slot, link.number)
        else:
            del node.links[name]
            notes.append(f"{node.label} has lost the link to {name}, which came from nothing.")
    return notes


def _replace(
    nodes: Nodes,
    node: Node,
    rule: ReplacementRule,
    moved: dict[tuple[NodeId, NodeId], Link],
    new_id: Callable[[], NodeId],
) -> list[str]:
    """Replace one node by the parts of its rule; adds to `moved` and returns notes."""
    values, links = {**rule.widgets, **named_values(node, tuple(rule.widgets))}, node.links
    notes = [f"{node.label} {rule.remark}."] if rule.remark else []
    notes += [f"{node.label}: {note}." for note in _dropped(rule, values, links)]
    for i, part in enumerate(rule.parts):
        new = node if i == 0 else Node(new_id(), part.node, {}, {}, node.raw, node.label)
        new.type, new.was = part.node, part.carry
        new.values, remarks = _values(part, values, links)
        new.links = {name: links[old] for name, old in part.carry.items() if old in links}
        notes += [f"{node.label}: {remark}." for remark in remarks]
        nodes[new.id] = new
        moved[node.id, i] = Link(new.id, 0)
    return notes


def _values(part: Part, values: dict[str, object], links: dict[str, Link]) -> tuple[dict[str, object], list[str]]:
    """All values of a new node by name, and remarks on those that change."""
    new, remarks = dict(NEW_NODES[part.node].widgets), list[str]()
    for name, old in part.carry.items():
        if name in new and old in values:
            adapt = part.adapt.get(name)
            new[name], remark = adapt(values[old], values) if adapt else (values[old], "")
            if remark and old not in links:
                changed = "" if new[name] == values[old] else f"{old} {values[old]} becomes {new[name]}; "
                remarks.append(changed + remark)
    return new, remarks


def _dropped(rule: ReplacementRule, values: dict[str, object], links: dict[str, Link]) -> list[str]:
    """Remarks on links without a counterpart, and on such values if they differ from the old node's defaults."""
    carried = {old for part in rule.parts for old in part.carry.values()}
    notes = [
        f"the link to {name} is dropped; {DROPPED.get(name, 'it has no counterpart')}"
        for name in links
        if name not in carried
    ]
    for name, value in values.items():
        if name in DROPPED and name not in links and value != rule.widgets.get(name, value):
            notes.append(f"{name} {value} is dropped; {DROPPED[name]}")
    return notes
