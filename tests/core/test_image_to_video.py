"""Videos from images and clips: which latents are given, and how they are kept; pipeline and command line."""

import itertools
import os

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mochi_core import MochiPipeline, VideoSize, load_transformer, normalize_latents, sample, save_video
from mochi_core.__main__ import main
from mochi_core.checkpoints.convert import plan_conversion
from mochi_core.io.read_frames import read_frames, read_image
from mochi_core.io.video import as_frames
from mochi_core.rounds import in_rounds, round_sizes
from mochi_core.sampling.given import Given
from mochi_core.sampling.image_to_video import fitted, given_frames
from tests.harness import trained
from tests.harness.random_inputs import SIGMAS, prompt
from tests.harness.tiny_models import random_dit, random_vae

SIZE = VideoSize(32, 48, 31)
SHORT = {"height": 32, "width": 48, "num_frames": 25, "num_inference_steps": 4, "output_type": "latent"}
FRAMES = torch.rand(40, 32, 48, 3, generator=torch.Generator().manual_seed(0))
EMBEDS, MASK = prompt(6)
TEXT = {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}


@pytest.fixture(scope="module")
def vae():
    return random_vae()


@pytest.fixture
def pipe(vae):
    return MochiPipeline(random_dit(), vae, None)


def encoder(vae):
    return lambda frames: normalize_latents(vae.encode(frames.movedim(-1, 0)[None] * 2 - 1).mode())


def count(frames):
    """Latents that only encode their number."""
    assert len(frames) % 6 == 1
    return torch.zeros(1, 12, len(frames) // 6 + 1, *(side // 8 for side in frames.shape[1:3]))


@pytest.mark.parametrize(
    ("start", "end", "options", "expected"),
    [
        (1, 0, {}, [0, 1, 1, 1, 1, 1]),
        (1, 0, {"held": True}, [0, 0.8, 0.95, 1, 1, 1]),
        (1, 0, {"held": True, "start_noise": 0.9}, [0.9, 0.9, 0.95, 1, 1, 1]),
        (20, 0, {"start_noise": 0.3}, [0.3, 0.3, 0.3, 0.3, 1, 1]),
        (20, 0, {"keep": 12, "held": True}, [0, 0, 0.8, 0.95, 1, 1]),
        (5, 0, {}, [0, 1, 1, 1, 1, 1]),
        (0, 1, {"held": True}, [1, 1, 1, 0.95, 0.8, 0]),
        (1, 1, {"end_noise": 0.7}, [0, 1, 1, 1, 1, 0.7]),
        (1, 1, {"held": True}, [0, 0.8, 0.95, 0.95, 0.8, 0]),
        (7, 13, {"held": True}, [0, 0, 0.8, 0.8, 0, 0]),
    ],
)
def test_levels_of_frames(start, end, options, expected):
    given = given_frames(count, SIZE, FRAMES[:start] if start else None, FRAMES[:end] if end else None, **options)
    assert given.levels.tolist() == pytest.approx(expected)
    assert given.latents.shape == SIZE.latent_shape()


def test_given_latents_are_those_of_the_frames_in_a_video(vae):
    encode = encoder(vae)
    clip = given_frames(encode, SIZE, FRAMES[:20], keep=14).latents  # frames 7 to 19
    torch.testing.assert_close(clip[:, :, :3], encode(FRAMES[7:26])[:, :, :3], rtol=1e-4, atol=1e-4)
    held = given_frames(encode, SIZE, FRAMES[:1], held=True).latents
    still = encode(FRAMES[:1].expand(31, -1, -1, -1))
    torch.testing.assert_close(held[:, :, :3], still[:, :, :3], rtol=1e-4, atol=1e-4)
    assert torch.equal(held[:, :, 3], held[:, :, 5]), "the others repeat the last one"
    last = given_frames(encode, SIZE, end=FRAMES[:1]).latents
    torch.testing.assert_close(last[:, :, -1], encode(FRAMES[:1].expand(7, -1, -1, -1))[:, :, 1], rtol=1e-4, atol=1e-4)
    leads = given_frames(encode, SIZE, end=FRAMES[:13]).latents
    torch.testing.assert_close(leads[:, :, -2:], encode(FRAMES[:13])[:, :, 1:], rtol=1e-4, atol=1e-4)
    both = given_frames(encode, SIZE, FRAMES[20:21], FRAMES[:1], held=True).latents
    assert torch.equal(both[:, :, :3], given_frames(encode, SIZE, FRAMES[20:21], held=True).latents[:, :, :3])
    assert torch.equal(both[:, :, 3:], given_frames(encode, SIZE, end=FRAMES[:1], held=True).latents[:, :, 3:])


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ({}, {}, "There is no image to make a video from"),
        ({"start": FRAMES}, {"keep": 31}, "fill 6 of the 6 latents of 31 frames"),
        ({"start": FRAMES[:25], "end": FRAMES[:1]}, {"keep": 25}, "fill 6 of the 6 latents"),
        ({"start": FRAMES[:1]}, {"start_noise": 1.5}, "start_noise is 1.5; use 0"),
        ({"end": FRAMES[:1]}, {"end_noise": float("nan")}, "end_noise is nan; use 0"),
        ({"start": FRAMES[:1]}, {"keep": 0}, "keep is 0, but at least one frame must be kept"),
        ({"start": FRAMES[:0]}, {}, r"shape \(0, 32, 48, 3\)"),
        ({"start": FRAMES[0]}, {}, r"shape \(32, 48, 3\)"),
    ],
)
def test_what_cannot_be_given_is_refused(frames, options, message):
    with pytest.raises(ValueError, match=message):
        given_frames(count, SIZE, **frames, **options)


