"""Workflows made for MochiWrapper and for ComfyUI's built-in Mochi, converted to our nodes."""

import json
import os
import random
import shutil
import sys
from copy import deepcopy
from functools import reduce
from pathlib import Path

import pytest

from migrate import migrate, migrate_prompt
from migrate.__main__ import main
from migrate.account import add_account
from migrate.downloads import PUBLIC_FILES
from migrate.editor import LINK_FIELDS
from migrate.our_nodes import NEW_NODES
from migrate.tables import WRAPPER

OLD = Path(__file__).parents[1] / "data" / "old_workflows"
MOCHI = f"mochi{os.sep}"
EDITOR_FORMS = ("text_to_video", "download_and_load", "video_to_video", "edit_video", "stock")


def old(name):
    return json.loads((OLD / f"{name}.json").read_text(encoding="utf-8"))


def migrated(name):
    return migrate(old(name), stock=name == "stock")


def records(graph):
    return [link if isinstance(link, dict) else dict(zip(LINK_FIELDS, link, strict=True)) for link in graph["links"]]


def summary(graph):
    """{id: (type, values, {input: origin})} of a graph in the editor's form, from its links alone."""
    inputs = {node["id"]: {} for node in graph["nodes"]}
    names = {node["id"]: [slot["name"] for slot in node["inputs"]] for node in graph["nodes"]}
    for link in records(graph):
        if link["target_id"] in names:
            name = names[link["target_id"]][link["target_slot"]]
            inputs[link["target_id"]][name] = (link["origin_id"], link["origin_slot"])
    return {node["id"]: (node["type"], node["widgets_values"], inputs[node["id"]]) for node in graph["nodes"]}


def assert_links_agree(graph):
    """Both ends of every link name it with the same type, and nothing names a link that does not exist."""
    nodes, links = {node["id"]: node for node in graph["nodes"]}, records(graph)
    assert len({link["id"] for link in links}) == len(links)
    for link in links:
        if link["origin_id"] in nodes:
            output = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert link["id"] in output["links"], link
            assert output["type"] == link["type"], link
        if link["target_id"] in nodes:
            slot = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert slot["link"] == link["id"], link
            assert slot["type"] in (link["type"], "*"), link
    named = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None]
    named_at_origin = [n for node in nodes.values() for slot in node["outputs"] for n in slot["links"] or []]
    inside = {link["id"] for link in links if link["target_id"] in nodes}
    assert sorted(named) == sorted(inside)
    assert sorted(named_at_origin) == sorted(link["id"] for link in links if link["origin_id"] in nodes)
    assert "MOCHI" not in json.dumps(graph).replace('"name": "MOCHIVAE"', "")


@pytest.mark.parametrize("name", EDITOR_FORMS)
def test_links_agree_and_the_rest_stays(name):
    before, after = old(name), migrated(name).workflow
    assert_links_agree(after)
    assert {key: after[key] for key in ("groups", "extra", "config", "version")} == {
        key: before[key] for key in ("groups", "extra", "config", "version")
    }
    nodes = {node["id"]: node for node in before["nodes"]}
    for node in after["nodes"]:
        was = nodes.get(node["id"])
        if was:
            looks = ("pos", "size", "flags", "order", "mode", "title", "color", "bgcolor")
            assert [node.get(key) for key in looks] == [was.get(key) for key in looks]
        if node["type"] in NEW_NODES:
            assert node["properties"]["Node name for S&R"] == node["type"]
            assert node["properties"]["cnr_id"] == "mochi-nodes"
            assert "ver" not in node["properties"]


def test_what_is_given_stays_as_it_is():
    for name in (*EDITOR_FORMS, "api"):
        given, copy = old(name), old(name)
        migrate(given, stock=True)
        assert given == copy


def test_text_to_video():
    nodes = summary(migrated("text_to_video").workflow)
    assert nodes == {
        1: ("Mochi1LoadTransformer", ["mochi_preview_bf16.safetensors", "bf16"], {}),
        2: ("CLIPLoader", ["t5xxl_fp16.safetensors", "mochi"], {}),
        3: ("Mochi1LoadVAE", ["mochi_vae.safetensors", "fp32", "none"], {}),
        4: ("Mochi1T5Encode", ["a red panda eating bamboo"], {"clip": (2, 0)}),
        5: ("Mochi1T5Encode", ["low quality"], {"clip": (2, 0)}),
        6: (
            "Mochi1Sampler",
            [96, 64, 13, 4, 3.5, 1234, "increment", 1, 1.0],
            {"model": (1, 0), "positive": (4, 0), "negative": (5, 0), "steps": (11, 0)},
        ),
        7: ("Mochi1TiledVAEDecode", [0.0], {"samples": (6, 0), "vae": (3, 0)}),
        8: ("SaveAnimatedWEBP", ["mochi", 24, True, 80, "default"], {"images": (7, 0)}),
        11: ("PrimitiveNode", [4, "fixed"], {}),
        12: ("Note", ["Made for the wrapper."], {}),
    }


def test_text_to_video_reports_what_mattered_and_nothing_else():
    notes = migrated("text_to_video").notes
    starts = [
        "CLIPLoader (node 2): type sd3 becomes mochi.",
        "The model (node 1): the link to compile_args is dropped",
        "The model (node 1): attention_mode sage_attn is dropped",
        "MochiTextEncode (node 4): force_offload False is dropped",
        "Negative (node 5): strength 0.5 is dropped",
        "MochiSampler (node 6): the link to fastercache is dropped",
        "MochiTorchCompileSettings (node 9) is removed",
        "MochiFasterCache (node 10) is removed",
    ]
    assert len(notes) == len(starts)
    assert all(note.startswith(start) and note.endswith(".") for note, start in zip(notes, starts, strict=True)), notes


