"""The templates on a real server. No page is open here: Playwright and the client cannot share a thread."""

import pytest

from tests.harness.client import ComfyClient
from tests.harness.frames import read_frames
from tests.harness.semantics import main_color
from tests.harness.template_files import shrunk
from tests.harness.templates import FOLDER, NAMES, TITLES, api_form, files

STAYS = {"masked": "yellow", "extend_video": "yellow"}
"""The given video's circle is in the half that is not regenerated, or continues."""
LENGTHS = {"extend_video": 31 + 25 - 19}
"""Lengths that differ from the new video's: the given one is put before all but the kept frames."""
STEPS = 16
"""Enough to show a prompt's colour."""


def test_files_are_what_the_source_says(templates_server):
    definitions = ComfyClient(templates_server.url).get("/object_info")
    for path, text in files(definitions).items():
        assert path.read_text(encoding="utf-8") == text, (
            f"run `python dev.py generate templates`; {path} is older than its source"
        )
    assert {path.stem for path in FOLDER.glob("*.json")} == set(TITLES.values())
    assert {path.stem for path in FOLDER.glob("api/*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_runs_to_a_video(templates_server, name):
    client = ComfyClient(templates_server.url)
    run = client.run(shrunk(api_form(name), "a green square moving left", STEPS))
    assert run.outcome == "execution_success", run.error
    frames = read_frames(client.download(run.files[0]))
    assert len(frames) == LENGTHS.get(name, 25)
    assert frames[0].shape == (64, 64, 3)
    assert main_color(frames / 255) == STAYS.get(name, "green")