def test_images_are_cropped_in_the_middle_and_resized():
    image = torch.zeros(1, 100, 400, 4)
    image[:, :, 100:300] = 0.7
    small = fitted(image, 32, 64)
    assert small.shape == (1, 32, 64, 3)
    torch.testing.assert_close(small[:, :, 2:-2], torch.full((1, 32, 60, 3), 0.7))
    assert fitted(FRAMES, 32, 48).equal(FRAMES), "what fits stays as it is"
    assert fitted(torch.ones(1, 300, 2, 3), 16, 16).shape == (1, 16, 16, 3)


def inpainted(dit, noise, clean, released, condition):
    """The frames are restored before each step at its noise level, and after it in the network's prediction."""
    x = noise
    for now, following in itertools.pairwise(SIGMAS):
        new = (released >= now).view(-1, 1, 1)
        x = torch.where(new, x, now * noise + (1 - now) * clean)
        picture = x + now * dit(x, now.expand(1), *condition)
        picture = torch.where(new, picture, clean)
        x = x + (following - now) * (x - picture) / now
    return x


def test_held_frames_are_those_of_inpainting_in_time():
    dit, noise, clean = random_dit(), torch.randn(1, 12, 4, 4, 6), torch.randn(1, 12, 4, 4, 6)
    released = torch.tensor([0.0, 0.98, 0.99, 1.0])
    assert len({*(SIGMAS[:-1, None] <= released).sum(0).tolist()}) == 4, "each is released at another step"
    result = sample(dit, noise, SIGMAS, prompt(6), guidance_scale=1, given=Given(clean, released, held=True))
    expected = inpainted(dit, noise, clean, released, prompt(6))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[:, :, 0], clean[:, :, 0], rtol=1e-5, atol=1e-5)
    everything = sample(dit, noise, SIGMAS, prompt(6), guidance_scale=1, given=Given(clean, torch.ones(4), held=True))
    assert torch.equal(everything, sample(dit, noise, SIGMAS, prompt(6), guidance_scale=1))