def test_files_of_converted_nodes_can_be_downloaded():
    offered = {
        file["name"]: file["directory"]
        for name in ("text_to_video", "download_and_load")
        for node in migrated(name).workflow["nodes"]
        for file in node["properties"].get("models", [])
    }
    assert offered == {
        "mochi_preview_bf16.safetensors": "diffusion_models",
        "mochi_vae.safetensors": "vae",
        f"mochi{os.sep}mochi_preview_bf16.safetensors": "diffusion_models",
        f"mochi{os.sep}mochi_vae.safetensors": "vae",
    }


def test_a_linked_widget_keeps_its_slot():
    sampler = next(n for n in migrated("text_to_video").workflow["nodes"] if n["type"] == "Mochi1Sampler")
    assert sampler["inputs"][-1] == {"name": "steps", "type": "INT", "link": 14, "widget": {"name": "steps"}}
    assert [slot["name"] for slot in sampler["inputs"][:5]] == ["model", "positive", "negative", "latent", "sigmas"]


def covers(one, other):
    (ax, ay), (aw, ah), (bx, by), (bw, bh) = (
        [float(number) for number in (value.values() if isinstance(value, dict) else value)]
        for value in (one["pos"], one["size"], other["pos"], other["size"])
    )
    return ax < bx + bw and bx < ax + aw and ay < by + bh and by < ay + ah


def test_the_account_of_a_conversion_is_a_note_in_it():
    migration = migrated("text_to_video")
    add_account(migration.workflow, migration.notes)
    *others, note = migration.workflow["nodes"]
    assert note["type"] == "MarkdownNote"
    assert note["id"] == migration.workflow["last_node_id"] == max(node["id"] for node in others) + 1
    assert not any(covers(note, other) for other in others)
    (text,) = note["widgets_values"]
    assert [line[2:] for line in text.splitlines() if line.startswith("- ")][: len(migration.notes)] == migration.notes
    assert f"]({PUBLIC_FILES['mochi_preview_bf16.safetensors'].url}), into models/diffusion_models" in text


@pytest.mark.parametrize(
    "properties",
    [
        {"models": None},
        {"models": "x"},
        {"models": ["x", None]},
        {"models": [{"name": "x", "url": "y"}]},
        {"models": [{"name": ["x"], "url": "y", "directory": "z"}]},
        "x",
        None,
    ],
    ids=str,
)
def test_files_that_are_not_asked_for_in_the_editors_form_are_left_out(properties):
    workflow = migrated("text_to_video").workflow
    for node in workflow["nodes"]:
        node["properties"] = deepcopy(properties)
    add_account(workflow, [])
    assert workflow["nodes"][-1]["widgets_values"] == ["Everything was carried over.\n\n"]


def test_one_loader_becomes_two():
    migration = migrated("download_and_load")
    nodes = summary(migration.workflow)
    assert nodes[4] == ("Mochi1LoadTransformer", [f"{MOCHI}mochi_preview_bf16.safetensors", "fp8_e4m3fn"], {})
    assert nodes[19] == ("Mochi1LoadVAE", [f"{MOCHI}mochi_vae.safetensors", "auto", "none"], {})
    assert nodes[14][2] == {"model": (4, 0), "positive": (1, 0), "negative": (8, 0)}
    assert nodes[15] == ("Mochi1TiledVAEDecode", [0.0], {"samples": (14, 0), "vae": (19, 0)})
    assert nodes[1][2] == nodes[8][2] == {"clip": (2, 0)}
    assert not {17, 18} & set(nodes)
    assert migration.workflow["last_node_id"] == 19
    (vae,) = (node for node in migration.workflow["nodes"] if node["id"] == 19)
    assert vae["pos"][0] == 465
    assert not [other["id"] for other in migration.workflow["nodes"] if other is not vae and covers(vae, other)]
    said = "\n".join(migration.notes)
    assert "precision fp8_e4m3fn_fast becomes fp8_e4m3fn; products are computed in 16 bits." in said
    assert "the link to trigger is dropped" in said
    assert "MochiLatentPreview (node 17) is removed" in said
    assert "PreviewImage (node 18) is removed with it" in said


def test_a_link_from_a_removed_node_is_reported():
    graph = old("download_and_load")
    next(node for node in graph["nodes"] if node["id"] == 18)["type"] = "ImageBlur"
    migration = migrate(graph)
    assert summary(migration.workflow)[18] == ("ImageBlur", [], {})
    assert (
        "ImageBlur (node 18) has lost the link to images, which came from MochiLatentPreview (node 17)."
        in migration.notes
    )


def test_video_to_video():
    nodes = summary(migrated("video_to_video").workflow)
    assert nodes[3] == ("Mochi1LoadVAE", ["mochi_vae.safetensors", "bf16", "none"], {})
    assert nodes[4] == ("Mochi1LoadVAE", ["mochi_vae.safetensors", "fp32", "none"], {})
    assert nodes[8] == ("Mochi1VAEEncode", [], {"pixels": (7, 0), "vae": (4, 0)})
    assert nodes[9] == ("Mochi1Sigmas", [4, 0.03, 2, 0.8], {})
    assert nodes[10][1] == [96, 64, 13, 4, 2.5, 99, "randomize", 1, 1.0]
    assert nodes[10][2] == {
        "model": (1, 0), "positive": (5, 0), "negative": (6, 0), "latent": (8, 0), "sigmas": (9, 0),
    }  # fmt: skip
    assert nodes[11][2] == {"": (3, 0)}  # the reroute, now for a VAE
    assert nodes[12][2] == {"samples": (10, 0), "vae": (11, 0)}


