"""The client that people copy, run as they would run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.demo import small_prompt
from tests.harness.frames import read_frames

CLIENT = Path(__file__).parents[2] / "workflows" / "api" / "client.py"
SMALL = ("6.width=96", "6.height=64", "6.num_frames=13")


@pytest.fixture
def start(comfy_server, tmp_path):
    """Start the client on the shipped workflow; its downloads go into `tmp_path`."""

    def start(*changes):
        workflow = CLIENT.parent / "text_to_video.json"
        command = [sys.executable, str(CLIENT), comfy_server.url, str(workflow), *SMALL, *changes]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture
def finish(start):
    def finish(*changes):
        process = start(*changes)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return finish


def test_video_is_downloaded_and_progress_shown(finish, tmp_path, comfy_client):
    code, out, err = finish("6.steps=3", "6.seed=71", "4.prompt=7 kites. Wind = strong.", "9.filename_prefix=kites")
    assert code == 0, err
    assert "node 6: 3 of 3" in out
    path = tmp_path / out.splitlines()[-1]
    assert path.name.startswith("kites_")
    video = read_frames(path.read_bytes())
    assert len(video) == 13
    assert video[0].shape == (64, 96, 3)
    prompts = [entry["prompt"][2]["4"]["inputs"]["prompt"] for entry in comfy_client.get("/history").values()]
    assert prompts[-1] == "7 kites. Wind = strong."


def test_the_same_again_comes_from_the_cache(finish):
    _, first, _ = finish("6.steps=2", "6.seed=72")
    code, again, err = finish("6.steps=2", "6.seed=72")
    assert code == 0, err
    assert "node 6" in first
    assert "node 6" not in again
    assert first.splitlines()[-1] == again.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("6.width=100", "width is 100, but Mochi needs a multiple of 16; use 96 or 112."),
        ("1.model_name=nowhere.safetensors", "Value not in list: model_name: 'nowhere.safetensors' not in ["),
        ("6.step=3", "step"),
    ],
)
def test_a_refusal_is_the_servers_sentence(finish, change, words):
    code, _, err = finish(change)
    assert code == 1
    assert words in err
    assert "Traceback" not in err


def test_a_refused_output_is_not_overlooked_where_another_is_made(comfy_server, tmp_path):
    """The server accepts such a workflow, and makes what it can."""
    graph = small_prompt(steps=1, num_frames=1)
    graph["10"] = {"class_type": "SaveVideo", "inputs": {**graph["9"]["inputs"], "format": "stone tablet"}}
    workflow = tmp_path / "two_outputs.json"
    workflow.write_text(json.dumps(graph), encoding="utf-8")
    command = [sys.executable, str(CLIENT), comfy_server.url, str(workflow)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Value not in list: format: 'stone tablet' not in" in done.stderr


def test_runs_of_others_are_not_shown(finish, comfy_client):
    """The server tells everyone about prompts that came without a client's name."""
    graph = small_prompt(steps=100)
    graph["theirs"] = graph.pop("6")
    graph["7"]["inputs"]["samples"] = ["theirs", 0]
    comfy_client.post("/prompt", {"prompt": graph})
    code, out, err = finish("6.steps=2", "6.seed=74")
    assert code == 0, err
    assert "node 6" in out
    assert "theirs" not in out


def test_a_cancelled_run_says_so(start, comfy_client):
    process = start("6.steps=200", "6.seed=73")
    next(line for line in process.stdout if "node 6" in line)
    comfy_client.interrupt()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "The run was cancelled." in err
