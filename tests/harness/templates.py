"""Write the templates in both of their forms: `python dev.py generate templates`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.harness.client import ComfyClient
from tests.harness.server import ROOT, ComfyServer
from workflows.forms import to_api, to_blueprint, to_editor
from workflows.source import TEMPLATES, YOUR_FILES

FOLDER = ROOT / "workflows"
BLUEPRINTS = ROOT / "subgraphs"


def files(definitions: dict[str, Any]) -> dict[Path, str]:
    """The content of every file, given a server's /object_info."""
    found = {}
    for template in TEMPLATES:
        found[FOLDER / f"{template.title}.json"] = written(to_editor(template, definitions))
        found[FOLDER / "api" / f"{template.name}.json"] = written(to_api(template, definitions))
        if template.subgraph and template.subgraph.blueprint:
            found[BLUEPRINTS / f"{template.subgraph.name}.json"] = written(to_blueprint(template, definitions))
    return found


def written(graph: dict[str, Any]) -> str:
    return json.dumps(graph, indent=2, ensure_ascii=False) + "\n"


TITLES = {template.name: template.title for template in TEMPLATES}
NAMES = list(TITLES)


def editor_form(name: str) -> dict[str, Any]:
    return _read(FOLDER / f"{TITLES[name]}.json")


def api_form(name: str) -> dict[str, Any]:
    return _read(FOLDER / "api" / f"{name}.json")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def essence(prompt):
    """Without titles, the user's own files, the place where the editor shows a chosen video, and the subgraph's id before a
    node's.
    """
    return {
        _inner(key): (
            node["class_type"],
            {k: _essential(v) for k, v in node["inputs"].items() if k != "video-preview"},
        )
        for key, node in prompt.items()
    }


def _inner(node: str) -> str:
    return node.rpartition(":")[2]


def _essential(value):
    if isinstance(value, list):
        return [_inner(value[0]), value[1]]
    return "" if value in YOUR_FILES else value


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(Path(os.environ["COMFYUI_PATH"]), Path(folder)) as server,
    ):
        for path, text in files(ComfyClient(server.url).get("/object_info")).items():
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