def test_api_form():
    migration = migrated("api")
    assert migration.workflow == {
        "1": {
            "inputs": {"prompt": "a red panda", "clip": ["2", 0]},
            "class_type": "Mochi1T5Encode",
            "_meta": {"title": "Mochi TextEncode"},
        },
        "2": {
            "inputs": {"clip_name": "t5xxl_fp16.safetensors", "type": "mochi"},
            "class_type": "CLIPLoader",
            "_meta": {"title": "Load CLIP"},
        },
        "4": {
            "inputs": {"model_name": f"{MOCHI}mochi_preview_bf16.safetensors", "weight_dtype": "fp32"},
            "class_type": "Mochi1LoadTransformer",
            "_meta": {"title": "(Down)load Mochi Model"},
        },
        "8": {
            "inputs": {"prompt": "", "clip": ["2", 0]},
            "class_type": "Mochi1T5Encode",
            "_meta": {"title": "Mochi TextEncode"},
        },
        "14": {
            "inputs": {
                "width": 96, "height": 64, "num_frames": 13, "steps": 4, "cfg": 3.5, "seed": 1234,
                "batch_size": 1, "denoise": 1.0, "model": ["4", 0], "positive": ["1", 0], "negative": ["8", 0],
            },
            "class_type": "Mochi1Sampler",
            "_meta": {"title": "Mochi Sampler"},
        },
        "15": {
            "inputs": {"memory": 0.0, "samples": ["14", 0], "vae": ["16", 0]},
            "class_type": "Mochi1TiledVAEDecode",
            "_meta": {"title": "Mochi VAE Decode Spatial Tiling"},
        },
        "9": old("api")["9"],
        "16": {
            "inputs": {"vae_name": f"{MOCHI}mochi_vae.safetensors", "dtype": "auto", "second_file": "none"},
            "class_type": "Mochi1LoadVAE",
            "_meta": {"title": "(Down)load Mochi Model"},
        },
    }  # fmt: skip


def test_stock_graph_is_left_alone_unless_asked():
    with pytest.raises(ValueError, match="stay as they are, and work; --stock"):
        migrate(old("stock"))
    migration = migrated("stock")
    nodes, before = summary(migration.workflow), summary(old("stock"))
    assert nodes == before | {
        1: ("Mochi1LoadTransformer", ["mochi_preview_bf16.safetensors", "auto"], {}),
        2: ("Mochi1LoadT5", ["t5xxl_fp16.safetensors", "auto", "cpu"], {}),
        3: ("Mochi1LoadVAE", ["mochi_vae.safetensors", "auto", "none"], {}),
        4: ("Mochi1T5Encode", ["a (red:1.2) panda"], {"clip": (2, 0)}),
        5: ("Mochi1T5Encode", [""], {"clip": (2, 0)}),
        8: ("Mochi1TiledVAEDecode", [0.0], {"samples": (7, 0), "vae": (3, 0)}),
    }
    assert migration.notes == [
        "CLIPTextEncode (node 4): brackets are text for T5 Encode, no weights.",
        "CLIPTextEncode (node 5): an empty prompt now means no text at all, as in Genmo's code; it was one end token.",
        "VAEDecodeTiled (node 8) needs no tiles any more: frames stream through the decoder.",
    ]


def test_stock_nodes_of_another_model_stay():
    graph = old("stock")
    graph["nodes"] += [
        {
            "id": 20,
            "type": "UNETLoader",
            "inputs": [],
            "outputs": [],
            "widgets_values": ["flux1.safetensors", "default"],
        },
        {"id": 21, "type": "VAELoader", "inputs": [], "outputs": [], "widgets_values": ["ae.safetensors"]},
        {
            "id": 22,
            "type": "CLIPLoader",
            "inputs": [],
            "outputs": [],
            "widgets_values": ["t5xxl_fp16.safetensors", "sd3"],
        },
        {"id": 23, "type": "VAEDecode", "inputs": [{"name": "vae", "link": None}], "outputs": [], "widgets_values": []},
    ]
    types = {node["id"]: node["type"] for node in migrate(graph, stock=True).workflow["nodes"]}
    assert [types[i] for i in (20, 21, 22, 23)] == ["UNETLoader", "VAELoader", "CLIPLoader", "VAEDecode"]
    assert [types[i] for i in (1, 2, 3)] == ["Mochi1LoadTransformer", "Mochi1LoadT5", "Mochi1LoadVAE"]


def as_objects(graph):
    return {**graph, "links": records(graph)}


@pytest.mark.parametrize("name", EDITOR_FORMS)
def test_links_may_be_objects(name):
    newer = migrate(as_objects(old(name)), stock=name == "stock")
    assert newer.workflow == as_objects(migrated(name).workflow)


def in_a_subgraph(graph):
    """Everything but the CLIP loader and the saving moves into a subgraph."""
    outside = {2: "clip", 8: "images"}
    links = records(graph)
    for link in links:
        if link["origin_id"] == 2:
            link |= {"origin_id": -10, "origin_slot": 0}
        if link["target_id"] == 8:
            link |= {"target_id": -20, "target_slot": 0}
    inner = {
        "id": "sub",
        "name": "Mochi",
        "nodes": [node for node in graph["nodes"] if node["id"] not in outside],
        "links": links,
        "inputs": [{"name": "clip", "type": "CLIP", "linkIds": [2]}],
        "outputs": [{"name": "images", "type": "IMAGE", "linkIds": [9]}],
        "state": {"lastNodeId": 12},
    }
    instance = {
        "id": 30,
        "type": "sub",
        "inputs": [{"name": "clip", "type": "CLIP", "link": 1}],
        "outputs": [{"name": "images", "type": "IMAGE", "links": [2]}],
        "widgets_values": [],
    }
    loader, save = (deepcopy(next(node for node in graph["nodes"] if node["id"] == i)) for i in outside)
    loader["outputs"][0]["links"], save["inputs"][0]["link"] = [1], 2
    root = {**graph, "nodes": [loader, instance, save], "definitions": {"subgraphs": [inner]}}
    return {**root, "links": [[1, 2, 0, 30, 0, "CLIP"], [2, 30, 0, 8, 0, "IMAGE"]], "last_node_id": 30}


