"""Links without a line in the editor's files: those between nodes of KJNodes or Easy-Use, and of Use Everywhere.

They are only used to trace where something comes from, and are never written. Facts: kijai/ComfyUI-KJNodes,
web/js/setgetnodes.js; chrisgoringe/cg-use-everywhere, js/use_everywhere_graph_analysis.js, which saves what it has found as
extra.ue_links.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, TypeGuard

from .graph import Link, Node, Nodes, sources
from .tables import GETTERS, SENDERS, SETTERS

ACTIVE = 0
"""Mode of a node that is neither muted nor bypassed."""


def add_unseen_links(graph: dict[str, Any], nodes: Nodes) -> None:
    """Add these links to a graph's nodes, which so far have only the links with lines."""
    _link_getters(nodes)
    _link_saved(graph, nodes)
    _link_by_type(nodes)


def _link_getters(nodes: Nodes) -> None:
    setters = {_name(node): node.id for node in reversed(nodes.values()) if node.type in SETTERS}  # first of each name
    for node in nodes.values():
        if node.type in GETTERS and _name(node) in setters:
            node.links["value"] = Link(setters[_name(node)], 0)


def _name(node: Node) -> str:
    """The name that links a getter to its setter; it is the only value of both."""
    values = node.values if isinstance(node.values, list) else list(node.values.values())
    return str(next(iter(values), ""))


def _link_saved(graph: dict[str, Any], nodes: Nodes) -> None:
    """Add the links that Use Everywhere has saved; ids may be numbers or text."""
    extra = graph.get("extra")
    saved = extra.get("ue_links") if isinstance(extra, dict) else None
    by_text = {str(key): node for key, node in nodes.items()}
    for link in filter(_is_saved_link, saved if isinstance(saved, list) else []):
        target, origin = by_text.get(str(link.get("downstream"))), by_text.get(str(link.get("upstream")))
        if target and origin:
            for slot in (target.raw.get("inputs") or [])[link["downstream_slot"] :][:1]:
                target.links.setdefault(slot["name"], Link(origin.id, link["upstream_slot"]))


def _is_saved_link(link: object) -> TypeGuard[dict[str, Any]]:
    places = ("downstream_slot", "upstream_slot")
    return isinstance(link, dict) and all(isinstance(link.get(place), int) and link[place] >= 0 for place in places)


def _link_by_type(nodes: Nodes) -> None:
    """Add what Use Everywhere would link where only one of its nodes sends a type: older versions save no links."""
    source = sources(nodes)
    sent = defaultdict[str, list[Link]](list)
    for node in nodes.values():
        if node.type in SENDERS and node.raw.get("mode", ACTIVE) == ACTIVE:
            for link in filter(None, map(source, node.links.values())):
                sent[_type(nodes, link)].append(link)
    for node in nodes.values():
        for slot in (node.raw.get("inputs") or []) if node.type not in SENDERS else []:
            links = sent.get(str(slot.get("type")), [])
            if slot.get("link") is None and "widget" not in slot and len(links) == 1 and links[0].origin != node.id:
                node.links.setdefault(slot["name"], Link(links[0].origin, links[0].slot))


def _type(nodes: Nodes, link: Link) -> str:
    """The type of the output that a link comes from; "" if the file does not say."""
    outputs = (nodes[link.origin].raw.get("outputs") or []) if link.origin in nodes else []
    return (
        str(outputs[link.slot].get("type")) if isinstance(link.slot, int) and link.slot in range(len(outputs)) else ""
    )
