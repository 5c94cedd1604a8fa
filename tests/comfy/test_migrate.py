"""Old workflows run on a real server with their own settings, converted beforehand or on arrival."""

import json
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import load_file

from migrate import migrate
from migrate.editor import LINK_FIELDS
from migrate.our_nodes import AFTER_SEED, NEW_NODES
from migrate.tables import WRAPPER

OLD = Path(__file__).parents[1] / "data" / "old_workflows"
EDITOR_ONLY = ("Note", "PrimitiveNode", "Reroute")
FILES = {"diffusion_models": "mochi_preview_bf16.safetensors", "vae": "mochi_vae.safetensors"}


@pytest.fixture(scope="module")
def server(comfy_server):
    """A server that also has the files where the downloading loader puts them."""
    for kind, name in FILES.items():
        folder = comfy_server.base / "models" / kind
        (folder / "mochi").mkdir(exist_ok=True)
        shutil.copy(folder / name, folder / "mochi" / name)
    yield comfy_server
    for kind in FILES:
        shutil.rmtree(comfy_server.base / "models" / kind / "mochi")


@pytest.fixture(scope="module")
def object_info(server):
    from tests.harness.client import ComfyClient

    return ComfyClient(server.url).get("/object_info")


@pytest.fixture
def frames_of(comfy_client):
    """Run a graph, and read the frames of one of its nodes."""

    def run(graph, name):
        graph = {key: narrow_t5(node) for key, node in graph.items()}
        save = {"class_type": "ProbeSaveTensor", "inputs": {"images": [name, 0], "name": "migrated"}, "_meta": {}}
        done = comfy_client.run({**graph, "save": save})
        assert done.outcome == "execution_success", done.error
        return load_file(done.outputs["save"]["path"][0])["images"]

    return run


def narrow_t5(node):
    """Needed because the host's own loader only accepts the real T5."""
    if node["class_type"] != "CLIPLoader":
        return node
    return {**node, "class_type": "Mochi1LoadT5", "inputs": {"t5_name": node["inputs"]["clip_name"], "dtype": "auto"}}


def old(name):
    return json.loads((OLD / f"{name}.json").read_text(encoding="utf-8"))


def as_prompt(workflow, object_info):
    """The prompt that the editor would send: values by the input names that the server reports."""
    links = {link[0]: dict(zip(LINK_FIELDS, link, strict=True)) for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}

    def origin(number):
        link = links[number]
        if nodes[link["origin_id"]]["type"] == "Reroute":
            return origin(nodes[link["origin_id"]]["inputs"][0]["link"])
        return [str(link["origin_id"]), link["origin_slot"]]

    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in EDITOR_ONLY:
            continue
        linked = {slot["name"]: slot["link"] for slot in node["inputs"] if slot["link"] is not None}
        linked = {name: n for name, n in linked.items() if nodes[links[n]["origin_id"]]["type"] != "PrimitiveNode"}
        values = dict(zip(widgets(object_info[node["type"]]), node["widgets_values"], strict=False))
        values.pop(AFTER_SEED, None)
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": values | {name: origin(n) for name, n in linked.items()},
        }
    return prompt


def widgets(info):
    """Names by position in the editor's form."""
    names = []
    for kind in ("required", "optional"):
        for name, (type_, *options) in info["input"].get(kind, {}).items():
            if isinstance(type_, list) or type_ in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
                names += [name, AFTER_SEED] if options and options[0].get(AFTER_SEED) else [name]
    return names


def test_the_table_knows_our_nodes(object_info):
    """Inputs may be appended; those in the table keep their positions and defaults."""
    for name, new in NEW_NODES.items():
        known = widgets(object_info[name])
        assert known[: len(new.widgets)] == list(new.widgets), name
        inputs = object_info[name]["input"]
        specs = {**inputs["required"], **inputs.get("optional", {})}
        slots = [key for key in specs if key not in known]
        assert slots == list(new.slots), name
        assert tuple(key for key in slots if key in inputs.get("optional", {})) == new.optional, name
        assert [specs[key][0] for key in new.slots] == list(new.slots.values()), name
        assert object_info[name]["output"] == [new.output], name
        for key, default in new.widgets.items():
            if key != AFTER_SEED:
                assert specs[key][1].get("default", "") == default, (name, key)


