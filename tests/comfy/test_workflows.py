"""The shipped workflows fit the nodes that the server really has, and both forms are the same graph."""

import json
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
AFTER_SEED = "fixed"


@pytest.fixture(scope="module")
def object_info(comfy_server):
    from tests.harness.client import ComfyClient

    return ComfyClient(comfy_server.url).get("/object_info")


def read(*parts):
    return json.loads(WORKFLOWS.joinpath(*parts).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_nodes_and_inputs_exist(object_info, name):
    for node in read("api", f"{name}.json").values():
        info = object_info[node["class_type"]]["input"]
        known = set(info.get("required", {})) | set(info.get("optional", {}))
        assert set(node["inputs"]) <= known, node
        links = {key for key, value in node["inputs"].items() if isinstance(value, list)}
        required = {key for key, spec in info.get("required", {}).items()}
        assert required <= set(node["inputs"]) | links, node


@pytest.mark.parametrize("name", NAMES)
def test_editor_form_is_the_same_graph(object_info, name):
    editor, api = read(f"{name}.json"), read("api", f"{name}.json")
    assert editor["version"] == 0.4
    links = {link[0]: link for link in editor["links"]}
    rebuilt = {str(node["id"]): rebuild(node, links, object_info[node["type"]]) for node in editor["nodes"]}
    assert rebuilt == {key: {"class_type": n["class_type"], "inputs": n["inputs"]} for key, n in api.items()}


def rebuild(node, links, info):
    """What the editor would send: widgets by position, links by name."""
    slots = {slot["name"] for slot in node["inputs"]}
    order = [key for kind in ("required", "optional") for key in info["input_order"].get(kind, [])]
    values = [value for value in node["widgets_values"] if value != AFTER_SEED]
    inputs = dict(zip([key for key in order if key not in slots], values, strict=False))
    for slot in node["inputs"]:
        if slot["link"] is not None:
            _, source, source_slot, target, target_slot, kind = links[slot["link"]]
            assert target == node["id"]
            assert node["inputs"][target_slot]["name"] == slot["name"]
            assert kind == slot["type"]
            inputs[slot["name"]] = [str(source), source_slot]
    return {"class_type": node["type"], "inputs": inputs}