def test_subgraphs():
    migration = migrate(in_a_subgraph(old("text_to_video")))
    (inner,) = migration.workflow["definitions"]["subgraphs"]
    assert_links_agree(migration.workflow)
    assert_links_agree(inner)
    whole, nodes = summary(migrated("text_to_video").workflow), summary(inner)
    assert nodes[4] == (*whole[4][:2], {"clip": (-10, 0)})
    assert nodes[5] == (*whole[5][:2], {"clip": (-10, 0)})
    assert {key: nodes[key] for key in (1, 3, 6, 7)} == {key: whole[key] for key in (1, 3, 6, 7)}
    assert inner["inputs"][0]["linkIds"] == [2, 3]
    assert inner["outputs"][0]["linkIds"] == [9]
    assert any("in Mochi) needs a CLIP" in note for note in migration.notes)


def test_a_subgraph_passes_a_model_on():
    graph = old("text_to_video")
    graph["definitions"] = {
        "subgraphs": [
            {
                "name": "loader",
                "nodes": [node for node in old("download_and_load")["nodes"] if node["id"] == 4],
                "links": [
                    {"id": n, "origin_id": 4, "origin_slot": i, "target_id": -20, "target_slot": i, "type": kind}
                    for i, (n, kind) in enumerate([(16, "MOCHIMODEL"), (23, "MOCHIVAE")])
                ],
                "outputs": [
                    {"name": "a", "type": "MOCHIMODEL", "linkIds": [16]},
                    {"name": "b", "type": "MOCHIVAE", "linkIds": [23]},
                ],
            }
        ]
    }
    (inner,) = migrate(graph).workflow["definitions"]["subgraphs"]
    assert_links_agree(inner)
    assert [(slot["type"], slot["linkIds"]) for slot in inner["outputs"]] == [("MODEL", [16]), ("VAE", [23])]
    assert [(link["origin_id"], link["origin_slot"]) for link in inner["links"]] == [(4, 0), (13, 0)]


@pytest.mark.parametrize(
    ("file", "precision", "weight_dtype", "said"),
    [
        ("m.safetensors", "fp8_e4m3fn", "fp8_e4m3fn", ""),
        ("m.safetensors", "fp8_e4m3fn_fast", "fp8_e4m3fn", "products are computed in 16 bits."),
        ("m.safetensors", "fp8_e5m2", "fp8_e4m3fn", "fp8_e5m2 becomes fp8_e4m3fn; it is as small, and"),
        ("m.safetensors", "fp16", "fp16", ""),
        ("m.safetensors", "int3", "auto", "precision int3 becomes auto; the loader has no such precision."),
        ("mochi_preview_dit_GGUF_Q8_0.safetensors", "fp8_e4m3fn", "auto", ""),
        ("mochi-Q4_0.gguf", "fp8_e4m3fn_fast", "auto", ""),
    ],
)
def test_precision_is_one_that_the_loader_has(file, precision, weight_dtype, said):
    graph = {"1": {"class_type": "MochiModelLoader", "inputs": {"model_name": file, "precision": precision}}}
    migration = migrate(graph)
    assert migration.workflow["1"]["inputs"]["weight_dtype"] == weight_dtype
    assert len(migration.notes) == bool(said)
    assert said in "".join(migration.notes)


def test_nodes_for_editing_videos():
    """The schedule bypasses the node that only makes it end at 0."""
    migration = migrated("edit_video")
    nodes = summary(migration.workflow)
    models = {"model": (1, 0), "negative": (6, 0)}
    assert 10 not in nodes
    assert nodes[11] == ("FlipSigmas", [], {"sigmas": (9, 0)})
    assert nodes[12] == ("Mochi1Invert", [0.1, 7, "fixed"], {})
    assert nodes[13] == (
        "Mochi1Sampler",
        [848, 480, 163, 64, 1.0, 5, "fixed", 1, 1.0],
        {**models, "positive": (6, 0), "latent": (8, 0), "sigmas": (11, 0), "sampler": (12, 0)},
    )
    assert nodes[14] == ("Mochi1RFEdit", [0.8, 1.0, 0.8, "linear_decrease", 2, 7], {"latent": (8, 0)})
    assert nodes[15][1] == [848, 480, 163, 64, 4.5, 5, "fixed", 1, 1.0]
    assert nodes[15][2] == {
        **models, "positive": (5, 0), "latent": (13, 0), "sigmas": (9, 0), "sampler": (14, 0),
    }  # fmt: skip
    about = [note for note in migration.notes if "sample" in note.lower() or "Sigmas" in note]
    assert about == [
        "Resample (node 15): add_noise True is dropped; Mochi Invert and Mochi RF Edit start from the LATENT itself.",
        "MochiPrepareSigmas (node 10) is removed; schedules end at 0 already.",
    ]


@pytest.mark.parametrize(
    ("old", "expected", "said"),
    [
        ({"eta": 0.9, "start_step": 0, "end_step": 5}, 0.9, ""),
        ({"eta": 1.5, "start_step": 0, "end_step": 5}, 1.0, "eta 1.5 becomes 1.0; more goes beyond what it aims at"),
        ({"eta": 0.9, "start_step": 5, "end_step": 5}, 0.0, "eta 0.9 becomes 0.0; its steps ended before they began"),
        ({"eta": 0.9, "start_step": 0, "end_step": 0}, 0.0, "eta 0.9 becomes 0.0; its steps ended before they began"),
    ],
)
def test_the_pull_of_a_resampler(old, expected, said):
    migration = migrate({"1": {"class_type": "MochiResampler", "inputs": old}})
    assert migration.workflow["1"]["inputs"]["eta"] == expected
    assert said in "".join(migration.notes)
    assert bool(migration.notes) == bool(said)


