"""The templates in a real editor."""

import json

import pytest

from tests.harness.browser import PLAYING
from tests.harness.demo import template_link
from tests.harness.pictures import THUMBNAIL
from tests.harness.templates import NAMES, TITLES, api_form, editor_form, essence
from workflows.source import BF16, TEXT_TO_VIDEO, VAE

SMALL = {
    "prompt": "a red star moving to the right", "width": 64, "height": 64, "num_frames": 7, "steps": 1,
    "model_name": "mochi_tiny.safetensors", "t5_name": "t5_tiny.safetensors", "vae_name": "mochi_tiny_vae.safetensors",
}  # fmt: skip
# Values of the widgets that the subgraph's node shows, and a node that saves its video.
SET_AND_SAVE = """values => {
    const [made] = app.graph._nodes, save = LiteGraph.createNode("SaveVideo");
    for (const widget of made.widgets) if (widget.name in values) widget.value = values[widget.name];
    app.graph.add(save);
    save.pos = [made.pos[0] + 500, made.pos[1]];
    made.connect(0, save, save.inputs.findIndex(input => input.type === "VIDEO"));
}"""


def test_browser_lists_every_template_with_its_thumbnail(editor):
    editor.open_templates()
    cards = editor.page.locator("[data-testid^='template-workflow-Mochi']")
    cards.first.wait_for()
    shown = cards.evaluate_all("cards => cards.map(card => card.dataset.testid.replace('template-workflow-', ''))")
    assert shown == [*TITLES.values()]
    for title in TITLES.values():
        card = editor.page.get_by_test_id(f"template-workflow-{title}")
        card.scroll_into_view_if_needed()
        picture = card.locator("img").first
        picture.wait_for(state="visible")
        editor.page.wait_for_function("image => image.complete", arg=picture.element_handle())
        assert picture.evaluate("image => image.naturalWidth") == THUMBNAIL
    editor.close_dialogs()


@pytest.mark.parametrize("name", NAMES)
def test_opens_without_complaint_and_means_the_same_as_its_api_form(editor, name):
    editor.errors.clear()
    editor.load(editor_form(name), name)
    assert editor.missing() == []
    assert editor.errors == []
    assert essence(editor.prompt()) == essence(api_form(name))
    assert editor.crowded() == []


def test_blueprint_is_found_by_search_and_makes_a_video(editor):
    """Uses the tiny model's files, which are listed like any others."""
    editor.errors.clear()
    editor.load({"nodes": [], "links": [], "version": 0.4}, "empty")
    editor.page.mouse.dblclick(800, 600)
    editor.page.get_by_role("combobox").last.wait_for()
    editor.page.keyboard.type("text to video mochi")
    editor.page.get_by_text(TEXT_TO_VIDEO.name, exact=True).first.wait_for()
    editor.page.wait_for_timeout(1000)  # the search starts once typing has stopped
    editor.page.keyboard.press("Enter")
    editor.page.mouse.click(800, 600)
    editor.page.wait_for_function("app.graph._nodes.length === 1")
    assert {node["class_type"] for node in editor.prompt().values()} >= {"Mochi1LoadTransformer", "Mochi1Sampler"}
    editor.page.evaluate(SET_AND_SAVE, SMALL)
    editor.page.get_by_test_id("queue-button").click()
    editor.page.wait_for_function(PLAYING, timeout=60_000)
    size = editor.page.locator("video").first.evaluate("video => [video.videoWidth, video.videoHeight]")
    assert size == [64, 64]
    assert editor.errors == []


def test_app_mode_runs_from_prompt_to_video(editor):
    workflow = editor_form("text_to_video")
    (node,) = (node for node in workflow["nodes"] if node["type"] == workflow["definitions"]["subgraphs"][0]["id"])
    node["widgets_values"][:5] = ["a red star", 64, 64, 7, 1]
    editor.load(workflow, "app")
    editor.command("Comfy.ToggleLinear")
    for name in ("prompt", "frames (30 a second)", "seed"):
        editor.page.get_by_text(name, exact=True).locator("visible=true").first.wait_for()
    seeds = []
    for _ in range(2):
        editor.page.evaluate("app.nodeOutputs = {}")
        editor.page.get_by_role("button", name="Run", exact=True).last.click()
        editor.page.wait_for_function("Object.values(app.nodeOutputs).some(output => output.images)", timeout=60_000)
        editor.page.locator("video").locator("visible=true").first.wait_for()
        seeds.append(next(n["inputs"]["seed"] for n in editor.prompt().values() if n["class_type"] == "Mochi1Sampler"))
    assert len(set(seeds)) == 2
    editor.command("Comfy.ToggleLinear")


def test_link_opens_a_template(editor, templates_server):
    editor.errors.clear()
    title = TITLES["fast_preview"]
    editor.page.goto(template_link(templates_server.url, title))
    editor.page.wait_for_function("title => document.title.includes(title)", arg=title)
    assert "Mochi1Length" in editor.node_types()
    assert editor.errors == []


# Must be last: it leaves a panel open, which moves other graphs.
def test_missing_files_are_offered_for_download(editor):
    text = json.dumps(editor_form("text_to_video"))
    for name in (BF16, VAE):
        text = text.replace(name, f"absent_{name}")
    editor.load(json.loads(text), "missing")
    editor.page.get_by_role("button", name="View details").first.click()
    editor.page.get_by_text("Missing Models").first.wait_for()
    editor.page.get_by_role("button", name="Download all").first.wait_for()
