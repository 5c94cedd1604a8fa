"""The editor in another language: it shows the translations and queues the same prompt."""

import pytest

from tests.harness.browser import open_editor
from tests.harness.client import ComfyClient
from tests.harness.locales import read as texts_of
from tests.harness.templates import api_form, editor_form, essence

LANGUAGE = "zh"
SHOWN = """types => Object.fromEntries(types.map(type => {
    const node = LiteGraph.createNode(type);
    return [type, {
        title: node.title,
        widgets: Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.label])),
        inputs: Object.fromEntries(node.inputs.map(input => [input.name, input.localized_name])),
    }];
}))"""


@pytest.fixture(scope="module")
def translated(templates_server):
    with open_editor(templates_server.url, **{"Comfy.Locale": LANGUAGE}) as editor:
        yield editor
    ComfyClient(templates_server.url).post("/settings", {"Comfy.Locale": "en"})


def test_names_are_shown_in_that_language(translated):
    texts = texts_of(LANGUAGE)
    for node, shown in translated.page.evaluate(SHOWN, list(texts)).items():
        names = {key: entry["name"] for key, entry in texts[node]["inputs"].items()}
        assert shown["title"] == texts[node]["display_name"]
        assert shown["inputs"] == names
        # A length is followed by its value in another unit.
        assert all(label.startswith(names[key]) for key, label in shown["widgets"].items() if key in names)
    assert translated.errors == []


def test_the_prompt_is_the_same(translated):
    translated.load(editor_form("text_to_video"), "text")
    assert essence(translated.prompt()) == essence(api_form("text_to_video"))
