"""A folder of videos and captions becomes a data set, and from there a LoRA, from the command line."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mochi_core import VideoSize, load_lora, load_text_encoder, load_transformer, load_vae, save_video
from mochi_core.checkpoints import open_checkpoint
from mochi_core.train.__main__ import main
from mochi_core.train.prepare import read_video, to_model_range
from tests.harness import trained
from tests.harness.tiny_models import write_models

ROOT = Path(__file__).parents[2]
SIZE = VideoSize(32, 48, 7)
TKHD_MATRIX = 44  # bytes from the name of the mp4 box to the matrix in it


def quadrants(frames, height=48, width=96):
    """Red at the top left, blue at the bottom right, increasingly bright green elsewhere."""
    video = np.zeros((frames, height, width, 3))
    video[..., 1] = np.linspace(0, 1, frames)[:, None, None]
    video[:, : height // 2, : width // 2] = (1, 0, 0)
    video[:, height // 2 :, width // 2 :] = (0, 0, 1)
    return video


def turned_by_the_player(path, target):
    """The same mp4 with metadata to show it rotated clockwise, as phones write it."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + TKHD_MATRIX
    one, unit = 1 << 16, 1 << 30
    assert struct.unpack(">9i", data[place : place + 36]) == (one, 0, 0, 0, one, 0, 0, 0, unit)
    data[place : place + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, unit)
    target.write_bytes(data)


