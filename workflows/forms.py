"""A template as the server's prompt and as the editor's graph. What nodes look like comes from a server's /object_info."""

from __future__ import annotations

import uuid
from typing import Any

from .source import Link, Node, Nodes, Template

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
PACK, VERSION = "mochi-nodes", "0.1.0"
NAMESPACE = uuid.UUID("6b1d3a52-6c0b-4d4b-9f0e-5e1f5a0d7c11")
HUGGING_FACE = "https://huggingface.co/Comfy-Org/mochi_preview_repackaged/resolve/main/split_files"
# Files that the editor can fetch when they are missing and the person asks for it.
DOWNLOADS = {
    name: {"name": name, "url": f"{HUGGING_FACE}/{folder}/{name}", "directory": folder}
    for folder, names in {
        "diffusion_models": ("mochi_preview_bf16.safetensors", "mochi_preview_fp8_scaled.safetensors"),
        "text_encoders": ("t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors"),
        "vae": ("mochi_vae.safetensors",),
    }.items()
    for name in names
}
# Files | prompts and all that shapes the run | sampler | video.
COLUMNS = {
    **dict.fromkeys(("Mochi1LoadTransformer", "Mochi1LoadT5", "Mochi1LoadVAE", "LoadVideo", "GetVideoComponents"), 0),
    "Mochi1Cache": 0,
    **dict.fromkeys(("Mochi1Sampler", "KSampler", "SamplerCustomAdvanced", "RandomNoise", "KSamplerSelect"), 2),
    **dict.fromkeys(("Mochi1TiledVAEDecode", "VAEDecode", "CreateVideo", "SaveVideo"), 3),
}
WIDTH, GAP = 340, 60
WIDE = {"Mochi1T5Encode": 420, "CLIPTextEncode": 420, "SaveVideo": 420}
VIEWER = 260
"""What the nodes that show a video need for it."""
VIEWERS = ("SaveVideo", "LoadVideo")
NOTE_WIDTH = 460

Json = dict[str, Any]


def to_api(template: Template, definitions: Json) -> Json:
    """What the server runs: {id: {class_type, inputs, _meta}}, every input written out."""
    ids = _ids(template.nodes)
    return {
        str(ids[name]): {
            "class_type": node.type,
            "inputs": {
                key: [str(ids[value.node]), value.slot] if isinstance(value, Link) else value
                for key, value in _inputs(node, definitions[node.type]).items()
            },
            "_meta": {"title": _title(node, definitions)},
        }
        for name, node in template.nodes.items()
    }


