"""What users do in the editor without having read the documentation."""

import json
import re

import pytest
from playwright.sync_api import expect

from mochi_core import seconds_to_frames
from tests.harness.browser import PLAYING, TIME_LEFT, label, line
from tests.harness.locales import read as texts_of
from tests.harness.templates import editor_form

NODES = list(texts_of("en"))  # all nodes, as tests/comfy/test_locales.py ensures
WATCH_PREVIEWS = """() => {
    window.previews = 0;
    window.comfyAPI.api.api.addEventListener("b_preview_with_metadata", () => { window.previews += 1; });
}"""

WATCH_ENDS = """() => {
    window.ends = [];
    for (const end of ["execution_error", "execution_success"])
        window.comfyAPI.api.api.addEventListener(end, () => { window.ends.push(end); });
}"""
WATCH_ERRORS = """
    window.failed = false;
    window.comfyAPI.api.api.addEventListener("execution_error", () => { window.failed = true; }, { once: true });
"""
QUEUE_TEXT = "(prompt => window.comfyAPI.api.api.queuePrompt(0, prompt))"
CAPTURE = "app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState();"  # as after a key press

MEMORY = re.compile(r"^about \S+ .iB to sample, plus \S+ .iB of weights; cpu has \S+ GiB$")
FEW_TOKENS = re.compile(r"^[3-6] of 256 tokens$")
# A second node for the first one's subgraph, with the same values.
SECOND_USE = """() => {
    const one = app.graph._nodes.find(node => node.subgraph), two = LiteGraph.createNode(one.type);
    two.pos = [one.pos[0], one.pos[1] + 520];
    app.graph.add(two);
    for (const { name, value } of one.widgets) two.widgets.find(widget => widget.name === name).value = value;
    return [one.id, two.id];
}"""
# Puts the sampler into a subgraph whose node shows the width; returns the text inside for two widths.
INTO_SUBGRAPH = """async width => {
    const sampler = app.graph._nodes.find(node => node.type === "Mochi1Sampler");
    const { node: outer } = app.graph.convertToSubgraph(new Set([sampler]));
    const inner = outer.subgraph.nodes.find(node => node.type === "Mochi1Sampler");
    const input = inner.inputs.find(input => input.name === "width");
    outer.subgraph.addInput("width", "INT").connect(input, inner);
    const said = [];
    for (const value of [outer.widgets.find(widget => widget.name === "width").value, width]) {
        outer.widgets.find(widget => widget.name === "width").value = value;
        window.comfyAPI.api.api.dispatchCustomEvent("graphChanged", {});
        const text = () => inner.widgets.find(widget => widget.name === "forecast").element.textContent;
        for (let i = 0; i < 200 && (!text() || text() === said.at(-1)); i++)
            await new Promise(resolve => setTimeout(resolve, 100));
        said.push(text());
    }
    return said;
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
    set_widget(editor, "Mochi1Sampler", "seed", 81)  # not used before
    editor.page.evaluate(WATCH_PREVIEWS)
    editor.page.get_by_test_id("queue-button").click()
    editor.page.get_by_text(TIME_LEFT).first.wait_for(timeout=60_000)
    editor.page.wait_for_function(PLAYING, timeout=120_000)
    assert line(editor, "Mochi1Sampler").startswith("about ")
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
    """Queue the tiny workflow with a width that the editor itself would not accept."""
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


SENTENCE = "width is 100, but Mochi needs a multiple of 16; use 96 or 112."


def test_a_rule_of_ours_is_told_at_its_input_without_a_click(editor):
    queue_with_width(editor, 100)
    message = editor.page.get_by_role("alert").filter(has_text=SENTENCE)
    message.wait_for()
    assert "Mochi Sampler: width" in message.inner_text()
    wait_for_label(editor, "Mochi1Sampler", "\u26a0 width")
    assert "\u26a0" not in saved(editor)
    editor.page.get_by_role("button", name="View details").first.click()
    editor.page.get_by_test_id("runtime-error-panel").get_by_text(SENTENCE).wait_for()
    give_another_name(editor, "width", "\u26a0 breadth")  # as the rename field proposes
    wait_for_label(editor, "Mochi1Sampler", "\u26a0 breadth")  # whose value is unchanged
    assert "\u26a0" not in saved(editor)


def test_what_was_queued_before_leaves_an_error_until_its_value_is_changed(editor):
    """The second run is sent as from another window: pressing Run again would reset the error."""
    editor.load(editor_form("tiny_mochi"), "tiny")
    editor.page.evaluate(WATCH_ENDS)
    set_widget(editor, "Mochi1Sampler", "steps", 1)
    good = prompt_text(editor)
    editor.page.evaluate(f"{width_of('Mochi1Sampler')}.value = 100")  # a value that the field does not accept
    editor.page.evaluate(f"async () => {{ await app.queuePrompt(0, 1); await {QUEUE_TEXT}({good}); }}")
    editor.page.wait_for_function("window.ends.join() === 'execution_error,execution_success'", timeout=60_000)
    expect(editor.page.get_by_role("alert").filter(has_text=SENTENCE)).to_have_count(1)
    assert label(editor, "Mochi1Sampler", "width") == "\u26a0 width"
    type_width(editor, "Mochi1Sampler", 96)
    wait_for_label(editor, "Mochi1Sampler", "width")


def test_an_error_of_another_workflow_marks_nothing_here(editor):
    """Here, the node with that id is another one, or has another value."""
    editor.load(editor_form("tiny_mochi"), "tiny")
    sampler = editor.page.evaluate("app.graph._nodes.find(node => node.type === 'Mochi1Sampler').id")
    editor.page.evaluate(f"{width_of('Mochi1Sampler')}.value = 100")
    bad = prompt_text(editor)
    message = editor.page.get_by_role("alert").filter(has_text=SENTENCE)
    editor.load(editor_form("tiny_mochi"), "other")
    foreign = (
        "const other = LiteGraph.createNode('EmptyMochiLatentVideo');"
        f"app.graph.remove(app.graph.getNodeById({sampler})); other.id = {sampler}; app.graph.add(other);"
    )
    for change, kind, said in (
        ("", "Mochi1Sampler", "Mochi Sampler: width"),
        (foreign, "EmptyMochiLatentVideo", "Mochi Sampler"),
    ):
        editor.page.evaluate(f"() => {{ {change} {WATCH_ERRORS} }}")
        editor.page.evaluate(f"{QUEUE_TEXT}({bad})")
        editor.page.wait_for_function("window.failed")
        expect(message).to_have_count(1)
        expect(message).to_contain_text(said)
        wait_for_label(editor, kind, "width")


def test_in_a_subgraph_it_is_told_at_the_input_outside(editor):
    editor.load(editor_form("text_to_video"), "inside")
    kind = editor.page.evaluate("app.graph._nodes.find(node => node.subgraph).type")
    for width in (100, 120):
        set_widget(editor, kind, "width", width)
        editor.page.evaluate("app.queuePrompt(0, 1)")
        editor.page.get_by_role("alert").filter(has_text=f"width is {width}, but").wait_for()
        wait_for_label(editor, kind, "\u26a0 width")
        assert shown(editor, "Mochi1Sampler", "width")[0] == "\u26a0 width"
    assert "\u26a0" not in saved(editor)
    expect(editor.page.get_by_role("alert").filter(has_text="width is")).to_have_count(1)  # the first is gone
    type_width(editor, kind, 96)
    wait_for_label(editor, kind, "width")
    assert shown(editor, "Mochi1Sampler", "width")[0] == "width"


def test_of_two_subgraphs_that_are_alike_the_one_that_ran_is_marked(editor):
    editor.load(editor_form("text_to_video"), "twice")
    first, second = editor.page.evaluate(SECOND_USE)
    editor.page.evaluate(
        """id => {
            const two = app.graph.getNodeById(id);
            two.widgets.find(widget => widget.name === "width").value = 100;
            two.connect(0, app.graph._nodes.find(node => node.type === "SaveVideo"), 0);
            app.queuePrompt(0, 1);
        }""",
        second,
    )
    width = "(app.graph.getNodeById({}).widgets.find(widget => widget.name === 'width'))"
    editor.page.get_by_role("alert").filter(has_text=SENTENCE).wait_for()
    editor.page.wait_for_function(f"{width.format(second)}.label === '\u26a0 width'")
    assert editor.page.evaluate(f"{width.format(first)}.label") == "width"
    assert shown(editor, "Mochi1Sampler", "width")[0] == "\u26a0 width"
    editor.page.evaluate(f"{width.format(second)}.value = 96; {CAPTURE}")
    editor.page.wait_for_function(f"{width.format(second)}.label === 'width'")
    assert shown(editor, "Mochi1Sampler", "width")[0] == "width"


def saved(editor):
    return editor.page.evaluate("JSON.stringify(app.graph.serialize())")


def prompt_text(editor):
    """The prompt that the editor would queue now, including the workflow, as JSON."""
    return editor.page.evaluate("async () => JSON.stringify(await app.graphToPrompt())")


def wait_for_label(editor, node_type, text):
    """Wait until the label of a node's width is this."""
    width = width_of(node_type)
    editor.page.wait_for_function(f"text => ({width}.label ?? {width}.name) === text", arg=text)


