"""The templates in a real editor."""

import pytest

from tests.harness.pictures import THUMBNAIL
from tests.harness.templates import NAMES, essence, read


def test_browser_lists_every_template_with_its_thumbnail(editor):
    editor.command("Comfy.BrowseTemplates")
    editor.page.get_by_role("dialog").get_by_text("Mochi Nodes", exact=True).first.click()
    for name in NAMES:
        card = editor.page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        picture = card.locator("img").first
        picture.wait_for(state="visible")
        editor.page.wait_for_function("image => image.complete", arg=picture.element_handle())
        assert picture.evaluate("image => image.naturalWidth") == THUMBNAIL
    editor.close_dialogs()


@pytest.mark.parametrize("name", NAMES)
def test_opens_without_complaint_and_means_the_same_as_its_api_form(editor, name):
    editor.errors.clear()
    editor.load(read(f"{name}.json"), name)
    assert editor.missing() == []
    assert editor.errors == []
    assert essence(editor.prompt()) == essence(read("api", f"{name}.json"))