def test_sigmas_that_come_from_nowhere():
    graph = {
        "1": {"class_type": "MochiPrepareSigmas", "inputs": {}},
        "2": {"class_type": "MochiWrapperSamplerCustom", "inputs": {"sigmas": ["1", 0]}},
    }
    migration = migrate(graph)
    assert "sigmas" not in migration.workflow["2"]["inputs"]
    assert any("has lost the link to sigmas, which came from nothing." in note for note in migration.notes)


def test_settings_of_latents_are_reported_if_they_are_not_the_usual():
    graph = old("api")
    graph["15"]["inputs"]["unnormalize"] = False
    assert any("unnormalize False is dropped" in note for note in migrate(graph).notes)


@pytest.mark.parametrize("name", ["mochi\\a.safetensors", "mochi/a.safetensors"])
def test_file_names_get_the_separator_of_this_system(name):
    graph = {"1": {"class_type": "MochiVAELoader", "inputs": {"model_name": name}}}
    assert migrate(graph).workflow["1"]["inputs"]["vae_name"] == f"mochi{os.sep}a.safetensors"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([96, 64, 13, 4, 3.5, 7, "increment", 0], [96, 64, 13, 4, 3.5, 7, "increment"]),
        ([96, 64, 13, 4, 3.5, 7, "increment"], [96, 64, 13, 4, 3.5, 7, "increment"]),
        ([96, 64, 13, 4, 3.5, 7], [96, 64, 13, 4, 3.5, 7, "fixed"]),
        ([96, 64, 13, 4, 3.5, 7, 0], [96, 64, 13, 4, 3.5, 7, "fixed"]),
        ([96, 64], [96, 64, 49, 50, 4.5, 0, "fixed"]),
        (None, [848, 480, 49, 50, 4.5, 0, "fixed"]),
    ],
)
def test_nodes_of_any_age(values, expected):
    graph = {"nodes": [{"id": 1, "type": "MochiSampler", "widgets_values": values}], "links": []}
    (node,) = migrate(graph).workflow["nodes"]
    assert node["widgets_values"] == [*expected, 1, 1.0]


def test_a_clip_link_that_the_editor_left_behind_is_mended():
    """Replacing MochiTextEncode in the editor leaves links from its second output."""
    graph = migrated("api").workflow
    graph["8"]["inputs"]["clip"] = ["1", 1]
    assert migrate(graph).workflow["8"]["inputs"]["clip"] == ["2", 0]


def test_clip_without_a_source_is_reported():
    graph = {"1": {"class_type": "MochiTextEncode", "inputs": {"prompt": "x", "clip": ["1", 1]}}}
    migration = migrate(graph)
    assert migration.workflow["1"]["inputs"] == {"prompt": "x"}
    assert "needs a CLIP from Load Mochi T5" in migration.notes[0]


def graph_of(*nodes, links=(), **rest):
    """A graph in the editor's form: nodes are (id, type, widgets, names of inputs); both ends of the links name them."""
    made = []
    for key, kind, widgets, names in nodes:
        into = {link[4]: link[0] for link in links if link[3] == key}
        slots = sorted({link[2] for link in links if link[1] == key})
        outputs = [
            {"name": str(slot), "type": "*", "links": [n for n, *ends in links if ends[:2] == [key, slot]]}
            for slot in range(max(slots, default=-1) + 1)
        ]
        inputs = [{"name": name, "type": "*", "link": into.get(i)} for i, name in enumerate(names)]
        made.append({"id": key, "type": kind, "inputs": inputs, "outputs": outputs, "widgets_values": widgets})
    return {"nodes": made, "links": [list(link) for link in links], **rest}


def test_a_node_of_others_keeps_all_links_of_inputs_with_one_name():
    links = [[1, 1, 0, 3, 0, "*"], [2, 2, 1, 3, 1, "*"], [3, 1, 0, 3, 2, "*"], [4, 4, 0, 3, 3, "*"]]
    graph = graph_of(
        (1, "LoadImage", [], ()),
        (2, "DownloadAndLoadMochiModel", ["m", "v"], ()),
        (3, "Switch", [], ("any", "any", "any", "any")),
        (4, "MochiLatentPreview", [], ()),
        links=links,
    )
    migration = migrate(graph)
    assert migration.workflow["links"] == [links[0], [2, 5, 0, 3, 1, "*"], links[2]]
    switch = next(node for node in migration.workflow["nodes"] if node["id"] == 3)
    assert [slot["link"] for slot in switch["inputs"]] == [1, 2, 3, None]
    assert "lost the link to any (input 4)" in "".join(migration.notes)


def test_nodes_of_others_in_a_prompt_arrive_as_they_are():
    others = {
        "20": {"class_type": "Foreign", "inputs": {"control_after_generate": "fixed", "b": ["7", 0], "a": ["14", 0]}},
        "21": {
            "class_type": "Foreign",
            "inputs": {"list": {"__value__": [1]}, "late": ["3", 1.0], "x": None},
            "more": 1,
        },
        "a": {"class_type": "NoInputs"},
        "b": {"inputs": {}},
        "c": 5,
        "d": {"class_type": "Foreign", "inputs": {"a": ["14", 0]}, "_meta": []},
    }
    graph = {**others, **old("api")}
    after = migrate(graph).workflow
    assert {key: after[key] for key in others} == others
    assert list(after) == [*graph, "22"]
    assert {key: json.dumps(after[key]) for key in others} == {key: json.dumps(others[key]) for key in others}
    assert after["14"]["class_type"] == "Mochi1Sampler"


def test_a_new_node_has_the_id_of_no_odd_one():
    after = migrate({**old("api"), "99": None}).workflow
    assert after["99"] is None
    assert after["100"]["class_type"] == "Mochi1LoadVAE"


