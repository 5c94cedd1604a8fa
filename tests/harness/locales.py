"""The pack's texts in the front end's locale files; the English ones are the nodes' own.

`python dev.py generate locales` writes locales/en/nodeDefs.json from a real server.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.harness.client import ComfyClient
from tests.harness.server import ROOT, ComfyServer

LOCALES = ROOT / "locales"
# The front end of ComfyUI 0.30 offers no German yet; the file is ready for the one that does.
LANGUAGES = ("en", "zh", "ja", "ko", "es", "fr", "de")
PREFIX = "Mochi1"


def main() -> None:
    with tempfile.TemporaryDirectory() as base, ComfyServer(Path(os.environ["COMFYUI_PATH"]), Path(base)) as server:
        write("en", english(node_infos(ComfyClient(server.url))))


def node_infos(client: ComfyClient) -> dict[str, dict[str, Any]]:
    """The server's description of each of our nodes."""
    return {name: info for name, info in client.get("/object_info").items() if name.startswith(PREFIX)}


def english(infos: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """nodeDefs.json in English: all texts that the front end looks up for our nodes."""
    return {name: node_texts(info) for name, info in infos.items()}


def node_texts(info: dict[str, Any]) -> dict[str, Any]:
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: {"name": options.get("display_name", name), "tooltip": options.get("tooltip")}
            for name, (_, options) in inputs_of(info).items()
        },
        "outputs": {str(index): output_texts(info, index) for index in range(len(info["output"]))},
    }


def inputs_of(info: dict[str, Any]) -> dict[str, list[Any]]:
    """(type, options) of every input, in the order of the node."""
    return {name: spec for kind in ("required", "optional") for name, spec in info["input"].get(kind, {}).items()}


def output_texts(info: dict[str, Any], index: int) -> dict[str, Any]:
    """An output named like its type is shown with the front end's own name for the type."""
    name, tooltip = info["output_name"][index], info["output_tooltips"][index]
    return ({} if name == info["output"][index] else {"name": name}) | {"tooltip": tooltip}


def read(language: str, file: str = "nodeDefs") -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8"))


def write(language: str, texts: dict[str, Any]) -> None:
    path = LOCALES / language / "nodeDefs.json"
    path.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def flat(texts: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Every text by its path, such as Mochi1Sampler.inputs.width.tooltip."""
    found: dict[str, Any] = {}
    for key, value in texts.items():
        found |= flat(value, f"{place}{key}.") if isinstance(value, dict) else {place + key: value}
    return found


if __name__ == "__main__":
    main()