@pytest.mark.parametrize(
    ("name", "decode"),
    [
        ("text_to_video", "7"),
        ("download_and_load", "15"),
        ("video_to_video", "12"),
        ("edit_video", "16"),
        ("stock", "8"),
    ],
)
def test_migrated_workflows_run(frames_of, object_info, name, decode):
    workflow = migrate(old(name), stock=name == "stock").workflow
    workflow["nodes"] = [node for node in workflow["nodes"] if node["type"] != "PreviewImage"]  # its input was removed
    frames = frames_of(as_prompt(workflow, object_info), decode)
    assert frames.shape == (13, 64, 96, 3)
    assert frames.std() > 0.05


@pytest.fixture(scope="module")
def by_hand():
    """The old graph in API form, rewritten by hand for our nodes."""

    def node(class_type, **inputs):
        return {"class_type": class_type, "inputs": inputs}

    return {
        "model": node("Mochi1LoadTransformer", model_name=FILES["diffusion_models"], weight_dtype="fp32"),
        "vae": node("Mochi1LoadVAE", vae_name=FILES["vae"], dtype="auto"),
        "t5": node("Mochi1LoadT5", t5_name="t5xxl_fp16.safetensors", dtype="auto"),
        "positive": node("Mochi1T5Encode", clip=["t5", 0], prompt="a red panda"),
        "negative": node("Mochi1T5Encode", clip=["t5", 0], prompt=""),
        "sampler": node(
            "Mochi1Sampler", model=["model", 0], positive=["positive", 0], negative=["negative", 0],
            width=96, height=64, num_frames=13, steps=4, cfg=3.5, seed=1234,
        ),
        "decode": node("Mochi1TiledVAEDecode", samples=["sampler", 0], vae=["vae", 0]),
    }  # fmt: skip


def without_meta(graph):
    return {key: {name: value for name, value in node.items() if name != "_meta"} for key, node in graph.items()}


def replaced_in_the_editor(graph):
    """The editor leaves links of MochiTextEncode's second output."""
    graph = migrate(graph).workflow
    graph["8"]["inputs"]["clip"] = ["1", 1]
    return graph


FORMS = (lambda graph: migrate(graph).workflow, lambda graph: graph, without_meta, replaced_in_the_editor)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("form", FORMS, ids=["migrated", "as it was", "without _meta", "replaced in the editor"])
def test_the_api_form_makes_the_video_of_its_settings(frames_of, by_hand, form):
    """Old prompts run as they are, on arrival: with the title that the editor adds to nodes, and without."""
    assert frames_of(form(old("api")), "15").equal(frames_of(by_hand, "decode"))


# Runs without us: inputs in an unusual order or with unusual names, a node with an old name, an odd unused node.
OTHERS = {
    "30": {
        "class_type": "EmptyImage",
        "inputs": {"color": 255, "width": 32, "height": 32, "batch_size": 1},
        "more": [1],
    },
    "31": {"class_type": "MochiImageEncode", "inputs": {AFTER_SEED: "fixed", "images": ["30", 0]}},
    "32": {"class_type": "PreviewImage", "inputs": {"images": ["31", 0]}, "_meta": {"title": "Preview"}},
    "33": {"class_type": "EmptyImage", "inputs": {}, "_meta": []},
}


def arrived(client, graph):
    """The prompt that the server ran; it reports success before it writes the history."""
    run = client.run(graph)
    assert run.outcome == "execution_success", run.error
    deadline = time.monotonic() + 30
    while not (history := client.get(f"/history/{run.prompt_id}")):
        assert time.monotonic() < deadline, "the run is not in the history"
        time.sleep(0.05)
    return history[run.prompt_id]["prompt"][2]


@pytest.mark.usefixtures("server")
def test_prompts_of_other_nodes_arrive_unchanged(comfy_client):
    graph = arrived(comfy_client, OTHERS)
    assert json.dumps(graph) == json.dumps(OTHERS)


