"""Prompts distributed over processes by a real Ray: the file of prompts, and its results."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from mochi_core.__main__ import main
from mochi_core.farm.cluster import Worker, cluster
from mochi_core.farm.jobs import read_jobs, video_name
from mochi_core.farm.member import Member, outcome_of
from mochi_core.farm.run import REPORT, Farm
from mochi_core.generate import SMALLER, load_pipeline, make_file, pipeline_arguments
from mochi_core.options import add_farm
from tests.harness import trained

ROOT = Path(__file__).parents[2]
MODELS = ["--transformer", str(trained.TRANSFORMER), "--vae", str(trained.VAE), "--t5", str(trained.T5)]
NO_MODELS = ["--transformer", "none", "--vae", "none", "--t5", "none"]
SMALL = ["--device", "cpu", "--dtype", "fp32", "--height", "64", "--width", "64", "--frames", "7", "--steps", "2"]
PROMPTS = [
    {"prompt": "a red star moving to the right", "seed": 1},
    {"prompt": "a red star moving to the right", "seed": 2},
    {"prompt": "", "frames": 13},
    {"prompt": "a blue square", "negative_prompt": "fog", "guidance": 2.5},
    {"prompt": "a green circle", "height": 32, "width": 96, "steps": 3},
    {"prompt": "ein gelber Kreis fällt", "seconds": 0.2, "cfg_zero": True, "skip_block": [1]},
]
THERE = {"prompt": "made before"}
IMPOSSIBLE = {"prompt": "a hole", "skip_block": [99]}
"""Only known once the transformer is loaded."""


def write_prompts(folder, lines):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def parsed(path, *arguments):
    parser = argparse.ArgumentParser()
    add_farm(parser)
    return parser.parse_args([str(path), "--device", "cpu", *arguments])


def jobs_of(path, *arguments):
    return read_jobs(path, parsed(path, *arguments))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a kite"', "line 2: not JSON (Expecting ',' delimiter"),
        ("[" * 100_000, "line 2: not JSON ("),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "line 2: not JSON (Exceeds the limit"),
        (
            '["a kite"]',
            'line 2: not a JSON object with a prompt; write one such as {"prompt": "a red kite", "seed": 7}',
        ),
        ('{"prompt": false}', "line 2: not a JSON object with a prompt"),
        ('{"text": "a kite"}', "line 2: not a JSON object with a prompt"),
        ('{"prompt": "a", "hight": 480}', "line 2: hight is not a video setting; use prompt, negative_prompt, "),
        ('{"prompt": "a", "height": 33}', "line 2: height is 33"),
        ('{"prompt": "a", "frames": 8}', "line 2: num_frames is 8"),
        ('{"prompt": "a", "steps": 0}', "line 2: num_steps is 0"),
        ('{"prompt": "a", "guidance": NaN}', "line 2: guidance is nan"),
        ('{"prompt": "a", "seed": "one"}', "line 2: seed: invalid int value: 'one'"),
        ('{"prompt": "a", "seed": true}', "line 2: seed: expected one argument"),
        ('{"prompt": "a", "seed": null}', "line 2: seed is null; write a string or a number, or leave it out"),
        ('{"prompt": "a", "height": [32, 48]}', "line 2: height is [32, 48]; write a string or a number"),
        ('{"prompt": "a", "image": "none.png"}', "line 2: none.png"),
        ('{"prompt": "here"}', "line 2 asks for the same video as line 1; give it another seed"),
    ],
)
def test_a_bad_line_is_refused_before_anything_is_loaded(tmp_path, capsys, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "here"}}\n{line}\n', encoding="utf-8")
    output = tmp_path / "videos"
    assert main(["farm", str(path), *NO_MODELS, "-o", str(output)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: prompts.jsonl, {message}")
    assert said.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "prompts.jsonl has no lines"),
        (b'{"prompt": "f\xe4llt"}', "prompts.jsonl is not UTF-8 text (byte 13)"),
    ],
)
def test_a_file_without_prompts(tmp_path, capsys, content, message):
    (tmp_path / "prompts.jsonl").write_bytes(content)
    assert main(["farm", str(tmp_path / "prompts.jsonl"), *NO_MODELS, "-o", str(tmp_path / "videos")]) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--workers", "0", "workers is 0; use 1 or more"),
        ("--gpus-per-worker", "-1", "gpus_per_worker is -1"),
        ("--device", "cuda:1", "device is cuda:1, but Ray gives"),
    ],
)
def test_options_are_looked_at_first(tmp_path, capsys, option, value, message):
    assert main(["farm", str(tmp_path / "none"), *NO_MODELS, option, value]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_lines_go_before_the_options_of_all(tmp_path):
    lines = [
        {"prompt": "a"},
        {"prompt": "--b", "steps": 5, "skip_block": [4], "cfg_zero": False, "frames": 13, "nag": True},
        {"prompt": "c", "seconds": 0.4, "negative_prompt": "=", "seed": -1, "cache": "teacache:0.1"},
    ]
    common = ["--seconds", "0.2", "--steps", "7", "--cfg-zero", "--skip-block", "3", "--guidance", "2", "--fps", "24"]
    a, b, c = (job.options for job in jobs_of(write_prompts(tmp_path, lines), *NO_MODELS, *common))
    assert (a.seconds, a.steps, a.cfg_zero, a.skip_block, a.guidance, a.nag, a.fps) == (0.2, 7, True, [3], 2, 1, 24)
    assert (b.prompt, b.seconds, b.frames, b.steps, b.cfg_zero, b.skip_block, b.nag) == (
        "--b", None, 13, 5, False, [4], 5,
    )  # fmt: skip
    assert (c.seconds, c.negative_prompt, c.seed, c.cache, c.skip_block) == (
        0.4, "=", -1, ("teacache", 0.1), [3],
    )  # fmt: skip


def test_names_of_files_are_safe_and_stay(tmp_path):
    prompts = [
        "../../etc/passwd",
        "CON",
        'a/b\\c:d*e?f"g<h>i|j',
        "\u202etfel",
        "ein " * 200,
        "\u661f" * 300,
        "",
        "..",
        "\ud800",
        "a\0b",
    ]
    lines = [{"prompt": prompt} for prompt in [*prompts, "A KITE", "a kite"]]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    jobs = jobs_of(path, *NO_MODELS)
    for job in jobs:
        assert not set(job.file) & set('/\\:*?"<>|\0\u202e')
        assert len(job.file.encode()) < 200
        assert job.file[0] not in ".-"
        (tmp_path / job.file).touch()
    assert len({job.file.casefold() for job in jobs}) == len(jobs)
    kite = jobs[-1].options
    assert kite.prompt == "a kite"
    for name, value in {
        "seed": 1,
        "steps": 3,
        "transformer": Path("other"),
        "quantize": "int8",
        "negative_prompt": "x",
    }.items():
        assert video_name(argparse.Namespace(**{**vars(kite), name: value})) != jobs[-1].file, name
    for name, value in {
        "output": Path("there"),
        "device": "cuda",
        "offload": True,
        "address": "auto",
        "workers": 3,
    }.items():
        assert video_name(argparse.Namespace(**{**vars(kite), name: value})) == jobs[-1].file, name


def test_a_picture_that_was_changed_makes_another_video(tmp_path):
    path, picture = (
        write_prompts(tmp_path, [{"prompt": "a kite", "image": str(tmp_path / "kite.png")}]),
        tmp_path / "kite.png",
    )
    files = []
    for grey in (0, 0, 99):
        Image.new("RGB", (32, 32), (grey,) * 3).save(picture)
        files.append(jobs_of(path, *NO_MODELS)[0].file)
    assert files[0] == files[1] != files[2]


def test_without_ray(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = write_prompts(tmp_path, [THERE])
    assert main(["farm", str(path), *NO_MODELS, "-o", str(tmp_path)]) == 2
    assert 'error: The farm needs Ray: python -m pip install "ray>=2.52"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said", "broken"),
    [
        (ValueError("height is 33"), "height is 33", False),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB."
            ),
            f"CUDA out of memory. Tried to allocate 2.00 GiB. {SMALLER}",
            False,
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
            f"Main memory is full. {SMALLER}",
            False,
        ),
        (
            RuntimeError("CUDA error: an illegal memory access"),
            "RuntimeError: CUDA error: an illegal memory access",
            True,
        ),
    ],
)
def test_what_a_process_says_of_errors(error, said, broken):
    def work():
        raise error

    outcome = outcome_of(work, contextlib.ExitStack())
    assert (outcome.video, outcome.error, outcome.broken) == (b"", said, broken)


def test_models_that_cannot_be_loaded_are_told(tmp_path):
    outcome = Member().load(parsed(tmp_path, *NO_MODELS, *SMALL))
    assert "none" in outcome.error
    assert not outcome.broken


def test_a_picture_that_has_gone_fails_its_video_alone(tmp_path, capsys):
    picture = tmp_path / "first.png"
    Image.new("RGB", (64, 64)).save(picture)
    path = write_prompts(tmp_path, [{"prompt": "a kite", "image": str(picture)}])
    jobs = jobs_of(path, *NO_MODELS, *SMALL)
    picture.unlink()
    farm = Farm(jobs, [Worker(parsed(path, *NO_MODELS, *SMALL), cores=1)], tmp_path)
    farm._hand_out()
    assert (jobs[0].status, farm.at_work, [*farm.waiting]) == ("failed", {}, [])
    assert "failed: line 1 (a kite): first.png cannot be used: there is no such file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ray_here():
    """Ray in this process, shared by the workers of all these tests; it leaves nothing behind."""
    token = Path.home() / ".ray" / "auth_token"
    had_token, handler = token.exists(), signal.getsignal(signal.SIGTERM)
    folder = tempfile.mkdtemp(prefix="ray")  # a short path: it holds sockets
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
            patch.setenv(name, "")
            patch.delenv(name)  # also removed at the end
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        with cluster(None):
            yield
    signal.signal(signal.SIGTERM, handler)
    shutil.rmtree(folder)
    assert token.exists() == had_token


def members():
    """The farm's processes below this one, without zombies."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil's class for those is below this one
            found += [process] * ("ray::PlacedMember" in " ".join(process.cmdline()))
    return found


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def accepts(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_ray_listens_on_the_loopback_interface_only():
    listening = [
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert all(address.removeprefix("::ffff:") == "127.0.0.1" for address in listening)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_a_worker_dies_and_every_video_is_made(tmp_path, capsys):
    path, output = write_prompts(tmp_path, [THERE, IMPOSSIBLE, *PROMPTS]), tmp_path / "videos"
    output.mkdir()
    there, _, *wanted = jobs_of(path, *MODELS, *SMALL)
    (output / there.file).write_bytes(b"made before")

    def kill_one():
        wait_until(lambda: any((output / job.file).exists() for job in wanted))
        members()[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    common = [*MODELS, *SMALL, "-o", str(output)]
    assert main(["farm", str(path), *common, "--workers", "2"]) == 1
    killer.join()

    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"6 made, 1 already there, 1 failed: {output / REPORT}"
    assert "failed: line 2 (a hole): skip_blocks lists block 99" in said.err
    assert "died; trying again" in said.err
    rows = json.loads((output / REPORT).read_text(encoding="utf-8"))
    assert [row["status"] for row in rows] == ["kept", "failed", *["made"] * 6]
    assert sum(row["attempts"] for row in rows) == 8  # seven, plus one retry
    assert {file.name for file in output.iterdir()} == {REPORT, there.file, *(job.file for job in wanted)}
    assert (output / there.file).read_bytes() == b"made before"
    compare(local_videos(wanted, tmp_path), output)
    dates = {file: file.stat().st_mtime_ns for file in output.glob("*.mp4")}
    assert main(["farm", str(write_prompts(tmp_path, [THERE, *PROMPTS])), *common, "--workers", "2"]) == 0
    assert capsys.readouterr().out == f"7 already there: {output / REPORT}\n"
    assert {file: file.stat().st_mtime_ns for file in output.glob("*.mp4")} == dates


def compare(local, output):
    """Assert that every file equals that of a single process, byte for byte."""
    assert {file: (output / file).read_bytes() == expected for file, expected in local.items()} == dict.fromkeys(
        local, True
    )
    assert len({*local.values()}) == len(local)


def local_videos(jobs, folder):
    """The files by job, made by one process one after another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipe, made = load_pipeline(jobs[0].options), {}
        for job in jobs:
            path = folder / job.file
            make_file(pipe, pipeline_arguments(job.options), path, job.options.fps, lambda: None)
            made[job.file] = path.read_bytes()
        return made
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_an_interrupt_ends_the_workers(tmp_path, capsys):
    wait_until(lambda: not members())

    def interrupt():
        wait_until(members)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    path = write_prompts(tmp_path, PROMPTS)
    assert main(["farm", str(path), *MODELS, *SMALL, "-o", str(tmp_path / "videos"), "--workers", "2"]) == 130
    assert f"6 not started: {tmp_path / 'videos' / REPORT}" in capsys.readouterr().out
    wait_until(lambda: not members(), 10)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_models_that_are_not_there_end_the_farm(tmp_path, capsys):
    path = write_prompts(tmp_path, [THERE])
    assert main(["farm", str(path), *NO_MODELS, *SMALL, "-o", str(tmp_path / "videos")]) == 2
    assert "error: No worker could start: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here", "with_all")
def test_two_processes_make_each_video_together(tmp_path, capsys):
    path, output = write_prompts(tmp_path, [IMPOSSIBLE, *PROMPTS[:2]]), tmp_path / "videos"
    together = ["--workers", "1", "--gpus-per-worker", "2"]
    assert main(["farm", str(path), *MODELS, *SMALL, "-o", str(output), *together]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"2 made, 1 failed: {output / REPORT}"
    assert re.search(
        r"failed: line 1 \(a hole\): Member [01] \(cpu, host .*\) failed: skip_blocks lists block 99", said.err
    )
    compare(local_videos(jobs_of(path, *MODELS, *SMALL)[1:], tmp_path), output)


@pytest.mark.slow
@pytest.mark.usefixtures("with_all")
def test_a_cluster_at_an_address(tmp_path):
    """Started by Ray's own command, and joined by the command line from another folder."""
    folder, port = tempfile.mkdtemp(prefix="ray"), free_port()
    settings = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "OMP_NUM_THREADS": "1"}
    settings |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **settings}
    size = ["--num-cpus", "2", "--object-store-memory", str(100 * 2**20), "--include-dashboard", "false"]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port", str(port), "--block", *size]
    with subprocess.Popen(start, env=environment, cwd=folder, stderr=subprocess.DEVNULL) as head:
        try:
            wait_until(lambda: accepts(port))
            path = write_prompts(tmp_path, PROMPTS[:2])
            code = f"import sys; sys.path.append({str(ROOT)!r}); from mochi_core.__main__ import main; sys.exit(main())"
            farm = ["farm", str(path), *MODELS, *SMALL, "-o", "videos", "--address", f"127.0.0.1:{port}"]
            done = subprocess.run(
                [sys.executable, "-c", code, *farm],
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1] == f"2 made: {Path('videos') / REPORT}"
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                process.kill()  # terminating takes half a minute
    compare(local_videos(jobs_of(path, *MODELS, *SMALL), tmp_path), tmp_path / "videos")
    shutil.rmtree(folder)