def test_old_nodes_that_another_pack_runs_stay():
    graph = old("api")
    graph["20"] = {"class_type": "MochiTorchCompileSettings", "inputs": {}}
    graph["4"]["inputs"]["compile_args"] = ["20", 0]
    after = migrate_prompt(graph, runs={"MochiTextEncode", "MochiTorchCompileSettings"}).workflow
    assert [after[key] for key in ("1", "8", "2", "20")] == [graph[key] for key in ("1", "8", "2", "20")]
    assert after["14"]["class_type"] == "Mochi1Sampler"
    with pytest.raises(ValueError, match="no node of MochiWrapper"):
        migrate_prompt(old("api"), runs={*WRAPPER})


def test_preview_of_two_removed_nodes_is_removed_once():
    graph = {
        "1": {"class_type": "MochiSampler", "inputs": {}},
        "2": {"class_type": "MochiLatentPreview", "inputs": {"samples": ["1", 0]}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0], "more": ["2", 0]}},
    }
    assert list(migrate(graph).workflow) == ["1"]


def large_graph(count):
    """A graph of `count` unrelated nodes with five inputs each, and one of the wrapper's."""
    ends = [(i, n, 1 if n else i % count + 1) for i in range(1, count + 1) for n in range(5)]
    links = [[number, origin, 0, i, n, "*"] for number, (i, n, origin) in enumerate(ends, 1)]
    listed = {}
    for link in links:
        listed.setdefault(link[1], []).append(link[0])
    nodes = []
    for key in range(1, count + 1):
        inputs = [{"name": f"in{n}", "link": (key - 1) * 5 + n + 1} for n in range(5)]
        outputs = [{"name": "out", "links": listed[key]}]
        nodes.append({"id": key, "type": "Foreign", "inputs": inputs, "outputs": outputs, "widgets_values": []})
    nodes.append({"id": count + 1, "type": "MochiSigmaSchedule", "widgets_values": []})
    return {"nodes": nodes, "links": links}


def calls_of(action):
    """Number of function calls, Python and C: a measure of work that does not depend on the machine's load."""
    calls = 0

    def count(_frame, event, _argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        result = action()
    finally:
        sys.setprofile(None)
    return result, calls


def test_work_grows_with_the_graph_and_no_faster():
    """For each output, records are looked up, not searched for."""
    _, few = calls_of(lambda: migrate(large_graph(300)))
    graph = large_graph(3000)
    migration, many = calls_of(lambda: migrate(graph))
    assert many < 15 * few
    assert migration.workflow["links"] == graph["links"]
    assert migration.workflow["nodes"][:3000] == graph["nodes"][:3000]


def chain(count, kind, users):
    """A CLIP that passes through a chain of `count` nodes of a kind to `users` encoders."""
    name, slot = ("clip", 1) if kind == "MochiTextEncode" else ("", 0)
    prompt = {"0": {"class_type": "CLIPLoader", "inputs": {"clip_name": "t5.safetensors", "type": "sd3"}}}
    for i in range(1, count + 1):
        prompt[str(i)] = {"class_type": kind, "inputs": {name: [str(i - 1), slot if i > 1 else 0]}}
    for i in range(users):
        prompt[f"user {i}"] = {"class_type": "MochiTextEncode", "inputs": {"prompt": "x", "clip": [str(count), slot]}}
    return prompt


@pytest.mark.parametrize("kind", ["Reroute", "MochiTextEncode"])
def test_chains_are_followed_in_linear_time(kind):
    _, few = calls_of(lambda: migrate(chain(50, kind, 50)))
    migration, many = calls_of(lambda: migrate(chain(500, kind, 500)))
    assert many < 15 * few
    assert migration.workflow["0"]["inputs"]["type"] == "mochi"
    assert migration.workflow["user 499"]["inputs"]["clip"] == (["0", 0] if kind == "MochiTextEncode" else ["500", 0])


def graph_without_lines(*nodes, extra=None):
    """A CLIP loader linked to node 2, an encoder 9 whose CLIP has no line, and `nodes`: (id, type, values, output)."""
    loader = {"id": 1, "type": "CLIPLoader", "widgets_values": ["t5.safetensors", "sd3"]}
    loader["outputs"] = [{"name": "CLIP", "type": "CLIP", "links": [1]}]
    encoder = {"id": 9, "type": "MochiTextEncode", "widgets_values": ["x"], "outputs": []}
    encoder["inputs"] = [{"name": "clip", "type": "CLIP", "link": None}]
    others = [
        {
            "id": key,
            "type": kind,
            "widgets_values": values,
            "inputs": [{"name": "*", "type": "*", "link": 1 if key == 2 else None}],
        }
        for key, kind, values in nodes
    ]
    return {"nodes": [loader, *others, encoder], "links": [[1, 1, 0, 2, 0, "*"]], "extra": extra}


def with_line(graph, origin, target):
    link = 1 + len(graph["links"])
    ends = {node["id"]: node for node in graph["nodes"]}
    ends[origin]["outputs"] = [{"name": "CLIP", "type": "*", "links": [link]}]
    ends[target]["inputs"][0]["link"] = link
    graph["links"].append([link, origin, 0, target, 0, "CLIP"])
    return graph


SENT = {"downstream": 9, "downstream_slot": 0, "upstream": "1", "upstream_slot": 0, "controller": 2, "type": "CLIP"}
WITHOUT_LINES = {
    "SetNode": with_line(graph_without_lines((2, "SetNode", ["T5"]), (3, "GetNode", ["T5"])), 3, 9),
    "easy setNode": with_line(graph_without_lines((2, "easy setNode", ["T5"]), (3, "easy getNode", ["T5"])), 3, 9),
    "two names": with_line(
        graph_without_lines((2, "SetNode", ["a"]), (4, "SetNode", ["b"]), (3, "GetNode", ["a"])), 3, 9
    ),
    "Anything Everywhere": graph_without_lines((2, "Anything Everywhere", [])),
    "and saved": graph_without_lines((2, "Anything Everywhere?", []), extra={"ue_links": [SENT]}),
    "and through a reroute": with_line(
        graph_without_lines((2, "Reroute (rgthree)", []), (3, "Anything Everywhere3", [])), 2, 3
    ),
}


@pytest.mark.parametrize("name", WITHOUT_LINES)
def test_a_clip_that_comes_without_a_line_is_loaded_for_mochi(name):
    graph = WITHOUT_LINES[name]
    migration = migrate(graph)
    assert migration.notes == ["CLIPLoader (node 1): type sd3 becomes mochi."]
    nodes = {node["id"]: node for node in migration.workflow["nodes"]}
    assert nodes[1]["widgets_values"] == ["t5.safetensors", "mochi"]
    assert nodes[9]["type"] == "Mochi1T5Encode"
    assert migration.workflow["links"] == graph["links"]
    assert nodes[9]["inputs"][0]["link"] == graph["nodes"][-1]["inputs"][0]["link"]


@pytest.mark.parametrize(
    "saved",
    [
        [],
        None,
        {},
        [None],
        [{}],
        [{**SENT, "downstream_slot": 5}],
        [{**SENT, "upstream": [1]}],
        [{**SENT, "upstream": 77}],
    ],
)
def test_a_clip_that_comes_from_nowhere_is_reported(saved):
    graph = graph_without_lines((2, "Anything Everywhere?", []), (3, "GetNode", []), extra={"ue_links": saved})
    graph["nodes"][1]["mode"] = 4  # bypassed
    migration = migrate(graph)
    assert migration.notes == [
        "MochiTextEncode (node 9) needs a CLIP from Load Mochi T5, or from Load CLIP with type mochi."
    ]


@pytest.mark.parametrize("kind", ["GetNode", "Anything Everywhere"])
def test_who_else_uses_a_clip_without_a_line_is_found(kind):
    graph = with_line(graph_without_lines((2, "SetNode", ["T5"]), (3, "GetNode", ["T5"]), (4, kind, ["T5"])), 3, 9)
    graph["nodes"].append(
        {"id": 5, "type": "CLIPTextEncode", "inputs": [{"name": "clip", "type": "CLIP", "link": None}]}
    )
    graph = with_line(graph, 4, 5) if kind == "GetNode" else with_line(with_line(graph, 3, 9), 3, 4)
    (note,) = migrate(graph).notes
    assert note.startswith("CLIPLoader (node 1) keeps its type sd3, as CLIPTextEncode (node 5) uses it, too")


@pytest.mark.parametrize("form", ["editor", "api"])
def test_a_clip_loader_that_others_use_keeps_its_type(form):
    if form == "api":
        graph = old("api")
        graph["20"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "x", "clip": ["2", 0]}}
    else:
        graph = old("text_to_video")
        graph["nodes"] += graph_of((20, "Reroute", [], ("",)), (21, "CLIPTextEncode", ["x"], ("clip",)))["nodes"]
        graph["links"] += [[20, 2, 0, 20, 0, "CLIP"], [21, 20, 0, 21, 0, "CLIP"]]
        for key, link in ((20, 20), (21, 21)):
            next(node for node in graph["nodes"] if node["id"] == key)["inputs"][0]["link"] = link
    migration = migrate(graph)
    text = json.dumps(migration.workflow)
    assert '"t5xxl_fp16.safetensors", "sd3"' in text or '"type": "sd3"' in text
    (note,) = (note for note in migration.notes if "sd3" in note)
    assert "CLIPTextEncode (node 2" in note
    assert "Load CLIP of its own with type mochi" in note


