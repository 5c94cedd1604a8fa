"""Finds ComfyUI's own nodes that belong to its built-in Mochi, in a graph that may hold other models too."""

from __future__ import annotations

from collections import defaultdict

from .graph import Node, NodeId, Nodes, Rules, named_values, sources
from .tables import STOCK

LATENT = "EmptyMochiLatentVideo"
LOADER_FILES = {"UNETLoader": "unet_name", "VAELoader": "vae_name"}
LOADED_INPUTS = {"CLIPTextEncode": "clip", "VAEDecode": "vae", "VAEDecodeTiled": "vae"}
DECODES = ("VAEDecode", "VAEDecodeTiled")


def has_mochi(nodes: Nodes) -> bool:
    """Whether a graph holds Mochi's latent, or a loader whose file is named after it."""
    return any(node.type == LATENT or (node.type == "UNETLoader" and _names_mochi(node)) for node in nodes.values())


def _names_mochi(node: Node) -> bool:
    file = named_values(node, tuple(STOCK[node.type].widgets)).get(LOADER_FILES[node.type])
    return "mochi" in str(file).lower()


def stock_rules(nodes: Nodes) -> tuple[Rules, list[str]]:
    """The rules for Mochi's loaders and the nodes linked to them, and a note for each loader that stays as it is."""
    loaders = _mochi_loaders(nodes)
    links = _loaded_from(nodes, [node for node in nodes.values() if node.type in LOADED_INPUTS])
    chosen = loaders | {key for key, origin in links.items() if origin in loaders}
    left = [node for node in nodes.values() if node.type in LOADER_FILES and node.id not in loaders]
    notes = [f"{node.label} stays as it is; neither its links nor the name of its file say mochi." for node in left]
    return {key: STOCK[node.type] for key, node in nodes.items() if key in chosen}, notes


def _mochi_loaders(nodes: Nodes) -> set[NodeId]:
    """Loaders of Mochi's models: by file name, a transformer also if Mochi's latent is used with it, a VAE also if it decodes
    Mochi's samples."""
    named = {key for key, node in nodes.items() if node.type in LOADER_FILES and _names_mochi(node)}
    unets = {key for key, node in nodes.items() if node.type == "UNETLoader"}
    latents = _reached(nodes, {key for key, node in nodes.items() if node.type == LATENT})
    models = unets & named or {key for key in unets if _reached(nodes, {key}) & latents}
    decodes = [nodes[key] for key in latents | _reached(nodes, models) if nodes[key].type in DECODES]
    decoding = set(_loaded_from(nodes, decodes).values())
    vaes = {key for key, node in nodes.items() if node.type == "VAELoader" and key in named | decoding}
    clips = {key for key, node in nodes.items() if node.type == "CLIPLoader" and _is_for_mochi(node)}
    return models | vaes | clips


def _is_for_mochi(loader: Node) -> bool:
    return "mochi" in named_values(loader, tuple(STOCK["CLIPLoader"].widgets)).values()


def _loaded_from(nodes: Nodes, users: list[Node]) -> dict[NodeId, NodeId | None]:
    """{node: loader of the model that it uses} for nodes listed in `LOADED_INPUTS`; None if nothing is linked."""
    source = sources(nodes)
    links = {node.id: source(node.links.get(LOADED_INPUTS[node.type])) for node in users}
    return {key: link.origin if link else None for key, link in links.items()}


def _reached(nodes: Nodes, start: set[NodeId]) -> set[NodeId]:
    """`start` and all nodes downstream, except downstream of a decode: its frames may go to any model."""
    targets = defaultdict[NodeId, set[NodeId]](set)
    for node in nodes.values():
        for link in node.links.values():
            targets[link.origin].add(node.id)
    found, to_do = set(start), list(start)
    while to_do:
        key = to_do.pop()
        new = set() if nodes[key].type in DECODES else targets[key] - found
        found |= new
        to_do += new
    return found
