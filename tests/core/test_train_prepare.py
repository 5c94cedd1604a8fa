"""Videos and captions become clips: the right frames, each once, and a sentence for what is left out."""

import av
import numpy as np
import pytest
import torch

from mochi_core import load_vae, save_video
from mochi_core.checkpoints import open_tensors
from mochi_core.geometry import VideoSize
from mochi_core.train.__main__ import main
from mochi_core.train.dataset import open_dataset
from mochi_core.train.prepare import read_video, to_model_range
from tests.harness.tiny_models import TEXT_WIDTH, write_models

SIZE = VideoSize(32, 48, 7)


def clip(frames, height=32, width=48, seed=0):
    """Smooth noise, so that a video codec changes little of it."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((frames, height // 16, width // 16, 3), dtype=np.float32)
    return coarse.repeat(16, axis=1).repeat(16, axis=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, torch.float32)
    return folder


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()

    def add(name, frames, caption="a kite"):
        save_video(frames, folder / f"{name}.mp4")
        if caption:
            (folder / f"{name}.txt").write_text(caption, encoding="utf-8")

    add("good", clip(10))
    add("large", clip(10, 64, 128, seed=1), "a wide kite")
    add("short", clip(5))
    add("silent", clip(10), caption="")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("a kite")
    return folder


def prepare(videos, models, comfy_path, output):
    files = [
        "--vae",
        str(models / "vae/mochi_vae.safetensors"),
        "--t5",
        str(models / "text_encoders/t5xxl_fp16.safetensors"),
    ]
    tokenizer = comfy_path / "comfy/text_encoders/t5_tokenizer"
    size = ["--size", "48x32", "--frames", "7"]
    return main(["prepare", str(videos), *files, "--tokenizer", str(tokenizer), *size, "-o", str(output)])


def test_clips_are_made_once_and_the_rest_is_named(videos, models, comfy_path, tmp_path, capsys):
    output = tmp_path / "clips"
    assert prepare(videos, models, comfy_path, output) == 0
    said = capsys.readouterr()
    assert "2 of 4 clips are in" in said.out
    assert "short.mp4 is left out: it has 5 frames at 30 per second, and 7 are wanted." in said.err
    assert "silent.mp4 is left out: silent.txt beside it must hold its caption." in said.err
    assert "broken.mp4 is left out: it cannot be read" in said.err
    clips = open_dataset(output, TEXT_WIDTH)
    assert [c.shape for c in clips] == [(12, 2, 4, 6)] * 2

    expected = load_vae(models / "vae/mochi_vae.safetensors").encode(
        to_model_range(read_video(videos / "good.mp4", SIZE))
    )
    torch.testing.assert_close(clips[0].mean.read(), expected.mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clips[0].logvar.read(), expected.logvar[0], rtol=1e-4, atol=1e-4)
    assert open_tensors(output / "large.mp4.safetensors").metadata["caption"] == "a wide kite"

    dates = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    (videos / "good.txt").write_text("another kite")
    assert prepare(videos, models, comfy_path, output) == 0
    changed = {path.name for path in output.iterdir() if dates[path.name] != path.stat().st_mtime_ns}
    assert changed == {"good.mp4.safetensors"}

    (videos / "large.mp4").unlink()
    assert prepare(videos, models, comfy_path, output) == 0
    assert "large.mp4.safetensors is in" in capsys.readouterr().err


def test_frames_are_cropped_in_the_middle_and_resampled(videos):
    frames = read_video(videos / "large.mp4", SIZE)
    assert frames.shape == (7, 32, 48, 3)
    # 64 x 128 becomes 32 x 64 and loses 8 columns on both sides; each square of 16 is one of 8 then.
    colors = clip(10, 64, 128, seed=1)[:7, 8::16, 24::16][:, :, :6]
    assert np.abs(frames[:, 4::8, 4::8][:, :, :6] / 255 - colors).mean() < 0.1


def test_other_rates_become_thirty(tmp_path):
    with av.open(str(tmp_path / "slow.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for picture in (clip(5) * 255).astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frames = read_video(tmp_path / "slow.mp4", SIZE).astype(int)
    assert np.abs(frames[0::2][:3] - frames[1::2][:3]).max() <= 2  # every frame twice
    assert np.abs(frames[1:-1:2] - frames[2::2]).mean() > 10


def test_folders_that_are_none_get_a_sentence(models, comfy_path, tmp_path, capsys):
    assert prepare(tmp_path / "nowhere", models, comfy_path, tmp_path) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
    assert prepare(models, models, comfy_path, tmp_path) == 2
    assert "There is no video with a caption in" in capsys.readouterr().err
