"""What a person does in the editor who has never read the documentation."""

import pytest

from mochi_core import seconds_to_frames
from tests.harness.browser import PLAYING, label
from tests.harness.locales import read as texts_of
from tests.harness.templates import editor_form

NODES = list(texts_of("en"))  # of all nodes, as tests/comfy/test_locales.py sees to
WATCH_PREVIEWS = """() => {
    window.previews = 0;
    window.comfyAPI.api.api.addEventListener("b_preview_with_metadata", () => { window.previews += 1; });
}"""


def select(editor, node_type):
    editor.page.evaluate(
        "type => { const node = app.graph._nodes.find(node => node.type === type);"
        " app.canvas.selectNode(node); app.canvas.centerOnNode(node); }",
        node_type,
    )
    editor.page.wait_for_timeout(300)


def set_widget(editor, node_type, name, value):
    editor.page.evaluate(
        "([type, name, value]) => { const node = app.graph._nodes.find(node => node.type === type);"
        " const widget = node.widgets.find(widget => widget.name === name);"
        " widget.value = value; widget.callback?.(value); }",
        [node_type, name, value],
    )


def test_run_button_makes_a_video_that_plays_and_shows_it_on_the_way(editor):
    editor.errors.clear()
    editor.load(editor_form("tiny_mochi"), "tiny")
    editor.page.evaluate(WATCH_PREVIEWS)
    editor.page.get_by_test_id("queue-button").click()
    editor.page.wait_for_function(PLAYING, timeout=120_000)
    size = editor.page.locator("video").first.evaluate("video => [video.videoWidth, video.videoHeight]")
    assert size == [64, 64]
    assert editor.page.evaluate("window.previews") >= 1
    assert editor.errors == []


def test_three_runs_make_three_videos(editor):
    editor.load(editor_form("tiny_mochi"), "tiny")
    set_widget(editor, "Mochi1Sampler", "steps", 1)
    editor.page.evaluate("window.files = []")
    editor.page.evaluate(
        "window.comfyAPI.api.api.addEventListener('executed', event => window.files.push(...event.detail.output.images))"
    )
    editor.page.evaluate("app.queuePrompt(0, 3)")
    editor.page.wait_for_function("window.files.length === 3", timeout=60_000)
    assert len(set(editor.page.evaluate("window.files.map(file => file.filename)"))) == 3


def queue_with_width(editor, width):
    """Queue the tiny workflow with a width that the editor itself would not let a person type."""
    workflow = editor_form("tiny_mochi")
    (sampler,) = (node for node in workflow["nodes"] if node["type"] == "Mochi1Sampler")
    sampler["widgets_values"][0] = width
    editor.load(workflow, "invalid")
    editor.page.get_by_test_id("queue-button").click()


def test_width_out_of_range_is_told_once_at_its_input(editor):
    queue_with_width(editor, 5000)
    editor.page.get_by_text("The value 5000 for Mochi Sampler's width is above the maximum 4096.").first.wait_for()
    ((error,),) = editor.page.evaluate("Object.values(app.lastNodeErrors).map(node => node.errors)")
    assert error["extra_info"]["input_name"] == "width"


def test_invalid_width_is_explained_in_the_error_panel(editor):
    queue_with_width(editor, 100)
    editor.page.get_by_text("Mochi Sampler failed").first.wait_for()
    editor.page.get_by_role("button", name="View details").first.click()
    panel = editor.page.get_by_text("width is 100, but Mochi needs a multiple of 16; use 96 or 112.").first
    panel.wait_for()
    assert panel.is_visible()
    assert editor.page.evaluate("app.graph._nodes.find(node => node.type === 'Mochi1Sampler').has_errors")


def test_lengths_are_shown_in_the_other_unit(editor):
    editor.load(editor_form("fast_preview"), "fast")
    assert label(editor, "Mochi1Length", "seconds") == "seconds (37 frames)"
    for seconds in (2.0, 0.5, 0.9, 1.3):  # in the middle between two lengths, both sides have to go up
        set_widget(editor, "Mochi1Length", "seconds", seconds)
        assert label(editor, "Mochi1Length", "seconds") == f"seconds ({seconds_to_frames(seconds)} frames)"
    assert label(editor, "Mochi1Sampler", "num_frames") == "num_frames"  # comes from the link
    editor.load(editor_form("genmo_exact"), "exact")
    assert label(editor, "Mochi1Sampler", "num_frames") == "num_frames (5.4 s)"
    set_widget(editor, "Mochi1Sampler", "num_frames", 31)
    assert label(editor, "Mochi1Sampler", "num_frames") == "num_frames (1 s)"


@pytest.mark.parametrize("node_type", NODES)
def test_help_opens(editor, node_type):
    editor.errors.clear()
    editor.page.evaluate("type => { app.graph.clear(); app.graph.add(LiteGraph.createNode(type)); }", node_type)
    select(editor, node_type)
    editor.page.get_by_test_id("info-button").first.click()
    help_page = editor.page.locator(".node-help-content").first
    help_page.wait_for(state="visible")
    editor.page.wait_for_timeout(500)
    text = help_page.inner_text()
    assert "Common errors" in text
    images = help_page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert images
    assert all(images)
    assert editor.errors == []
