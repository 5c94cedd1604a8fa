"""A server with everything that the templates name, and the editor on it."""

import pytest


@pytest.fixture(scope="session")
def templates_server(comfy_path, tmp_path_factory):
    from tests.harness.server import ComfyServer
    from tests.harness.template_files import write_files

    base = tmp_path_factory.mktemp("templates")
    write_files(base)
    with ComfyServer(comfy_path, base) as server:
        yield server


@pytest.fixture(scope="module")
def editor(templates_server):
    from tests.harness.browser import open_editor

    with open_editor(templates_server.url) as editor:
        yield editor