@pytest.mark.usefixtures("server")
def test_other_nodes_beside_old_ones_arrive_unchanged(comfy_client, frames_of, by_hand):
    mixed = {**OTHERS, **old("api")}
    mixed["2"] = narrow_t5(mixed["2"])
    graph = arrived(comfy_client, mixed)
    assert json.dumps({key: graph[key] for key in OTHERS}) == json.dumps(OTHERS)
    assert {graph[key]["class_type"] for key in graph.keys() - OTHERS.keys()} == {
        *(node["class_type"] for node in by_hand.values()),
        "SaveAnimatedWEBP",
    }
    assert frames_of(graph, "15").equal(frames_of(by_hand, "decode"))


def test_prompts_are_converted_where_they_keep_no_other_client_waiting(comfy_server, comfy_client):
    note = "MochiSampler (node 7): "
    prompt = {"7": {"class_type": "MochiSampler", "inputs": {"fastercache": ["8", 0]}}}
    for path in ("/prompt", "/api/prompt"):
        before = comfy_server.log.stat().st_size
        status, _ = refusal(comfy_client, path, json.dumps({"prompt": prompt}).encode())
        assert status == 400
        said = comfy_server.log.read_bytes()[before:].decode().splitlines()
        (line,) = (line for line in said if note in line)
        assert "Old Mochi workflow" in line
        assert "[MainThread]" not in line


def refusal(client, path, body, content_type="application/json"):
    """Status and body of the response to a refused request."""
    request = urllib.request.Request(client.url + path, body, {"Content-Type": content_type})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    return error.value.code, json.load(error.value)


def test_an_odd_node_beside_an_old_one_gets_the_servers_own_refusal(comfy_client):
    """The server could not refuse an old node this way: it stops at missing inputs."""
    prompt = {"1": {"class_type": "MochiSampler", "inputs": {}, "_meta": {}}, "2": {"class_type": "EmptyImage"}}
    status, answer = refusal(comfy_client, "/prompt", json.dumps({"prompt": prompt}).encode())
    assert (status, answer["error"]["type"]) == (400, "prompt_no_outputs")


def test_a_prompt_that_is_a_list_is_refused_without_a_trace(comfy_server, comfy_client):
    status, _ = refusal(comfy_client, "/prompt", b"[1]")
    assert status == 400
    assert "on_prompt_handler" not in comfy_server.log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("body", "content_type", "reason"),
    [
        (b"{", "application/json", "The workflow cannot be read: send it as JSON in UTF-8"),
        (b"\xff", "application/json", "The workflow cannot be read"),
        (b"{}", "application/json; charset=nowhere", "The workflow cannot be read"),
        (b"[" * 10**6, "application/json", "The workflow cannot be read"),
        (b'{"nodes":' + b"[" * 900 + b"]" * 900 + b"}", "application/json", "nested too deeply"),
        (b"[]", "application/json", "This is not a ComfyUI workflow"),
        (b'{"1": {"class_type": "X", "inputs": {}}}', "application/json", "There is no node of MochiWrapper"),
    ],
)
def test_the_command_is_told_in_one_sentence_what_is_wrong(comfy_client, body, content_type, reason):
    status, answer = refusal(comfy_client, "/mochi-nodes/migrate", body, content_type)
    assert status == 400
    assert reason in answer["error"]
    assert answer["error"].count(". ") == 0


def test_the_editor_offers_what_becomes_one_node(comfy_client, object_info):
    offered = comfy_client.get("/node_replacements")
    one_to_one = {name for name, rule in WRAPPER.items() if len(rule.parts) == 1}
    assert {name for name in offered if "Mochi" in name} == one_to_one
    for name in one_to_one:
        (offer,) = offered[name]
        info = object_info[offer["new_node_id"]]["input"]
        known = {**info["required"], **info.get("optional", {})}
        for mapping in offer["input_mapping"]:
            assert mapping["new_id"] in (*known, AFTER_SEED)
            if "set_value" in mapping:
                assert mapping["set_value"] in known[mapping["new_id"]][1]["options"]
