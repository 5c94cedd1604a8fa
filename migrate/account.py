"""The account of a conversion, kept as a note in the new graph."""

from __future__ import annotations

from collections.abc import Iterable

from . import editor
from .downloads import PUBLIC_FILES

FILE_KEYS = ("name", "url", "directory")
"""Fields with which the editor describes a file that a node needs."""

TITLE = "Converted to Mochi Nodes"


def add_account(workflow: editor.Json, notes: Iterable[str]) -> None:
    """Add a note to a converted workflow in the editor's form: what changed, and where its files come from."""
    told = [f"- {note}" for note in notes]
    files = [f"- [{name}]({url}), into models/{folder}" for name, url, folder in _files(workflow)]
    parts = [
        ["**What changed**", *told] if told else ["Everything was carried over."],
        ["**Files that can be downloaded**", *files] if files else [],
    ]
    editor.add_note(workflow, TITLE, "\n\n".join("\n".join([part[0], "", *part[1:]]) for part in parts if part) + "\n")


def _files(workflow: editor.Json) -> list[tuple[str, str, str]]:
    """Name and size, URL and folder of each public file that a node needs."""
    ours = [
        node for graph in editor.graphs(workflow) for node in graph["nodes"] if str(node["type"]).startswith("Mochi1")
    ]
    asked = dict.fromkeys(file for node in ours for file in _asked_by(node))
    sizes = {file.url: file.size for file in PUBLIC_FILES.values()}
    return [(f"{name} ({sizes[url]})", url, folder) for name, url, folder in asked if url in sizes]


def _asked_by(node: editor.Json) -> list[tuple[str, str, str]]:
    """Name, URL and folder of each file that a node needs; entries not in the editor's form are skipped."""
    properties = node.get("properties")
    models = properties.get("models") if isinstance(properties, dict) else None
    entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    whole = [entry for entry in entries if all(isinstance(entry.get(key), str) for key in FILE_KEYS)]
    return [(entry["name"], entry["url"], entry["directory"]) for entry in whole]
