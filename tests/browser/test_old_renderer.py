"""The same nodes, drawn on the canvas as ComfyUI did before its "Nodes 2.0"."""

from tests.harness.browser import label, open_editor
from tests.harness.templates import NAMES, editor_form

# Whether the node of a subgraph shows a prompt's tokens and the memory as badges.
BADGES = """tokens => {
    const said = app.graph._nodes.find(node => node.subgraph).badges.map(badge => (badge.text ?? badge().text));
    return said.includes(tokens) && said.some(text => text.startsWith("about ") && !text.includes(";"));
}"""


def test_old_renderer_opens_and_names_everything_too(templates_server):
    with open_editor(templates_server.url, **{"Comfy.VueNodes.Enabled": False}) as editor:
        editor.load(editor_form("tiny_mochi"), "tiny")
        assert editor.missing() == []
        assert label(editor, "Mochi1Sampler", "num_frames") == "num_frames (0.8 s)"
        editor.page.get_by_text("9 of 256 tokens", exact=True).wait_for()
        editor.page.get_by_test_id("queue-button").click()
        editor.page.wait_for_function("Object.keys(app.nodeOutputs).length > 0", timeout=120_000)
        editor.page.evaluate(
            "app.graph._nodes.find(node => node.type === 'Mochi1Sampler').widgets[0].value = 100; app.queuePrompt(0, 1)"
        )
        editor.page.get_by_role("alert").filter(has_text="use 96 or 112").wait_for()
        assert label(editor, "Mochi1Sampler", "width") == "\u26a0 width"
        for name in NAMES:
            editor.load(editor_form(name), name)
            assert editor.crowded() == [], name
        editor.load(editor_form("text_to_video"), "outside")
        editor.page.wait_for_function(BADGES, arg="26 of 256 tokens", timeout=20_000)
        assert editor.errors == []