@pytest.mark.parametrize("has_frame_levels", [False, True])
def test_a_pipeline_gives_frames_as_its_weights_know_them(pipe, vae, has_frame_levels):
    pipe.dit.has_frame_levels = has_frame_levels
    ready = given_frames(
        encoder(vae), VideoSize(32, 48, 25), FRAMES[:1], FRAMES[9:10], end_noise=0.2, held=not has_frame_levels
    )
    noise = torch.randn(1, 12, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    negative = torch.zeros(1, 1, EMBEDS.shape[2]), torch.zeros(1, 1, dtype=torch.bool)
    sigmas = torch.tensor([1, 0.9875, 0.975, 0.6, 0])
    made = pipe(**TEXT, **SHORT, sigmas=sigmas, image=FRAMES[0], last_image=FRAMES[9], end_noise=0.2)
    expected = sample(pipe.dit, noise, sigmas, (EMBEDS, MASK), negative, given=ready)
    torch.testing.assert_close(normalize_latents(made), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalize_latents(made)[:, :, 0], ready.latents[:, :, 0], rtol=1e-4, atol=1e-4)


def test_a_pipeline_takes_images_in_any_form(pipe):
    bytes_ = (FRAMES[0] * 255).round().to(torch.uint8)
    forms = [bytes_, bytes_.numpy(), bytes_[None].numpy(), Image.fromarray(bytes_.numpy()), bytes_ / 255]
    first, *others = (pipe(**TEXT, **SHORT, image=form) for form in forms)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)
    clip = [Image.fromarray(frame.numpy()) for frame in (FRAMES[:7] * 255).to(torch.uint8)]
    assert as_frames(clip).shape == (7, 32, 48, 3)
    two = pipe(**TEXT, **SHORT, video=FRAMES[:7], num_videos_per_prompt=2)
    torch.testing.assert_close(two[0, :, :2], two[1, :, :2], rtol=1e-4, atol=1e-4)
    assert (two[0, :, 3:] - two[1, :, 3:]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": FRAMES[0], "video": FRAMES}, "image and video are both given"),
        ({"image": FRAMES[0] * 255}, "values from .* use 0 to 1, or uint8"),
        ({"image": FRAMES[0] * float("nan")}, "values from nan"),
        ({"image": FRAMES[0, 0]}, r"shape \(48, 3\)"),
        ({"image": [FRAMES[0].numpy(), FRAMES[0, 1:].numpy()]}, "have different sizes; make them the same size"),
        ({"video": FRAMES, "keep": 25}, "so there is nothing left"),
    ],
)
def test_what_a_pipeline_cannot_take_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**TEXT, **SHORT, **arguments)


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("mochi.safetensors", {}, False),
        ("Pusa_v0_dit.safetensors", {}, True),
        ("mochi.safetensors", {"frame_levels": "true"}, True),
        ("pusa.safetensors", {"frame_levels": "false"}, False),
    ],
)
def test_a_file_says_by_note_or_name_that_it_knows_levels_of_frames(tmp_path, name, metadata, expected):
    save_file(random_dit().state_dict(), tmp_path / name, metadata)
    assert load_transformer(tmp_path / name, torch.float32).has_frame_levels == expected
    assert load_transformer(tmp_path / name, torch.float32, frame_levels=not expected).has_frame_levels != expected
    converted = plan_conversion([tmp_path / name], "canonical", "bf16").metadata
    assert (converted.get("frame_levels") == "true") == expected, "the name may change"


FILES = ["--transformer", str(trained.TRANSFORMER), "--t5", str(trained.T5), "--vae", str(trained.VAE)]
TINY = ["--dtype", "fp32", "--height", "64", "--width", "64", "--frames", "13", "--steps", "4", "--frame-levels", "off"]


@pytest.fixture
def run(tmp_path):
    """`generate` with the trained tiny model; the frames of the video (F, H, W, 3) as integers."""

    def run(*options):
        path = tmp_path / "made.mp4"
        assert main(["generate", *FILES, *TINY, "--prompt", "a red circle rising", *options, "-o", str(path)]) == 0
        return read_frames(path, 64, 64).astype(int)

    return run


def test_command_line_starts_from_an_image(run, tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[20:44, 20:44] = 230, 25, 25
    Image.fromarray(picture).resize((128, 128)).save(tmp_path / "first.png")
    frames = run("--image", str(tmp_path / "first.png"))
    assert frames.shape == (13, 64, 64, 3)
    assert np.abs(frames[0] - picture).mean() < 12
    assert np.abs(run()[0] - picture).mean() > 20
    still = run("--last-image", str(tmp_path / "first.png"))
    assert max(np.abs(frame - picture).mean() for frame in still[-4:]) < 12


def test_command_line_continues_a_video(run, tmp_path):
    earlier = np.zeros((20, 64, 64, 3), np.uint8)
    for i, frame in enumerate(earlier):
        frame[20:44, 10 + i : 34 + i] = 25, 50, 235
    save_video(earlier, tmp_path / "earlier.mp4")
    frames = run("--video", str(tmp_path / "earlier.mp4"), "--keep", "8")
    assert len(frames) == 20 + 13 - 7
    assert np.abs(frames[:20] - earlier).mean() < 4


@pytest.mark.parametrize(
    ("frames", "at_once", "keep", "expected"),
    [
        (25, 25, 19, [25]),
        (13, 25, 19, [13]),
        (49, 25, 13, [25, 25, 25]),
        (37, 25, 8, [25, 19]),
        (31, 13, 1, [13, 13, 7]),
    ],
)
def test_sizes_of_rounds(frames, at_once, keep, expected):
    assert round_sizes(frames, at_once, keep) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((26, 25, 7), "num_frames is 26"),
        ((49, 24, 7), "num_frames is 24"),
        (
            (91, 13, 19),
            "Rounds of 13 frames that keep 19 have no room for new ones; keep 7, or use rounds of 25 frames or more.",
        ),
        ((49, 19, 19), "keep 13, or use rounds of 25 frames or more"),
        ((49, 1, 8), "Rounds of 1 frames that keep 8 have no room for new ones; use rounds of 13 frames or more"),
        ((49, 19, 0), "keep is 0"),
        ((7 + 6 * 10_000, 7, 1), "60007 frames are more than 10,000 rounds of 7 that keep 1 make; use longer rounds"),
    ],
)
def test_rounds_that_make_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        round_sizes(*arguments)