def width_of(node_type):
    return f"app.graph._nodes.find(node => node.type === '{node_type}').widgets.find(widget => widget.name === 'width')"


def type_width(editor, node_type, width):
    node = editor.page.evaluate("type => app.graph._nodes.find(node => node.type === type).id", node_type)
    field = editor.page.locator(f'[data-node-id="{node}"] [aria-label="width"] input')
    field.focus()
    editor.page.keyboard.press("Control+A")
    editor.page.keyboard.type(str(width))
    editor.page.keyboard.press("Enter")


def give_another_name(editor, widget, name):
    """Rename a widget like the editor's own menu."""
    editor.page.evaluate(
        "([widget, name]) => { const node = app.graph._nodes.find(node => node.type === 'Mochi1Sampler');"
        " for (const slots of [node.widgets, node.inputs]) slots.find(slot => slot.name === widget).label = name;"
        f" {CAPTURE} }}",
        [widget, name],
    )


def test_lengths_are_shown_in_the_other_unit(editor):
    editor.load(editor_form("fast_preview"), "fast")
    assert label(editor, "Mochi1Length", "seconds") == "seconds (37 frames)"
    for seconds in (2.0, 0.5, 0.9, 1.3):  # midway between two lengths, both sides must round up
        set_widget(editor, "Mochi1Length", "seconds", seconds)
        assert label(editor, "Mochi1Length", "seconds") == f"seconds ({seconds_to_frames(seconds)} frames)"
    assert label(editor, "Mochi1Sampler", "num_frames") == "num_frames"  # its value comes from the link
    editor.load(editor_form("genmo_exact"), "exact")
    assert label(editor, "Mochi1Sampler", "num_frames") == "num_frames (5.4 s)"
    set_widget(editor, "Mochi1Sampler", "num_frames", 31)
    assert label(editor, "Mochi1Sampler", "num_frames") == "num_frames (1 s)"


