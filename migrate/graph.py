"""A workflow without its form: nodes with values and links. What is converted, is converted here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .tables import AFTER_SEED, CLIP_LOADERS, DROPPED, LEFT, NEW_NODES, PASSES_ON, REMOVED, Part, ReplacementRule

Nodes = dict[Any, "Node"]


@dataclass(frozen=True)
class Link:
    """Where an input's value comes from; the editor's form has numbers for links."""

    origin: Any
    slot: int
    number: Any = None


@dataclass
class Node:
    """`values` is by name, or the editor's list; `raw` is the node in the workflow, or the one whose place this one takes.

    `was` is set for a node that takes an old one's place: the old input that each of its inputs was.
    """

    id: Any
    type: str
    values: list[Any] | dict[str, Any]
    links: dict[str, Link]
    raw: dict[str, Any]
    label: str
    was: dict[str, str] | None = None


def named_values(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The values by name. Nodes of other ages have fewer, or further ones behind."""
    if isinstance(node.values, dict):
        return {name: value for name, value in node.values.items() if name not in node.links}
    values = dict(zip(names, node.values, strict=False))
    if not isinstance(values.get(AFTER_SEED, ""), str):
        del values[AFTER_SEED]
    return values


def source(nodes: Nodes, link: Link | None) -> Link | None:
    """Where a link comes from in the end, through nodes that only pass it on."""
    for _ in nodes:
        if link is None or link.origin not in nodes:
            return link
        node = nodes[link.origin]
        if node.type == "Reroute":
            link = next(iter(node.links.values()), None)
        elif name := PASSES_ON.get((node.type, link.slot)):
            link = node.links.get(name)
        else:
            return link
    return None  # in a circle


def convert(nodes: Nodes, rules: dict[Any, ReplacementRule], new_id: Callable[[], Any]) -> list[str]:
    """Put ours in the place of the nodes that have a rule, in place; returns what is to be said about it."""
    notes = _use_mochi_clip(nodes, rules)
    notes += _shorten_clip_links(nodes)
    moved: dict[tuple[Any, int], Link] = {}
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
    left = [node for node in nodes.values() if node.type in LEFT]
    return notes + [f"{node.label} stays as it is; there is no counterpart to it here." for node in left]


def _cut(nodes: Nodes, node: Node, name: str, removed: Node) -> str:
    if node.type == "PreviewImage":
        nodes.pop(node.id, None)
        return f"{node.label} is removed with it; it showed nothing else."
    del node.links[name]
    return f"{node.label} has lost the link to {name}, which came from {removed.label}."


def _use_mochi_clip(nodes: Nodes, rules: dict[Any, ReplacementRule]) -> list[str]:
    """The wrapper took T5 out of any CLIP, and its graphs say sd3."""
    notes, loaders = [], {}
    for encoder in [nodes[key] for key in rules if nodes[key].type == "MochiTextEncode"]:
        link = source(nodes, encoder.links.get("clip"))
        loader = nodes.get(link.origin) if link else None
        if loader is None or loader.type not in (*CLIP_LOADERS, "Mochi1LoadT5"):
            notes.append(f"{encoder.label} needs a CLIP from Load Mochi T5, or from Load CLIP with type mochi.")
        elif loader.type in CLIP_LOADERS:
            loaders[loader.id] = loader
    others = _other_users(nodes, rules) if loaders else {}
    return notes + [note for key, loader in loaders.items() for note in _set_clip_type(loader, others.get(key))]


def _other_users(nodes: Nodes, rules: dict[Any, ReplacementRule]) -> dict[Any, str]:
    """For nodes that are linked to others than ours in the end: one of those, by its label."""
    users = {}
    for node in nodes.values():
        if node.id not in rules and node.type not in NEW_NODES and node.type != "Reroute":
            found = [source(nodes, link) for link in node.links.values()]
            users |= {link.origin: node.label for link in found if link}
    return users


def _set_clip_type(loader: Node, other_user: str | None) -> list[str]:
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
    """The inputs that are linked to an output which only passes an input on."""
    return [
        (node, name)
        for node in nodes.values()
        for name, link in node.links.items()
        if link.origin in nodes and (nodes[link.origin].type, link.slot) in PASSES_ON
    ]


def _shorten_clip_links(nodes: Nodes) -> list[str]:
    """T5 Encode has no output for its CLIP: what was linked to it gets the CLIP's source."""
    notes = []
    for node, name in passes_on(nodes):
        link = node.links[name]
        if found := source(nodes, link):
            node.links[name] = Link(found.origin, found.slot, link.number)
        else:
            del node.links[name]
            notes.append(f"{node.label} has lost the link to {name}, which came from no CLIP.")
    return notes


def _replace(nodes: Nodes, node: Node, rule: ReplacementRule, moved: dict, new_id: Callable[[], Any]) -> list[str]:
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


def _values(part: Part, values: dict[str, Any], links: dict[str, Link]) -> tuple[dict[str, Any], list[str]]:
    """All values of a new node by name, and remarks on those that change."""
    new, remarks = dict(NEW_NODES[part.node].widgets), []
    for name, old in part.carry.items():
        if name in new and old in values:
            adapt = part.adapt.get(name)
            new[name], remark = adapt(values[old], values) if adapt else (values[old], "")
            if remark and old not in links:
                changed = "" if new[name] == values[old] else f"{old} {values[old]} becomes {new[name]}; "
                remarks.append(changed + remark)
    return new, remarks


def _dropped(rule: ReplacementRule, values: dict[str, Any], links: dict[str, Link]) -> list[str]:
    """What has no counterpart and was not as it always was."""
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
