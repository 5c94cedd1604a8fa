"""The templates in a real editor."""

from urllib.parse import urlencode

import pytest

from tests.harness.pictures import THUMBNAIL
from tests.harness.server import PACK
from tests.harness.templates import NAMES, TITLES, api_form, editor_form, essence


def test_browser_lists_every_template_with_its_thumbnail(editor):
    editor.command("Comfy.BrowseTemplates")
    editor.page.get_by_role("dialog").get_by_text("Mochi Nodes", exact=True).first.click()
    cards = editor.page.locator("[data-testid^='template-workflow-Mochi']")
    cards.first.wait_for()
    shown = cards.evaluate_all("cards => cards.map(card => card.dataset.testid.replace('template-workflow-', ''))")
    assert shown[:2] == [TITLES["text_to_video"], TITLES["tiny_mochi"]]
    assert shown[2:] == sorted(shown[2:], key=str.lower)
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


def test_link_opens_a_template(editor, templates_server):
    editor.errors.clear()
    title = TITLES["fast_preview"]
    editor.page.goto(f"{templates_server.url}/?{urlencode({'template': title, 'source': PACK})}")
    editor.page.wait_for_function("title => document.title.includes(title)", arg=title)
    assert "Mochi1Length" in editor.node_types()
    assert editor.errors == []
