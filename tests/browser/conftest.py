"""The editor on a server with all files that the templates name."""

import pytest


@pytest.fixture(scope="module")
def editor(templates_server):
    from tests.harness.browser import open_editor

    with open_editor(templates_server.url) as editor:
        yield editor