def test_a_clip_loader_that_our_nodes_use_too_becomes_mochi():
    graph = old("api")
    graph["20"] = {"class_type": "Mochi1T5Encode", "inputs": {"prompt": "x", "clip": ["2", 0]}}
    assert migrate(graph).workflow["2"]["inputs"]["type"] == "mochi"


def stock_with_vae(file, decode_of=None):
    """The built-in graph in API form, decoding with the VAE of node 3 or with the checkpoint's."""

    def node(class_type, **inputs):
        return {"class_type": class_type, "inputs": inputs}

    return {
        "1": node("UNETLoader", unet_name="mochi.safetensors", weight_dtype="default"),
        "3": node("VAELoader", vae_name=file),
        "4": node("ModelSamplingSD3", model=["1", 0]),
        "6": node("EmptyMochiLatentVideo", width=96),
        "7": node("KSampler", model=["4", 0], latent_image=["6", 0]),
        "8": node("LatentBlend", samples1=["7", 0]),
        "9": node("VAEDecode", samples=["8", 0], vae=decode_of or ["3", 0]),
        "20": node("CheckpointLoaderSimple", ckpt_name="sdxl"),
        "21": node("VAEEncode", pixels=["9", 0], vae=["3", 0]),
        "22": node("KSampler", model=["20", 0], latent_image=["21", 0]),
        "23": node("VAEDecode", samples=["22", 0], vae=["3", 0] if decode_of else ["20", 2]),
    }


def test_the_vae_that_decodes_mochis_samples_is_the_one():
    after = migrate(stock_with_vae("renamed.safetensors"), stock=True)
    assert after.workflow["3"]["class_type"] == "Mochi1LoadVAE"
    assert after.workflow["9"]["class_type"] == "Mochi1TiledVAEDecode"
    assert after.workflow["23"]["class_type"] == "VAEDecode"


def test_the_vae_of_another_model_stays_although_it_is_the_only_one():
    graph = stock_with_vae("sdxl_vae.safetensors", decode_of=["20", 2])
    migration = migrate(graph, stock=True)
    assert migration.workflow["1"]["class_type"] == "Mochi1LoadTransformer"
    assert {key: migration.workflow[key] for key in graph if key != "1"} == {k: graph[k] for k in graph if k != "1"}
    assert any(note.startswith("VAELoader (node 3) stays as it is") for note in migration.notes)