def test_a_new_name_is_what_was_typed_and_is_followed_by_the_other_unit(editor):
    """The rename field initially contains both."""
    editor.load(editor_form("tiny_mochi"), "tiny")
    assert label(editor, "Mochi1Sampler", "num_frames") == "num_frames (0.8 s)"
    give_another_name(editor, "num_frames", "how long (0.8 s)")
    assert label(editor, "Mochi1Sampler", "num_frames") == "how long (0.8 s)"
    set_widget(editor, "Mochi1Sampler", "num_frames", 31)
    assert label(editor, "Mochi1Sampler", "num_frames") == "how long (1 s)"
    assert " s)" not in saved(editor)
    editor.load(json.loads(saved(editor)), "again")
    assert label(editor, "Mochi1Sampler", "num_frames") == "how long (1 s)"


def test_what_another_input_replaces_is_greyed(editor):
    editor.load(editor_form("fastmochi"), "fast")
    assert shown(editor, "Mochi1Sampler", "steps") == ["steps \u2190 sigmas", True]
    assert shown(editor, "Mochi1Sampler", "denoise") == ["denoise \u2190 sigmas", True]
    assert shown(editor, "Mochi1Sampler", "cfg")[1] is False
    editor.page.evaluate(
        "() => { const node = app.graph._nodes.find(node => node.type === 'Mochi1Sampler');"
        " node.disconnectInput(node.inputs.findIndex(input => input.name === 'sigmas')); }"
    )
    assert shown(editor, "Mochi1Sampler", "steps") == ["steps", False]
    editor.load(editor_form("video_to_video"), "video")
    for name in ("width", "height", "num_frames", "batch_size"):
        assert shown(editor, "Mochi1Sampler", name) == [f"{name} \u2190 latent", True]


