"""The templates as files: what a user sees first, and what the editor can offer to download."""

import ast
import json
import re
from pathlib import Path

import pytest

from migrate.downloads import PUBLIC_FILES
from tests.harness.templates import BLUEPRINTS, NAMES, TITLES, editor_form
from workflows.source import TEMPLATES

ROOT = Path(__file__).parents[2]
TITLE = 30  # a node's title is above its position
MOST_WIDE = 2080  # opened subgraphs; the default renderer shows a wider graph as empty boxes at 1600x950
MOST_HIGH = 1220
WINDOW = (1400, 900)
SAVE_WIDGETS = 130
LEAST_ZOOM = 0.59  # below 57 % the classic renderer draws no text
MANY_COLUMNS = {"faster": 0.55, "prompt_list": 0.57}  # all columns are needed, at their minimum width
LONGEST_LABEL = 20  # what fits next to the nodes of an opened subgraph
COMES_ALONG = "tiny"
FIXED = ("genmo_exact",)


def test_the_editor_lists_them_in_the_order_of_their_source():
    """The published pack does not contain the source, which is for developers."""
    code = ast.parse((ROOT / "nodes" / "templates.py").read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in code.body if isinstance(node, ast.Assign)}
    prefix, order = (ast.literal_eval(values[name]) for name in ("PREFIX", "ORDER"))
    assert [prefix + name for name in order] == [*TITLES.values()]


def graphs(workflow):
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def box(node):
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def ends(graph):
    """Nodes at the ends of each link; links into or out of a subgraph have only one."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link in graph["links"]:
        _, origin, _, target, _, _ = link.values() if isinstance(link, dict) else link
        if origin in nodes and target in nodes:
            yield nodes[origin], nodes[target]


@pytest.mark.parametrize("name", NAMES)
def test_graph_is_readable_at_first_sight(name):
    for graph in graphs(editor_form(name)):
        boxes = [box(node) for node in graph["nodes"]]
        assert max(b[2] for b in boxes) - min(b[0] for b in boxes) <= MOST_WIDE
        assert max(b[3] for b in boxes) - min(b[1] for b in boxes) <= MOST_HIGH
        assert all(len(port.get("label", port["name"])) <= LONGEST_LABEL for port in graph.get("inputs", []))
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if overlap(a, b)]
        assert all(box(origin)[2] < target["pos"][0] for origin, target in ends(graph))
        for group in graph["groups"]:
            x, y, width, height = group["bounding"]
            frame = (x, y, x + width, y + height)
            for b in boxes:
                inside = frame[0] < b[0] and b[2] < frame[2] and frame[1] < b[1] and b[3] < frame[3]
                assert inside or not overlap(frame, b), (group["title"], b)


@pytest.mark.parametrize("name", NAMES)
def test_opens_so_large_that_text_is_drawn(name):
    """The editor fits a template into three quarters of the window, with a margin of 10 around its nodes."""
    boxes = [box(node) for node in editor_form(name)["nodes"]]
    extents = [max(b[axis + 2] for b in boxes) - min(b[axis] for b in boxes) + 20 for axis in (0, 1)]
    assert min(0.75 * room / extent for room, extent in zip(WINDOW, extents, strict=True)) >= MANY_COLUMNS.get(
        name, LEAST_ZOOM
    )


def test_a_square_video_has_room_below_its_widgets():
    """In the classic renderer, a player below the widgets is as wide as its node."""
    (node,) = (node for node in editor_form("tiny_mochi")["nodes"] if node["type"] == "SaveVideo")
    assert node["size"][1] - SAVE_WIDGETS >= node["size"][0]


@pytest.mark.parametrize("name", NAMES)
def test_every_run_makes_another_video(name):
    after = {
        value for graph in graphs(editor_form(name)) for node in graph["nodes"] for value in node["widgets_values"]
    }
    assert after & {"fixed", "randomize"} == {"fixed" if name in FIXED else "randomize"}


@pytest.mark.parametrize("name", NAMES)
def test_every_missing_file_can_be_had(name):
    workflow = editor_form(name)
    files = set()
    for graph in graphs(workflow):
        for node in graph["nodes"]:
            named = {v for v in node["widgets_values"] if str(v).endswith(".safetensors") and COMES_ALONG not in v}
            if re.fullmatch(r"Mochi1Load\w+", node["type"]):
                assert {file["name"] for file in node["properties"].get("models", [])} == named
                files |= named
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert all(node["title"] and not node["widgets_values"][0].startswith("#") for node in notes)
    assert all(f"[{file}]({PUBLIC_FILES[file].url})" in notes[-1]["widgets_values"][0] for file in files)


def test_blueprints_say_what_they_are():
    names = {t.subgraph.name for t in TEMPLATES if t.subgraph and t.subgraph.blueprint}
    assert {path.stem for path in BLUEPRINTS.glob("*.json")} == names
    for name in names:
        blueprint = json.loads((BLUEPRINTS / f"{name}.json").read_text(encoding="utf-8"))
        (node,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
        assert (node["type"], node["title"]) == (subgraph["id"], name)
        assert subgraph["category"]
        assert subgraph["description"].endswith(".")


def label(node, widget):
    """The text next to a widget."""
    labels = {port["widget"]["name"]: port.get("label") for port in node["inputs"] if "widget" in port}
    return labels.get(widget) or widget


def test_app_mode_shows_prompt_length_seed_and_video():
    for name in TITLES:
        workflow = editor_form(name)
        nodes = {node["id"]: node for node in workflow["nodes"]}
        app = workflow["extra"]["linearData"]
        assert [nodes[key]["type"] for key in app["outputs"]] == ["SaveVideo"], name
        labels = [label(nodes[number], key) for number, key in app["inputs"]]
        assert len(set(labels)) == len(labels), name
        assert not {"value", "file", "image", "text", "length", "noise_seed"} & set(labels), name
        shown = {key for _, key in app["inputs"]}
        assert shown & {"prompt", "text", "value"}, name
        assert shown & {"seconds", "num_frames", "length"}, name
        assert shown & {"seed", "noise_seed"}, name
