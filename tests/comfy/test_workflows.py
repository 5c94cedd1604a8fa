"""The shipped workflows match the server's actual nodes; tests/browser checks in a real editor that both forms agree."""

import json
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("api/*.json"))


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
        inputs = {name.partition(".")[0] for name in node["inputs"]}  # inputs of a list are numbered
        assert inputs <= known, node
        assert set(info.get("required", {})) <= inputs, node