def shown(editor, node_type, name):
    """The label of a widget, in a subgraph or not, and whether it is greyed."""
    return editor.page.evaluate(
        "([type, name]) => { const nodes = app.graph._nodes.flatMap(node => [node, ...node.subgraph?.nodes ?? []]);"
        " const node = nodes.find(node => node.type === type); const widget = node.widgets.find(widget => widget.name === name);"
        " return [widget.label, widget.disabled]; }",
        [node_type, name],
    )


def test_what_will_happen_is_said_before_it_does(editor):
    editor.load(editor_form("tiny_mochi"), "tiny")
    editor.page.get_by_text("9 of 256 tokens", exact=True).wait_for()
    set_widget(editor, "Mochi1T5Encode", "prompt", "a red kite over the sea " * 60)
    editor.page.get_by_text("The prompt has 481 tokens, but Mochi reads 256; cut off: “").wait_for()
    editor.page.get_by_text("empty: no text at all, as in Genmo's code").wait_for()
    editor.page.get_by_text(MEMORY).wait_for()
    small = line(editor, "Mochi1Sampler")
    set_widget(editor, "Mochi1Sampler", "num_frames", 163)
    editor.page.get_by_text(MEMORY).and_(editor.page.get_by_text(small, exact=True)).wait_for(state="detached")
    editor.page.get_by_text(MEMORY).wait_for()
    assert all("forecast" not in node["inputs"] for node in editor.prompt().values())


def test_the_forecast_knows_what_is_outside_of_a_subgraph(editor):
    """It knows the model, and the values on the subgraph's own node."""
    editor.load(editor_form("tiny_mochi"), "tiny")
    editor.page.get_by_text(MEMORY).wait_for()
    known = line(editor, "Mochi1Sampler")
    same, refused = editor.page.evaluate(INTO_SUBGRAPH, 100)
    assert same == known
    assert refused == "width is 100, but Mochi needs a multiple of 16; use 96 or 112."


def test_the_forecast_of_a_subgraph_is_on_its_node(editor):
    """Also after opening and leaving the subgraph, when the page redraws the node."""
    editor.load(editor_form("text_to_video"), "outside")
    outside = editor.page.locator(".mochinodes-outside")
    outside.get_by_text("26 of 256 tokens", exact=True).wait_for()
    outside.get_by_text(MEMORY).wait_for()
    editor.page.evaluate(
        "() => { const node = app.graph._nodes.find(node => node.subgraph);"
        " node.widgets.find(widget => widget.name === 'prompt').value = 'a red star';"
        " window.comfyAPI.api.api.dispatchCustomEvent('graphChanged', {});"
        " app.canvas.openSubgraph(node.subgraph, node); }"
    )
    editor.page.get_by_text(FEW_TOKENS).wait_for()
    editor.page.evaluate("app.canvas.setGraph(app.rootGraph ?? app.graph)")
    outside.get_by_text(FEW_TOKENS).wait_for()
    assert outside.count() == 2  # nothing about the negative prompt, which the node does not show
    assert editor.missing() == []


def test_each_use_of_a_subgraph_has_a_forecast_and_a_progress_of_its_own(editor):
    editor.load(editor_form("text_to_video"), "twice")
    ids = editor.page.evaluate(SECOND_USE)
    bodies = [editor.page.locator(f'[data-testid="node-body-{number}"]') for number in ids]
    bodies[1].wait_for()
    editor.page.evaluate("window.comfyAPI.api.api.dispatchCustomEvent('graphChanged', {})")  # as after a click
    first, second = (body.locator(".mochinodes-outside") for body in bodies)
    for rows in (first, second):
        rows.get_by_text("26 of 256 tokens", exact=True).wait_for()
    editor.page.evaluate(
        "id => { app.graph.getNodeById(id).widgets.find(widget => widget.name === 'prompt').value = 'a red star';"
        " window.comfyAPI.api.api.dispatchCustomEvent('graphChanged', {}); }",
        ids[1],
    )
    second.get_by_text(FEW_TOKENS).wait_for()
    first.get_by_text("26 of 256 tokens", exact=True).wait_for()
    editor.page.evaluate(
        "id => { const inner = app.graph.getNodeById(id).subgraph.nodes.find(node => node.type === 'Mochi1Sampler').id;"
        " const detail = { node: `${id}:${inner}`, prompt_id: 'p', value: 1, max: 4 };"
        " window.comfyAPI.api.api.dispatchCustomEvent('progress', detail); }",
        ids[1],
    )
    second.get_by_text("1 of 4", exact=True).wait_for()
    first.get_by_text(MEMORY).wait_for()


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
