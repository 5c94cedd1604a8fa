"""`torchrun ... -m mochi_core generate --parallel`, with the tiny trained model on the CPU."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from mochi_core.__main__ import main
from mochi_core.io.latent_files import load_latents
from tests.harness import trained
from tests.harness.frames import read_frames

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FILES = [
    "--transformer",
    trained.TRANSFORMER,
    "--vae",
    trained.VAE,
    "--t5",
    trained.T5,
    "--tokenizer",
    trained.TOKENIZER,
]
VIDEO = ["--prompt", "a red square", "--height", 64, "--width", 80, "--frames", 13, "--steps", 3, "--seed", 5]
GENERATE = ["generate", *map(str, [*FILES, *VIDEO]), "--dtype", "fp32", "--device", "cpu"]


def torchrun(members, *arguments):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(members)]
    command = [sys.executable, "-m", *launcher, "-m", "mochi_core", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def frames(path):
    return read_frames(path.read_bytes()).astype(int)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "video.mp4"
    assert main([*GENERATE, "-o", str(path)]) == 0
    return frames(path)


def check_video(single, tmp_path, members, plan, said):
    output = tmp_path / "video.mp4"
    out, errors = torchrun(members, *GENERATE, "--parallel", plan, "-o", output).communicate()
    assert out == f"{output}\n", errors
    assert f"{members} members: {said}" in errors
    assert "Traceback" not in errors
    # For equal latents: decoding part of a frame changes sums (0.002), while one more step gives 1.8.
    assert abs(frames(output) - single).mean() < 0.1
    assert [errors.count(line) for line in ("loading the text encoder", "loading the transformer")] == [1, 1]
    assert "13/13" in errors, "frames that are decoded"


def test_two_processes_make_the_video_of_one(single, tmp_path):
    check_video(single, tmp_path, 2, "auto", "guidance=2, chosen")


@pytest.mark.usefixtures("with_all")
def test_four_processes_make_the_video_of_one(single, tmp_path):
    check_video(single, tmp_path, 4, "guidance=2,ring=2", "guidance=2, ring=2, as requested")


@pytest.mark.usefixtures("with_all")
@pytest.mark.parametrize(("members", "plan"), [(2, "guidance=2"), (3, "ulysses=3")])
def test_latents_are_those_of_one_process(tmp_path, members, plan):
    files = tmp_path / "one.latent", tmp_path / "several.latent"
    assert main([*GENERATE, "-o", str(files[0])]) == 0
    _, errors = torchrun(members, *GENERATE, "--parallel", plan, "-o", files[1]).communicate()
    assert torch.equal(*map(load_latents, files)), errors


def errors_of(running):
    out, errors = running.communicate(timeout=60)
    assert running.returncode != 0
    assert not out
    return errors


def test_the_error_of_one_member_is_the_one_that_is_shown(tmp_path):
    """Only the first reads T5, while the other waits for its text features."""
    missing = tmp_path / "no_t5.safetensors"
    errors = errors_of(torchrun(2, *GENERATE, "--t5", missing, "--parallel", "auto", "-o", tmp_path / "a.mp4"))
    sentence = rf"error: Member 0 \(cpu, host \S+\) failed: .*{re.escape(str(missing))}.*; all 2 have stopped\."
    assert re.findall(sentence, errors), errors
    assert errors.count("error: ") == 1
    assert not [*tmp_path.iterdir()]


def test_a_member_that_is_killed_ends_the_others(tmp_path):
    endless = ["--steps", 100000, "--linear-steps", 100000]
    running = torchrun(2, *GENERATE, *endless, "--parallel", "auto", "-o", tmp_path / "a.mp4")
    while "1/100000" not in running.stderr.readline():
        assert running.poll() is None
    members = psutil.Process(running.pid).children()
    os.kill(members[1].pid, signal.SIGKILL)
    errors = errors_of(running)
    assert "Signal 9 (SIGKILL)" in errors
    assert (
        len(re.findall(r"error: Member 0 \(cpu, host \S+\) .* another member.*; all (?:2 have )?stop", errors)) == 1
    ), errors
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)


MEMBER = """
import time, torch
from mochi_core.parallel.launch import join, together
world = join("cpu")
with together(world, torch.device("cpu")):
    print("waits", flush=True)
    time.sleep(600) if world.rank else torch.distributed.recv(torch.zeros(1), 1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be told to end there, only be ended")
def test_a_member_that_is_told_to_end_does_so_while_its_main_thread_waits():
    """Python's own signal handlers do not run meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    members = [
        subprocess.Popen([sys.executable, "-c", MEMBER], cwd=ROOT, env={**os.environ, **launch, "RANK": rank}, **piped)
        for rank in "01"
    ]
    assert [member.stdout.readline() for member in members] == ["waits\n"] * 2
    members[0].terminate()
    try:
        errors, others = map(errors_of, members)
    finally:
        for member in members:
            member.kill()
    assert re.fullmatch(r"error: Member 0 \(cpu, host \S+\) was told to end \(SIGTERM\), as .*; all stop\.\n", errors)
    assert "error: " not in others


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be told to end there, only be ended")
def test_a_member_that_is_told_to_end_does_so_while_it_waits_for_the_others():
    code = "from mochi_core import interrupts\nfrom mochi_core.parallel.launch import join\n"
    code += "with interrupts.ended_in_order():\n    join('cpu')"
    with socket.create_server(("127.0.0.1", 0)) as first_member:
        first_member.settimeout(60)
        launch = {
            "WORLD_SIZE": "2",
            "RANK": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(first_member.getsockname()[1]),
        }
        member = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **launch}, stderr=subprocess.PIPE
        )
        connection, _ = first_member.accept()
        with connection:
            member.terminate()
            try:
                assert member.wait(20) == -signal.SIGTERM
            finally:
                member.kill()


def test_without_a_launcher_there_is_a_sentence(capsys, tmp_path):
    assert main([*GENERATE, "-o", str(tmp_path / "a.mp4"), "--parallel", "auto"]) == 2
    assert capsys.readouterr().err == (
        "error: --parallel needs a launcher: torchrun --nproc-per-node 4 -m mochi_core generate ...; in ComfyUI use the node "
        "Mochi Parallel.\n"
    )