def test_each_round_continues_the_one_before(pipe):
    once = {"height": 32, "width": 48, "num_inference_steps": 2, **TEXT}
    made = in_rounds(pipe, 31, 19, seed=3, keep=7, image=FRAMES[0], last_image=FRAMES[1], start_noise=0.9, **once)
    first = pipe(num_frames=19, seed=3, image=FRAMES[0], start_noise=0.9, **once)[0]
    second = pipe(num_frames=19, seed=4, video=first[-7:], keep=7, last_image=FRAMES[1], **once)[0]
    assert np.array_equal(made, np.concatenate([first, second[7:]]))


def test_command_line_makes_rounds(run, tmp_path, capsys):
    assert len(run("--frames", "31", "--round", "19", "--keep", "7")) == 31
    models = ["--transformer", "none", "--t5", "none", "--vae", "none", "--prompt", "x"]
    assert main(["generate", *models, "--round", "37", "-o", str(tmp_path / "x.latent")]) == 2
    assert "Rounds produce frames, not latents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "3600", "--round", "163"], "There is no file none"),  # everything but T5's file is right
        (
            ["--seconds", "3600"],
            "A video of 108001 frames of 848 x 480 pixels would exceed the limit of 16,777,216 tokens",
        ),
        (["--seconds", "3600", "--round", "90001"], "A video of 90001 frames of 848 x 480 pixels would exceed"),
        (["--seconds", "1e12", "--round", "163"], "30000000000001 frames are more than 10,000 rounds of 163"),
        (["--round", "0"], "num_frames is 0, but Mochi needs 6k + 1 frames"),
    ],
)
def test_what_is_made_at_once_has_a_limit_and_not_what_is_made_in_rounds(tmp_path, capsys, options, message):
    models = ["--transformer", "none", "--t5", "none", "--vae", "none", "--prompt", "x"]
    assert main(["generate", *models, *options, "-o", str(tmp_path / "x.mp4")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes there")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "{}/none.png"], "none.png cannot be used: there is no such file; check the name."),
        (
            ["--image", "{}/text.txt"],
            "text.txt cannot be used: it is not an image, or an unsupported type; save it as",
        ),
        (["--image", "{}/half.png"], "; save the image again, as PNG or JPEG."),
        (
            ["--video", "{}/text.txt"],
            "(Invalid data found when processing input); choose a video, or convert it to mp4.",
        ),
        (["--video", "{}"], "cannot be used: it is a folder; choose a file."),
        (["--video", "{}/empty.avi"], "empty.avi cannot be used: it has no frames; choose another video."),
        (["--image", "/dev/zero"], "zero cannot be used: it is a pipe or a device; save its output to a file"),
        (["--last-image", "{}/pipe"], "pipe cannot be used: it is a pipe or a device"),
        (["--video", "{}/pipe"], "pipe cannot be used: it is a pipe or a device"),
        (["--image", "{}/text.txt", "--video", "{}/text.txt"], "--image and --video are both given"),
    ],
)
def test_files_are_read_before_models(tmp_path, capsys, options, message):
    (tmp_path / "text.txt").write_text("no picture")
    os.mkfifo(tmp_path / "pipe")
    with av.open(str(tmp_path / "empty.avi"), "w") as empty:
        empty.add_stream("mpeg4", rate=30)
        empty.start_encoding()
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    arguments = [option.format(tmp_path) for option in options]
    models = ["--transformer", "none", "--t5", "none", "--vae", "none", "--prompt", "x", "-o", str(tmp_path / "x.mp4")]
    assert main(["generate", *models, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_photograph_is_upright(tmp_path):
    lying = Image.new("RGB", (40, 20), "red")
    exif = lying.getexif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    lying.save(tmp_path / "phone.jpg", exif=exif)
    assert read_image(tmp_path / "phone.jpg").shape == (1, 40, 20, 3)
