"""Other packs' workflows in a real editor: what it offers, and that the result runs."""

import json
from pathlib import Path

import pytest

OLD = Path(__file__).parents[1] / "data" / "old_workflows"

SETTINGS = {"width": 96, "height": 64, "num_frames": 13, "steps": 4, "cfg": 3.5, "seed": 1234}
SETTINGS_NODES = ["MochiTorchCompileSettings", "MochiFasterCache"]


def old(name):
    return json.loads((OLD / f"{name}.json").read_text(encoding="utf-8"))


def convert(editor):
    editor.command("mochinodes.Convert")
    editor.page.wait_for_timeout(1500)


def only(prompt, class_type):
    (node,) = (node for node in prompt.values() if node.get("class_type") == class_type)
    return node["inputs"]


@pytest.mark.parametrize("name", ["text_to_video", "download_and_load", "video_to_video", "edit_video", "stock"])
def test_command_converts_the_open_workflow(editor, name):
    editor.load(old(name), name)
    convert(editor)
    assert editor.missing() == []
    prompt = editor.prompt()
    types = {node["class_type"] for node in prompt.values()}
    assert {"Mochi1LoadTransformer", "Mochi1T5Encode", "Mochi1TiledVAEDecode"} <= types
    assert not any(t.startswith(("Mochi", "DownloadAndLoadMochi")) and not t.startswith("Mochi1") for t in types)
    assert name in editor.page.title()
    account = editor.page.evaluate("app.graph._nodes.find(node => node.type === 'MarkdownNote').widgets[0].value")
    assert "https://huggingface.co/" in account
    if name == "text_to_video":
        assert "- CLIPLoader (node 2): type sd3 becomes mochi." in account


def test_workflows_of_the_wrapper_show_the_way_unless_it_is_installed(editor):
    way = editor.page.get_by_text("This workflow was made for MochiWrapper, which is not installed.", exact=False)
    workflow = old("download_and_load")
    editor.load(workflow, "old")
    way.first.wait_for()
    shown = way.count()
    types = [node["type"] for node in workflow["nodes"]]
    editor.page.evaluate(
        "types => types.forEach(type => type.includes('Mochi') && LiteGraph.registerNodeType(type, class extends LGraphNode {}))",
        types,
    )
    editor.load(workflow, "again")
    editor.page.wait_for_timeout(2000)
    assert way.count() <= shown
    editor.page.reload()
    editor.wait_until_ready()


def test_command_says_when_there_is_nothing_to_convert(editor):
    editor.page.evaluate("app.graph.clear()")
    convert(editor)
    editor.page.get_by_text("There is no node of MochiWrapper", exact=False).first.wait_for()


def test_builtin_graphs_get_an_offer_once_and_are_left_alone(editor):
    before = old("stock")
    editor.page.evaluate("localStorage.removeItem('mochinodes.Offered')")  # a user who has never been asked
    offer = editor.page.get_by_text("This workflow uses ComfyUI's built-in Mochi", exact=False)
    editor.load(before, "stock")
    offer.first.wait_for()
    assert editor.node_types() == [node["type"] for node in before["nodes"]]
    editor.page.reload()
    editor.wait_until_ready()
    editor.load(before, "again")
    editor.page.wait_for_timeout(2000)
    assert offer.count() == 0


def test_replace_all_carries_the_settings_over_and_the_result_runs(editor):
    editor.load(with_our_t5(old("text_to_video")), "old")
    editor.page.get_by_role("button", name="View details").first.click()
    editor.page.get_by_role("button", name="Replace All").first.click()
    editor.page.wait_for_timeout(1500)
    assert set(editor.missing()) == set(SETTINGS_NODES)
    sampler = only(editor.prompt(), "Mochi1Sampler")
    assert {name: sampler[name] for name in SETTINGS} == SETTINGS
    delete(editor, SETTINGS_NODES)  # as docs/migrate.md says
    assert editor.missing() == []
    run_from_the_button(editor)


@pytest.mark.parametrize("name", ["text_to_video", "stock"])
def test_converted_workflow_runs_from_the_button(editor, name):
    editor.load(old(name) if name == "stock" else with_our_t5(old(name)), name)
    convert(editor)
    run_from_the_button(editor)


def delete(editor, types):
    editor.page.evaluate(
        "types => app.graph._nodes.filter(node => types.includes(node.type)).forEach(node => app.graph.remove(node))",
        types,
    )


def run_from_the_button(editor):
    editor.page.evaluate("app.nodeOutputs = {}")
    editor.page.get_by_test_id("queue-button").click()
    editor.page.wait_for_function("Object.values(app.nodeOutputs).some(output => output.images)", timeout=120_000)


def with_our_t5(workflow):
    """Needed because the host's own loader only accepts the real T5."""
    for node in workflow["nodes"]:
        if node["type"] == "CLIPLoader":
            node |= {"type": "Mochi1LoadT5", "widgets_values": [node["widgets_values"][0], "auto", "default"]}
    return workflow
