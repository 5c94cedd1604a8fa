"""The client that users copy, run as they would run it."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.harness.demo import open_browser, small_prompt
from tests.harness.frames import read_frames
from tests.harness.templates import TITLES
from workflows.api.client import download, main, queue

CLIENT = Path(__file__).parents[2] / "workflows" / "api" / "client.py"
WORKFLOW = CLIENT.with_name("text_to_video.json")
NO_SERVER = "http://127.0.0.1:1"
SMALL = ("6.width=96", "6.height=64", "6.num_frames=13")


@pytest.fixture
def start(comfy_server, tmp_path):
    """Start the client on the shipped workflow; its downloads go into `tmp_path`."""

    def start(*changes, stdout=subprocess.PIPE):
        command = [sys.executable, str(CLIENT), comfy_server.url, str(WORKFLOW), *SMALL, *changes]
        return subprocess.Popen(command, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True)

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
    assert "Mochi Sampler: 3 of 3" in out.splitlines()
    path = tmp_path / out.splitlines()[-1]
    assert path.name.startswith("kites_")
    video = read_frames(path.read_bytes())
    assert len(video) == 13
    assert video[0].shape == (64, 96, 3)
    *_, last = comfy_client.get("/history").values()
    assert last["prompt"][2]["4"]["inputs"]["prompt"] == "7 kites. Wind = strong."


def test_the_same_again_comes_from_the_cache(finish):
    _, first, _ = finish("6.steps=2", "6.seed=72")
    code, again, err = finish("6.steps=2", "6.seed=72")
    assert code == 0, err
    assert "Mochi Sampler" in first
    assert "Mochi Sampler" not in again
    assert first.splitlines()[-1] == again.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("6.width=100", "width is 100, but Mochi needs a multiple of 16; use 96 or 112."),
        ("1.model_name=nowhere.safetensors", "Value not in list: model_name: 'nowhere.safetensors' not in ["),
    ],
)
def test_a_refusal_is_the_servers_sentence(finish, change, words):
    code, _, err = finish(change)
    assert code == 1
    assert words in err
    assert "Traceback" not in err


def failure(*arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return str(end.value.code)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps=3", "steps=3: say what to change as NODE.INPUT=VALUE, such as 6.seed=7."),
        ("66.steps=3", "66.steps=3: there is no node 66; there are 1 (Load Mochi Transformer), 2 (Load Mochi T5), 3 ("),
        ("6.step=3", "6.step=3: Mochi Sampler has no input step; it has model, positive, negative, width, height,"),
        ("6.steps=three", "6.steps=three: three cannot take the place of 64."),
    ],
)
def test_a_change_that_fits_nothing_is_explained(change, words):
    assert failure(NO_SERVER, str(WORKFLOW), change).startswith(words)


def test_what_is_missing_is_named():
    assert "python client.py SERVER WORKFLOW.json [NODE.INPUT=VALUE ...]" in failure()
    assert failure(NO_SERVER, str(WORKFLOW)).startswith(f"No ComfyUI answers at {NO_SERVER}: ")
    assert failure(NO_SERVER.removeprefix("http://"), str(WORKFLOW)).startswith(f"No ComfyUI answers at {NO_SERVER}: ")
    editors = WORKFLOW.parents[1] / f"{TITLES[WORKFLOW.stem]}.json"
    assert failure(NO_SERVER, str(editors)).startswith(f"{editors} is not a workflow in API form; ")
    assert failure(NO_SERVER, "gone.json") == "There is no file gone.json; the workflows are in workflows/api."


def test_a_missing_package_is_named():
    code = f"import runpy, sys; sys.modules['websockets'] = None; runpy.run_path({str(CLIENT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("is not installed; run: python -m pip install websockets\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_progress_is_one_line_in_a_terminal(start):
    terminal, end = os.openpty()
    process = start("6.steps=3", "6.seed=75", stdout=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux reports the end of a terminal
        while piece := os.read(terminal, 1024):
            shown += piece
    assert process.wait(60) == 0
    progress, _, path = shown.decode().strip().rpartition("\r")
    assert "Mochi Sampler: 3 of 3" in progress
    assert "\n" not in progress
    assert path.endswith(".mp4")


def test_a_refused_output_is_not_overlooked_where_another_is_made(comfy_server, tmp_path):
    """The server accepts such a workflow and makes what it can."""
    graph = small_prompt(steps=1, num_frames=1)
    graph["10"] = {"class_type": "SaveVideo", "inputs": {**graph["9"]["inputs"], "format": "stone tablet"}}
    workflow = tmp_path / "two_outputs.json"
    workflow.write_text(json.dumps(graph), encoding="utf-8")
    command = [sys.executable, str(CLIENT), comfy_server.url, str(workflow)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Value not in list: format: 'stone tablet' not in" in done.stderr


def test_runs_of_others_are_not_shown(finish, comfy_client):
    """The server broadcasts the progress of prompts without a client id."""
    graph = small_prompt(steps=100)
    graph["theirs"] = graph.pop("6")
    graph["7"]["inputs"]["samples"] = ["theirs", 0]
    comfy_client.post("/prompt", {"prompt": graph})
    code, out, err = finish("6.steps=2", "6.seed=74")
    assert code == 0, err
    assert [line.partition(":")[0] for line in out.splitlines()[:-1]] == ["Mochi Sampler", "Tiled VAE Decode (Mochi)"]


def test_a_cancelled_run_says_so(start, comfy_client):
    process = start("6.steps=200", "6.seed=73")
    while not comfy_client.get("/queue")["queue_running"]:
        time.sleep(0.1)
    comfy_client.interrupt()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "The run was cancelled." in err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there always are windows")
def test_serve_opens_a_browser_only_where_there_are_windows(tmp_path, monkeypatch):
    asked, script = tmp_path / "asked", tmp_path / "browser.py"
    script.write_text(f"import sys; open({str(asked)!r}, 'a').write(sys.argv[1])", encoding="utf-8")
    monkeypatch.setenv("BROWSER", f"{sys.executable} {script} %s")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    open_browser("http://127.0.0.1:1/?template=a")
    assert not asked.exists()
    monkeypatch.setenv("DISPLAY", ":0")
    open_browser("http://127.0.0.1:1/?template=b")
    assert asked.read_text(encoding="utf-8") == "http://127.0.0.1:1/?template=b"


class Proxy(BaseHTTPRequestHandler):
    """Answers for a ComfyUI that is not there."""

    def do_POST(self):
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"a video")

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy():
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    "body", [b"<html>Bad gateway</html>", b'{"detail": "no"}', b'{"error": "Unauthorized"}', b"[1]"]
)
@pytest.mark.parametrize("status", [502, 200])
def test_what_a_proxy_answers_is_one_sentence(proxy, body, status):
    proxy.body, proxy.status = body, status
    with pytest.raises(RuntimeError, match=f"{proxy.url} answers {status} .*, and not as ComfyUI does"):
        queue({}, proxy.url, "me")


def test_a_download_stays_in_its_folder(proxy, tmp_path):
    (tmp_path / "inside").mkdir()
    path = download({"filename": "../../a.mp4", "type": "output"}, proxy.url, tmp_path / "inside")
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.mp4")] == ["inside/a.mp4"]
    assert Path(path).read_bytes() == b"a video"