def corners(frame):
    """Colours of an image's four corners: top left and right, bottom left and right."""
    return [tuple((frame[row, column] > 128).astype(int)) for row in (4, -4) for column in (4, -4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, torch.float32)
    paths = {
        "transformer": folder / "diffusion_models" / "mochi_preview_bf16.safetensors",
        "vae": folder / "vae" / "mochi_vae.safetensors",
        "t5": folder / "text_encoders" / "t5xxl_fp16.safetensors",
        "tokenizer": trained.TOKENIZER,
    }
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, caption in (("kite", "a red kite"), ("sea", "the blue sea\n")):
        save_video(quadrants(12), folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def prepare(videos, models, *more):
    options = [f"--{name}={models[name]}" for name in ("vae", "t5", "tokenizer")]
    size = [f"--size={SIZE.width}x{SIZE.height}", f"--frames={SIZE.num_frames}", "--device=cpu"]
    return main(["prepare", str(videos), *options, *size, "-o", str(videos.parent / "clips"), *more])


def test_frames_are_resampled_resized_and_cropped_in_the_middle(videos):
    save_video(quadrants(12), videos / "slow.mp4", fps=10)
    frames = read_video(videos / "slow.mp4", VideoSize(48, 32, 31))  # from 1.2 seconds
    assert frames.shape == (31, 48, 32, 3)
    assert corners(frames[0]) == [(1, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 1)]
    green = frames[:, 4, -4, 1] / 255
    assert np.abs(green - np.arange(31) // 3 / 11).max() < 0.06  # three frames each
    assert (np.abs(frames[0, 8, :, 0] / 255 - (np.arange(32) < 16)) > 0.5).sum() == 0


def test_videos_of_phones_stand_upright(videos):
    turned_by_the_player(videos / "kite.mp4", videos / "turned.mp4")
    frames = read_video(videos / "turned.mp4", VideoSize(96, 48, 7))
    assert corners(frames[0]) == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (0, 0, 0)]


def test_clips_hold_what_the_encoders_give(videos, models):
    assert prepare(videos, models) == 0
    clips = videos.parent / "clips"
    assert sorted(path.name for path in clips.iterdir()) == ["kite.mp4.safetensors", "sea.mp4.safetensors"]
    clip = load_file(clips / "kite.mp4.safetensors")
    expected = load_vae(models["vae"]).encode(to_model_range(read_video(videos / "kite.mp4", SIZE)))
    assert torch.equal(clip["mean"], expected.mean[0])
    assert torch.equal(clip["logvar"], expected.logvar[0])
    assert open_checkpoint(clips / "sea.mp4.safetensors").metadata["caption"] == "the blue sea"
    embeds, mask = load_text_encoder(models["t5"], models["tokenizer"]).encode("a red kite")
    assert torch.equal(clip["embeds"], embeds[mask])


@pytest.mark.slow
def test_only_what_is_new_or_has_changed_is_made(videos, models, capsys):
    def made():
        before = {path.name: path.stat().st_mtime_ns for path in clips.glob("*")}
        assert prepare(videos, models, *more) == 0
        return sorted(path.name[:4] for path in clips.iterdir() if path.stat().st_mtime_ns != before.get(path.name))

    clips, more = videos.parent / "clips", []
    assert made() == ["kite", "sea."]
    assert made() == []
    assert "2 of 2 clips are in" in capsys.readouterr().out
    (videos / "sea.txt").write_text("a green sea", encoding="utf-8")
    assert made() == ["sea."]
    save_video(quadrants(13), videos / "kite.mp4")
    assert made() == ["kite"]
    (clips / "kite.mp4.safetensors").write_bytes(b"cut off")
    assert made() == ["kite"]
    more = ["--vae-dtype=bf16"]
    assert made() == ["kite", "sea."]
    (videos / "sea.mp4").unlink()
    assert made() == []
    assert "sea.mp4.safetensors is in" in capsys.readouterr().err


def test_what_cannot_be_used_is_left_out_with_a_sentence(videos, models, capsys):
    save_video(quadrants(5), videos / "short.mp4")
    (videos / "broken.mp4").write_bytes(b"no video")
    for name in ("short", "broken"):
        (videos / f"{name}.txt").write_text("a caption", encoding="utf-8")
    save_video(quadrants(12), videos / "silent.mp4")
    (videos / "silent.txt").write_text(" \n", encoding="utf-8")
    assert prepare(videos, models) == 0
    warnings = sorted(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert warnings == [
        "warning: broken.mp4 is skipped: it cannot be read (Invalid data found when processing input); choose a video, or "
        "convert it to mp4.",
        "warning: short.mp4 is skipped: it has 5 frames at 30 per second, but 7 are needed.",
        "warning: silent.mp4 is skipped: its caption must be next to it in silent.txt.",
    ]
    assert len(list((videos.parent / "clips").iterdir())) == 2


def test_folders_and_sizes_that_will_not_do(videos, models, tmp_path, capsys):
    assert prepare(tmp_path / "nowhere", models) == 2
    assert "nowhere is not a folder; give the folder with the videos" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", models) == 2
    assert "There is no video with a caption in" in capsys.readouterr().err
    assert prepare(videos, models, "--frames=8") == 2
    assert "num_frames is 8, but Mochi needs 6k + 1 frames" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare(videos, models, "--size=large")
    assert "large is not a width and height, such as 848x480." in capsys.readouterr().err


@pytest.mark.slow
def test_from_videos_to_a_lora_in_a_shell(videos, models, tmp_path):
    """The whole workflow: prepare, train, stop with Ctrl+C, resume, look at samples, use the LoRA."""
    sample = {name: models[name] for name in ("vae", "t5", "tokenizer")}
    sample |= {"prompts": ["a red kite", ""], "every": 20, "steps": 2, "size": "48x32", "frames": 7}
    config = {"transformer": models["transformer"], "dataset": "clips", "output": "out", "sample": sample}
    config |= {"steps": 40, "warmup_steps": 10}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    assert prepare(videos, models) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mochi_core.train", "lora", str(path)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        log, deadline = tmp_path / "out" / "log.csv", time.monotonic() + 120
        while not (log.exists() and len(log.read_bytes().splitlines()) > 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output = process.communicate()[0]
    assert process.returncode == 130
    assert "of 40; the same command resumes from there." in output
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "40 steps are done; see out." in done.stdout
    samples = sorted(path.name for path in (tmp_path / "out" / "samples").iterdir())
    assert samples == [f"step_0000{step}-{i}.mp4" for step in (20, 40) for i in (1, 2)]
    assert read_video(tmp_path / "out" / "samples" / samples[-1], SIZE).shape == (7, 32, 48, 3)
    dit = load_transformer(models["transformer"])
    load_lora(dit, tmp_path / "out" / "step_000040.lora.safetensors")