def to_editor(template: Template, definitions: Json) -> Json:
    """What the editor opens (its format 0.4)."""
    ids = _ids(template.nodes)
    links = [
        [number, ids[value.node], value.slot, ids[name], _slot(node, definitions, key), _output(template, definitions, value)]
        for number, (name, node, key, value) in enumerate(_links(template.nodes, definitions), 1)
    ]  # fmt: skip
    places = _places(template.nodes, definitions)
    nodes = [
        _editor_node(node, ids[name], places[name], links, definitions[node.type], template.after_run)
        | {"title": _title(node, definitions)}
        for name, node in template.nodes.items()
    ]
    note = _note(template.note, len(nodes) + 1)
    return {
        "id": str(uuid.uuid5(NAMESPACE, template.name)),
        "revision": 0,
        "last_node_id": len(nodes) + 1,
        "last_link_id": len(links),
        "nodes": [*nodes, note],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _ids(nodes: Nodes) -> dict[str, int]:
    return {name: number for number, name in enumerate(nodes, 1)}


def _title(node: Node, definitions: Json) -> str:
    return node.title or definitions[node.type]["display_name"]


def _specs(definition: Json) -> dict[str, list]:
    """Type and options of every input, in the order of the node."""
    return {
        key: definition["input"][kind][key]
        for kind in ("required", "optional")
        for key in definition["input_order"].get(kind, [])
    }


def _is_widget(spec: list) -> bool:
    return isinstance(spec[0], list) or spec[0] in WIDGETS


def _default(spec: list) -> Any:
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    if spec[0] == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    choices = spec[0] if isinstance(spec[0], list) else options["options"]
    return choices[0] if choices else None


def _inputs(node: Node, definition: Json) -> Json:
    """Values and links of all inputs that have one, in the order of the node."""
    specs = _specs(definition)
    unknown = node.inputs.keys() - specs.keys()
    if unknown:
        raise ValueError(f"{node.type} has no input {', '.join(sorted(unknown))}.")
    return {
        key: node.inputs[key] if key in node.inputs else _default(spec)
        for key, spec in specs.items()
        if key in node.inputs or _is_widget(spec)
    }


def _links(nodes: Nodes, definitions: Json):
    """(name of the target, target, input, Link) of every connection."""
    for name, node in nodes.items():
        for key, value in _inputs(node, definitions[node.type]).items():
            if isinstance(value, Link):
                yield name, node, key, value


def _sockets(node: Node, definition: Json) -> list[str]:
    """The inputs that the editor shows as sockets: those that are no widgets, and widgets that are linked."""
    specs = _specs(definition)
    return [key for key, spec in specs.items() if not _is_widget(spec) or isinstance(node.inputs.get(key), Link)]


def _slot(node: Node, definitions: Json, key: str) -> int:
    return _sockets(node, definitions[node.type]).index(key)


def _output(template: Template, definitions: Json, link: Link) -> str:
    return definitions[template.nodes[link.node].type]["output"][link.slot]


def _editor_node(node: Node, number: int, place: Json, links: list[list], definition: Json, after_run: str) -> Json:
    into = {link[4]: link[0] for link in links if link[3] == number}
    sockets = []
    for slot, key in enumerate(_sockets(node, definition)):
        spec = _specs(definition)[key]
        widget = {"widget": {"name": key}} if _is_widget(spec) else {}
        sockets.append({"name": key, "type": spec[0], "link": into.get(slot), **widget})
    outputs = [
        {"name": name, "type": kind, "links": [link[0] for link in links if link[1:3] == [number, slot]]}
        for slot, (name, kind) in enumerate(zip(definition["output_name"], definition["output"], strict=True))
    ]
    return {
        "id": number,
        "type": node.type,
        **place,
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": sockets,
        "outputs": outputs,
        "properties": _properties(node),
        "widgets_values": list(_widget_values(node, definition, after_run)),
    }


def _properties(node: Node) -> Json:
    ours = node.type.startswith("Mochi1")
    files = [DOWNLOADS[value] for value in node.inputs.values() if isinstance(value, str) and value in DOWNLOADS]
    return {
        **({"cnr_id": PACK, "ver": VERSION} if ours else {"cnr_id": "comfy-core"}),
        "Node name for S&R": node.type,
        **({"models": files} if files else {}),
    }


def _widget_values(node: Node, definition: Json, after_run: str):
    """By position. A linked widget keeps its default, and a seed is followed by what becomes of it after a run."""
    for key, spec in _specs(definition).items():
        if _is_widget(spec):
            given = key in node.inputs and not isinstance(node.inputs[key], Link)
            yield node.inputs[key] if given else _default(spec)
            if len(spec) > 1 and spec[1].get("control_after_generate"):
                yield after_run


def _places(nodes: Nodes, definitions: Json) -> dict[str, Json]:
    """Columns from left to right as the data flows, nodes below each other in a column."""
    columns = {name: COLUMNS.get(node.type, 1) for name, node in nodes.items()}
    lefts, left = {}, 0
    for column in sorted(set(columns.values())):
        lefts[column] = left
        left += max(_size(nodes[name], definitions)[0] for name in nodes if columns[name] == column) + GAP
    places, tops = {}, dict.fromkeys(lefts, 0)
    for name, column in columns.items():
        width, height = _size(nodes[name], definitions)
        places[name] = {"pos": [lefts[column], tops[column]], "size": [width, height]}
        tops[column] += height + GAP
    return places


def _size(node: Node, definitions: Json) -> tuple[int, int]:
    definition = definitions[node.type]
    specs = _specs(definition)
    rows = max(sum(not _is_widget(spec) for spec in specs.values()), len(definition["output"]))
    rows += sum(_is_widget(spec) for spec in specs.values())
    text = sum(150 for spec in specs.values() if len(spec) > 1 and spec[1].get("multiline"))
    return WIDE.get(node.type, WIDTH), 50 + 26 * rows + text + VIEWER * (node.type in VIEWERS)


def _note(text: str, number: int) -> Json:
    lines = sum(1 + len(line) // 62 for line in text.splitlines())
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [-NOTE_WIDTH - GAP, 0],
        "size": [NOTE_WIDTH, 70 + 16 * lines],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "Note",
        "properties": {},
        "widgets_values": [text],
    }