def test_the_only_transformer_is_left_if_no_mochi_latent_meets_it():
    graph = stock_with_vae("mochi_vae.safetensors")
    graph["1"]["inputs"]["unet_name"] = "renamed.safetensors"
    assert migrate(graph, stock=True).workflow["1"]["class_type"] == "Mochi1LoadTransformer"
    graph["4"]["inputs"]["model"] = ["20", 0]
    migration = migrate(graph, stock=True)
    assert migration.workflow["1"] == graph["1"]
    assert any(note.startswith("UNETLoader (node 1) stays as it is") for note in migration.notes)


def test_that_an_empty_prompt_means_something_else_is_said():
    for name, text in (("api", "MochiTextEncode"), ("stock", "CLIPTextEncode")):
        (note,) = (note for note in migrated(name).notes if "no text at all" in note)
        assert note.startswith(("Mochi TextEncode (node 8): ", "CLIPTextEncode (node 5): ")), text
    graph = {"1": {"class_type": "MochiTextEncode", "inputs": {"prompt": ["2", 0], "clip": ["3", 0]}}}
    assert "no text at all" not in "".join(migrate(graph).notes)


@pytest.mark.parametrize("separator", [">", "/"])
def test_group_nodes_are_reported(separator):
    groups = {"My loaders": {"nodes": [{"type": "MochiModelLoader"}], "links": []}, "Other": {"nodes": [{"type": "X"}]}}
    uses = [{"id": i, "type": f"workflow{separator}{name}"} for i, name in enumerate(groups, 30)]
    graph = old("text_to_video")
    graph["nodes"] += uses
    graph["extra"] = {"groupNodes": groups}
    (note,) = (note for note in migrate(graph).notes if "Group nodes" in note)
    assert "My loaders" in note
    with pytest.raises(ValueError, match=r"ungroup.*My loaders"):
        migrate({"nodes": uses, "links": [], "extra": {"groupNodes": groups}})
    with pytest.raises(ValueError, match=r"There is no node of MochiWrapper in this workflow\.$"):
        migrate({"nodes": uses[1:], "links": [], "extra": {"groupNodes": groups}})


def test_too_deep_a_workflow_is_refused():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        migrate({"nodes": [], "links": [], "extra": deep})


@pytest.mark.parametrize(
    "workflow",
    [
        [],
        {},
        None,
        3,
        {"nodes": 3},
        {"nodes": [{"id": 1}]},
        {"nodes": [], "links": [[1, 2]]},
        {"a": {"class_type": "x"}},
    ],
)
def test_what_is_no_workflow(workflow):
    with pytest.raises(ValueError, match="This is not a ComfyUI workflow"):
        migrate(workflow)


JUNK = (None, -1, 1.5, "", "x", True, [], [[]], [None], {}, {"a": 1})


def places(value, path=()):
    """The paths of all values inside."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("name", [*EDITOR_FORMS, "api"])
def test_damaged_workflows_are_converted_or_refused(name):
    """Whatever replaces a value, the result is a workflow or a ValueError, nothing else."""
    chance = random.Random(0)
    refused = 0
    for path in places(old(name)):
        workflow = old(name)
        *outer, last = path
        reduce(lambda inside, key: inside[key], outer, workflow)[last] = deepcopy(chance.choice(JUNK))
        try:
            json.dumps(migrate(workflow, stock=True).workflow)
        except ValueError:
            refused += 1
    assert refused == 0 if name == "api" else refused > 10  # a prompt's odd nodes stay, and the rest is converted


def test_command_writes_beside_and_reports(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_bytes(b"\xef\xbb\xbf" + (OLD / "text_to_video.json").read_bytes())
    assert main([str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "old-mochi1.json")
    expected = migrated("text_to_video")
    assert err.splitlines() == expected.notes
    add_account(expected.workflow, expected.notes)
    assert json.loads(Path(out.strip()).read_text(encoding="utf-8")) == expected.workflow


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", [], "is not a JSON file"),
        ("[1, 2]", [], "This is not a ComfyUI workflow"),
        ('{"1": {"class_type": "KSampler", "inputs": {}}}', [], "no node of MochiWrapper"),
        ('{"1": {"class_type": "EmptyMochiLatentVideo", "inputs": {}}}', [], "--stock puts ours in their place"),
        ("{}", ["-o", "old.json"], "exists already"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, capsys, monkeypatch, content, options, message):
    monkeypatch.chdir(tmp_path)
    path = Path("old.json")
    path.write_text(content, encoding="utf-8")
    assert main([str(path), *options]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out
    assert [item.name for item in tmp_path.iterdir()] == ["old.json"]
    assert path.read_text(encoding="utf-8") == content


def test_halves_of_surrogate_pairs_arrive_as_they_were(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"1": {"class_type": "MochiTextEncode", "inputs": {"prompt": "\\ud83d ü"}}}', encoding="utf-8")
    assert main([str(path)]) == 0
    text = (tmp_path / "old-mochi1.json").read_text(encoding="utf-8")
    assert '"prompt": "\\ud83d ü"' in text
    assert json.loads(text)["1"]["inputs"]["prompt"] == "\ud83d ü"


def test_command_that_cannot_write_leaves_what_was_there(tmp_path, capsys, monkeypatch):
    for name in ("old.json", "new.json"):
        shutil.copy(OLD / "api.json", tmp_path / name)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main([str(tmp_path / "old.json"), "-o", str(tmp_path / "new.json"), "--force"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(file.read_bytes() for file in tmp_path.iterdir()) == [(OLD / "api.json").read_bytes()] * 2


def test_command_without_a_name_of_a_file(capsys):
    assert main([""]) == 2
    assert capsys.readouterr().err.startswith("error: ")
