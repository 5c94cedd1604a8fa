"""Prompt to mp4 without ComfyUI: text encoder, pipeline, command line."""

import os
import re
import sys
import tracemalloc
from functools import partial, partialmethod
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from mochi_core import AsymmDiT, MochiPipeline, denormalize_latents, load_text_encoder, save_video
from mochi_core.__main__ import main
from mochi_core.checkpoints import from_state_dict, load_tiny_vae, load_transformer, load_vae
from mochi_core.checkpoints.formats.writer import write_safetensors
from mochi_core.io.latent_files import load_latents, save_latents
from mochi_core.io.video import as_frames, video_file
from mochi_core.output_files import folder, replacing
from mochi_core.train.state import replace_state
from tests.harness import trained
from tests.harness.frames import read_frames
from tests.harness.lora_files import random_adapter, write_adapter
from tests.harness.tiny_models import TEXT_WIDTH, random_dit, random_t5, random_vae, write_models

SIZE = {"height": 32, "width": 48, "num_frames": 7, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return trained.TOKENIZER


@pytest.fixture(scope="module")
def t5(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("t5") / "t5.safetensors"
    save_file(random_t5(), path)
    return load_text_encoder(path, tokenizer)


@pytest.fixture(scope="module")
def pipe(t5):
    return MochiPipeline(random_dit(), random_vae(), t5)


def test_text_features_and_mask(t5):
    embeds, mask = t5.encode(["a red kite", "", "a (blue:1.5) kite"])
    assert embeds.shape == (3, 256, TEXT_WIDTH)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [
        len(t5.tokenizer(p).input_ids) if p else 0 for p in ("a red kite", "", "a (blue:1.5) kite")
    ]
    assert not embeds[~mask].any()


def test_text_equals_the_padded_and_masked_encoder(t5):
    embeds, mask = t5.encode("a red kite")
    batch = t5.tokenizer("a red kite", padding="max_length", max_length=256, return_tensors="pt")
    expected = t5.model(batch.input_ids, batch.attention_mask).last_hidden_state
    torch.testing.assert_close(embeds[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_long_prompts_are_cut_with_a_quote(t5):
    words = " ".join(f"w{i}" for i in range(200))
    with pytest.warns(UserWarning, match="Mochi reads 256; cut off: .*w199"):
        _, mask = t5.encode(words)
    assert mask.all()
    assert t5.tokenize("short")[-1] == t5.tokenizer.eos_token_id


def test_embedding_under_either_name(tmp_path, tokenizer, t5):
    tensors = random_t5()
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    for name in ("both", "copy"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        embeds, _ = load_text_encoder(tmp_path / f"{name}.safetensors", tokenizer).encode("a kite")
        assert torch.equal(embeds, t5.encode("a kite")[0])
        tensors.pop("shared.weight", None)


def test_missing_tokenizer_is_explained(tmp_path):
    save_file(random_t5(), tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match=r"no T5 tokenizer in .*pass tokenizer="):
        load_text_encoder(tmp_path / "t5.safetensors")


def test_outputs(pipe):
    frames = pipe("a kite", seed=1, **SIZE)
    assert frames.shape == (1, 7, 32, 48, 3)
    assert frames.dtype == np.float32
    assert 0 <= frames.min() < frames.max() <= 1
    tensor = pipe("a kite", seed=1, output_type="pt", **SIZE)
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), frames)
    latents = pipe("a kite", seed=1, output_type="latent", **SIZE)
    decoded = pipe.vae.decode(latents) * 0.5 + 0.5
    torch.testing.assert_close(decoded.clamp(0, 1).transpose(1, 2), tensor)


def test_seeds_and_given_noise(pipe):
    same, again, other = (pipe("a kite", seed=s, output_type="latent", **SIZE) for s in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    noise = torch.randn(1, 12, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pipe("a kite", latents=noise, output_type="latent", **SIZE), same)


def test_several_prompts_and_negative_prompt(pipe):
    noise = torch.randn(2, 12, 2, 4, 6)
    both = pipe(["a kite", "the deep blue sea at night"], "fog", latents=noise, output_type="latent", **SIZE)
    alone = pipe("the deep blue sea at night", "fog", latents=noise[1:], output_type="latent", **SIZE)
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)
    assert (
        both[1:] - pipe("the deep blue sea at night", latents=noise[1:], output_type="latent", **SIZE)
    ).abs().max() > 1e-3


@pytest.mark.parametrize("offload", [True, "stream"])
def test_offload_gives_the_same_result(pipe, offload):
    offloaded = MochiPipeline(pipe.dit, pipe.vae, pipe.text_encoder, offload=offload, device="cpu")
    assert np.array_equal(offloaded("a kite", **SIZE), pipe("a kite", **SIZE))
    with pytest.raises(ValueError, match="needs device"):
        MochiPipeline(pipe.dit, pipe.vae, pipe.text_encoder, offload=offload)


def test_a_device_that_is_not_there_is_told_before_anything_is_read(pipe):
    device = f"cuda:{torch.cuda.device_count()}"
    loaders = (load_transformer, load_vae, load_tiny_vae, load_text_encoder)
    calls = [
        partial(MochiPipeline, pipe.dit, pipe.vae, None, offload=True),
        *(partial(load, "gone") for load in loaders),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="which this machine does not have"):
            call(device=device)


def test_other_ways_to_offload_are_refused(pipe):
    with pytest.raises(ValueError, match="offload is 'disk'; use one of False, True, 'stream'"):
        MochiPipeline(pipe.dit, pipe.vae, pipe.text_encoder, offload="disk", device="cpu")


def test_stopping_early(pipe):
    steps = []
    pipe("a kite", on_step=lambda i, _: steps.append(i) or i == 1, output_type="latent", **SIZE)
    assert steps == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "gif"}, "output_type is 'gif'"),
        ({"height": 33}, "height is 33"),
        ({"latents": torch.zeros(1, 12, 1, 4, 6)}, "need \\(1, 12, 2, 4, 6\\)"),
    ],
)
def test_wrong_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("a kite", **{**SIZE, **arguments})


def test_saved_video_can_be_read_back(tmp_path):
    colours = np.zeros((7, 32, 48, 3), np.float32)
    colours[..., 0] = np.linspace(0, 1, 7)[:, None, None]
    save_video(colours[None], tmp_path / "x.mp4", fps=24)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert stream.average_rate == 24
    assert frames.shape == colours.shape
    assert np.abs(frames[..., 0].mean((1, 2)) - 255 * np.linspace(0, 1, 7)).max() < 8
    with pytest.raises(ValueError, match="one video is"):
        save_video(np.zeros((2, 7, 32, 48, 3)), tmp_path / "y.mp4")
    with pytest.raises(ValueError, match="frames are 33 x 32 pixels"):
        save_video(np.zeros((7, 32, 33, 3)), tmp_path / "y.mp4")
    assert not (tmp_path / "y.mp4").exists()


def test_frames_may_have_any_floating_point_dtype(tmp_path):
    frames = torch.rand(7, 32, 48, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, given in (("one", frames), ("other", frames.float())):
        save_video(given, tmp_path / f"{name}.mp4")
    one, other = (path.read_bytes() for path in tmp_path.iterdir())
    assert one == other
    torch.testing.assert_close(as_frames(frames), frames.float(), rtol=0, atol=0)
    assert torch.equal(as_frames(frames[None]), as_frames(frames)), "as a pipeline returns them"


def test_the_same_frames_make_the_same_file(tmp_path):
    """x264's macroblock tree makes files differ occasionally, and so does its number of threads, by default that of the cores."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 480, 64, 3), np.uint8)
    for name in ("one", "other"):
        save_video(frames, tmp_path / f"{name}.mp4")
    one, other = (path.read_bytes() for path in tmp_path.iterdir())
    assert one == other
    settings = re.search(rb"x264 - core .*? options: ([^\0]*)", one).group(1).split()
    assert {b"mbtree=0", b"threads=4"} <= {*settings}


LOADED = (("text encoder", "t5"), ("transformer", "transformer"), ("autoencoder", "vae"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return {
        "--transformer": folder / "diffusion_models/mochi_preview_bf16.safetensors",
        "--vae": folder / "vae/mochi_vae.safetensors",
        "--t5": folder / "text_encoders/t5xxl_fp16.safetensors",
    }


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize(
    "how",
    [["--offload"], ["--offload", "stream"], ["--compile", "--offload", "stream"]],
)
def test_command_line_generate(models, tokenizer, tmp_path, capsys, monkeypatch, how):
    # Whether blocks are compiled; PyTorch's own backend is tested in test_compiled.py.
    monkeypatch.setattr(AsymmDiT, "compile_blocks", partialmethod(AsymmDiT.compile_blocks, backend="eager"))
    files = [str(part) for pair in models.items() for part in pair]
    size = ["--height", "32", "--width", "48", "--seconds", "0.2", "--steps", "3", "--quantize", "q4_0"]
    target = tmp_path / "kite.mp4"
    common = ["generate", *files, "--tokenizer", str(tokenizer), "--prompt", "a kite", *size]
    counters.clear()
    assert main([*common, *how, "-o", str(target)]) == 0
    assert (counters["stats"]["unique_graphs"] > 0) == ("--compile" in how)
    said = capsys.readouterr()
    assert said.out.strip() == str(target)
    files = re.findall(r"^loading the (.+): (.+)$", said.err, re.M)
    assert files == [(what, models[f"--{option}"].name) for what, option in LOADED]
    assert [said.err.index(count) for count in ("3/3", "7/7")] == sorted(map(said.err.index, ("3/3", "7/7")))
    with av.open(str(target)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 7
    assert main([*common, "--height", "30"]) == 2
    assert "height is 30" in capsys.readouterr().err


def test_a_small_device_leaves_the_text_encoder_on_the_cpu(t5):
    pipe = MochiPipeline(random_dit(), random_vae(), t5, offload="stream", device="cpu")
    pipe.work_device = "meta"
    places = []
    with pipe.working(t5):
        places.append(t5.model.device.type)
    with (
        pytest.raises(NotImplementedError, match="meta tensor"),
        pipe.working(pipe.vae),
    ):  # nothing is returned from there
        places.append(next(pipe.vae.parameters()).device.type)
    assert places == ["cpu", "meta"]


def test_command_line_latents_and_decode(models, tokenizer, tmp_path, capsys):
    files = [str(part) for pair in models.items() for part in pair]
    size = ["--height", "32", "--width", "48", "--frames", "13", "--steps", "2", "--dtype", "fp32"]
    common = ["generate", *files, "--tokenizer", str(tokenizer), "--prompt", "a kite", *size]
    latents, direct, decoded = tmp_path / "kite.latent", tmp_path / "direct.mp4", tmp_path / "kite.mp4"
    for output in (latents, direct):
        assert main([*common, "-o", str(output)]) == 0
    vae = ["--vae", str(models["--vae"]), "--memory-limit", "0.001"]
    assert main(["decode", str(latents), *vae, "-o", str(decoded)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(decoded)
    assert read_frames(direct.read_bytes()).shape == (13, 32, 48, 3)
    assert direct.read_bytes() == decoded.read_bytes()
    assert main(["decode", str(models["--vae"]), *vae, "-o", str(tmp_path / "x.mp4")]) == 2
    assert "could be latents; it must hold exactly one" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct.mp4", "kite.latent", "kite.mp4"]


def test_latent_files(tmp_path):
    latents = torch.randn(2, 12, 3, 4, 6)
    save_latents(latents, tmp_path / "a.latent")
    assert torch.equal(load_latents(tmp_path / "a.latent"), latents)
    save_file({"latent_tensor": latents * 0.18215}, tmp_path / "old.latent")
    torch.testing.assert_close(load_latents(tmp_path / "old.latent"), latents)
    save_file({"anything": latents[0]}, tmp_path / "one.safetensors")
    assert torch.equal(load_latents(tmp_path / "one.safetensors"), latents[:1])


def test_latents_are_no_map_of_their_file(tmp_path):
    save_latents(torch.ones(1, 12, 1, 2, 2), tmp_path / "a.latent")
    latents = load_latents(tmp_path / "a.latent")
    (tmp_path / "a.latent").write_bytes(b"")
    assert torch.equal(latents, torch.ones(1, 12, 1, 2, 2))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seconds", "nan", "seconds is nan"),
        ("--seconds", "inf", "seconds is inf"),
        ("--guidance", "nan", "guidance is nan"),
        ("--steps", "0", "num_steps is 0"),
        ("--width", "100", "width is 100"),
    ],
)
def test_settings_are_looked_at_before_anything_is_loaded(tmp_path, capsys, option, value, message):
    models = ("--transformer", "none", "--t5", "none", "--vae", "none")
    output = ("-o", str(tmp_path / "x.mp4"))
    assert main(["generate", *models, "--prompt", "a kite", "--device", "cpu", *output, option, value]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_suffix_in_capitals_is_the_same_suffix(models, tokenizer, tmp_path):
    files = [
        str(word) for pair in {**models, "--tokenizer": tokenizer, "-o": tmp_path / "x.LATENT"}.items() for word in pair
    ]
    size = ["--height", "32", "--width", "48", "--frames", "7", "--steps", "1", "--device", "cpu"]
    assert main(["generate", *files, "--prompt", "a kite", *size]) == 0
    assert load_latents(tmp_path / "x.LATENT").shape == (1, 12, 2, 4, 6)


def test_a_lora_of_another_model_is_told_before_anything_is_loaded(models, tokenizer, tmp_path, capsys):
    files = {**models, "--tokenizer": tokenizer, "--lora": models["--vae"], "-o": tmp_path / "x.mp4"}
    options = [str(word) for option in files.items() for word in option]
    assert main(["generate", *options, "--prompt", "a kite", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "choose a LoRA made for Mochi" in said
    assert "loading" not in said


def test_a_block_to_skip_is_looked_for_before_anything_is_loaded(models, tokenizer, tmp_path, capsys):
    options = [
        str(word)
        for option in {**models, "--tokenizer": tokenizer, "-o": tmp_path / "x.mp4"}.items()
        for word in option
    ]
    assert main(["generate", *options, "--prompt", "a kite", "--device", "cpu", "--skip-block", "60"]) == 2
    said = capsys.readouterr().err
    assert "skip_blocks lists block 60" in said
    assert "loading" not in said


@pytest.mark.parametrize(
    ("half", "options", "said"),
    [
        ("encoder", [], "This autoencoder has no decoder"),
        ("decoder", ["--image", "first.png"], "This autoencoder has no encoder"),
        ("decoder", ["--frames", "25", "--round", "13", "--keep", "7"], "This autoencoder has no encoder"),
        ("encoder", ["-o", "x.latent"], None),
        ("decoder", ["--frames", "13", "--round", "13", "--keep", "7"], None),
    ],
)
def test_the_half_of_an_autoencoder_that_is_needed_is_there_before_anything_is_loaded(
    models, tokenizer, tmp_path, capsys, monkeypatch, half, options, said
):
    weights = {name: tensor for name, tensor in load_file(models["--vae"]).items() if name.startswith(half)}
    save_file(weights, tmp_path / "half.safetensors")
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (48, 32)).save("first.png")
    files = [*map(str, (part for pair in {**models, "--vae": "half.safetensors"}.items() for part in pair))]
    command = [
        "generate",
        *files,
        "--tokenizer",
        str(tokenizer),
        "--prompt",
        "a kite",
        "--device",
        "cpu",
        "--steps",
        "1",
    ]
    size = ["--height", "32", "--width", "48", "--frames", "7"]
    assert main([*command, *size, *options]) == (2 if said else 0)
    text = capsys.readouterr().err
    assert (said in text and "loading" not in text) if said else "loading" in text


@pytest.mark.parametrize("missing", ["--transformer", "--t5", "--tokenizer", "--lora", "--vae"])
def test_files_of_models_are_looked_at_before_one_is_loaded(models, tokenizer, tmp_path, capsys, missing):
    lora = write_adapter(tmp_path / "lora.safetensors", random_adapter(random_dit().state_dict()), "comfyui")
    files = {**models, "--tokenizer": tokenizer, "--lora": lora}
    files[missing] = tmp_path / "gone"
    options = [str(word) for option in files.items() for word in option]
    output = str(tmp_path / "x.mp4")
    assert main(["generate", *options, "--prompt", "a kite", "--device", "cpu", "-o", output]) == 2
    said = capsys.readouterr().err
    assert "gone" in said
    assert "loading" not in said


@pytest.mark.parametrize(
    ("command", "name", "endings"),
    [
        ("generate", "x.png", ".mp4 or .latent or .safetensors"),
        ("generate", "x", ".mp4 or .latent or .safetensors"),
        ("decode", "x.latent", ".mp4"),
        ("edit", "x.latent", ".mp4"),
    ],
)
def test_the_name_of_an_output_says_what_is_written(capsys, command, name, endings):
    with pytest.raises(SystemExit) as end:
        main([command, "-o", name])
    assert end.value.code == 2
    assert f"{name} must end in {endings}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("junk", "device is junk, which is not a device; use cpu"),
        ("", "device is , which is not a device"),
        ("cud\x1b", "device is cud\\x1b, which is not a device"),
        ("meta", "device is meta, which this machine does not have"),
        ("cpu:128", "device is cpu:128, which this machine does not have"),
        ("cpu:1", "device is cpu:1, which this machine does not have or cannot compute on; it has cpu"),
        (f"cuda:{torch.cuda.device_count()}", "which this machine does not have"),
    ],
)
def test_a_device_is_one_of_the_machine(tmp_path, capsys, device, message):
    save_file({"latents": torch.zeros(1, 12, 1, 2, 2)}, tmp_path / "x.safetensors")
    generate = ["generate", "--transformer", "none", "--t5", "none", "--prompt", "a kite"]
    for command in (generate, [*generate, "--parallel", "auto"], ["decode", str(tmp_path / "x.safetensors")]):
        output = ["--vae", "none", "-o", str(tmp_path / "x.mp4"), "--device", device]
        assert main([*command, *output]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", str(2**70), "is out of range; use a seed of 64 bits."),
        ("--fps", "0", "0 is not a frame rate; use 1 to 1000 frames per second."),
    ],
)
def test_numbers_that_nothing_can_take(capsys, option, value, message):
    with pytest.raises(SystemExit):
        main(["generate", "--transformer", "none", "--t5", "none", "--vae", "none", "--prompt", "a", option, value])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("gibibytes", ["nan", "inf", "-1", "1e300", "much"])
def test_an_amount_of_memory_is_a_number(capsys, gibibytes):
    with pytest.raises(SystemExit):
        main(["decode", "x.latent", "--vae", "none", f"--memory-limit={gibibytes}"])
    assert f"{gibibytes} is not an amount of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(2, 4, 3, 4, 6), r"shape \(2, 4, 3, 4, 6\)"),
        (torch.zeros(0, 12, 3, 4, 6), r"shape \(0, 12, 3, 4, 6\)"),
        (torch.zeros(1, 12, 0, 4, 6), "with at least one of each"),
        (torch.zeros(1, 12, 3, 0, 6), "with at least one of each"),
        (torch.full((1, 12, 3, 4, 6), torch.nan), "864 infinite or NaN values out of 864"),
        (torch.zeros(1, 12, 3, 4, 6, dtype=torch.int32), "latents are int32"),
    ],
)
def test_latent_files_of_nothing_or_of_no_numbers(tmp_path, capsys, latents, message):
    save_file({"latent_tensor": latents}, tmp_path / "wrong.latent")
    with pytest.raises(ValueError, match=message):
        load_latents(tmp_path / "wrong.latent")
    assert main(["decode", str(tmp_path / "wrong.latent"), "--vae", "none", "-o", str(tmp_path / "x.mp4")]) == 2
    assert "wrong.latent" in capsys.readouterr().err
    assert not (tmp_path / "x.mp4").exists()


# Corners of the colour cube and two between.
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40], [30, 140, 210]])


def test_videos_have_the_colours_of_bt_709_and_say_so(tmp_path):
    patches = np.repeat(COLOURS[None, :, None], 16, axis=2).reshape(1, -1, 3).repeat(32, axis=0)
    save_video(patches[None].astype(np.uint8), tmp_path / "x.mp4")
    with av.open(str(tmp_path / "x.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
        frame = next(container.decode(video=0))
    luma = 16 + 219 * (COLOURS / 255) @ [0.2126, 0.7152, 0.0722]  # ITU-R BT.709-6, 3.2
    assert np.abs(frame.to_ndarray(format="yuv420p")[8, 8 : patches.shape[1] : 16] - luma).max() < 2
    assert np.abs(frame.to_ndarray(format="rgb24")[8, 8::16].astype(int) - COLOURS).max() < 6


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
@pytest.mark.parametrize("name", ["x.mp4", "x.latent", "x.pt", "x.safetensors"])
def test_a_disk_that_is_full_is_one_sentence_and_leaves_what_was_there(tmp_path, name):
    import resource

    write = {
        "x.mp4": lambda path: save_video(np.random.default_rng(0).random((7, 128, 128, 3)), path),
        "x.latent": lambda path: save_latents(torch.randn(1, 12, 7, 16, 16), path),
        "x.pt": lambda path: replace_state(path, {"weights": torch.randn(100, 100)}),
        "x.safetensors": lambda path: write_safetensors(path, from_state_dict({"a": torch.randn(100, 100)}), {}),
    }[name]
    (tmp_path / name).write_bytes(b"earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            OSError, match=rf"There is no room for \S*{name} \(.*\); free some space, or choose another place.$"
        ):
            write(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 20_000


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_an_output_that_is_a_link_stays_one_and_a_device_stays(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real.name)
    for text in ("new", "newer"):
        with replacing(link) as temporary:
            temporary.write_text(text)
        assert (link.is_symlink(), real.read_text()) == (True, text)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"pipe is a device or a pipe, which a file would replace; choose the name of a"):
        replacing(pipe).__enter__()
    assert pipe.is_fifo()
    assert len([*tmp_path.iterdir()]) == 3


def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path):
    path = tmp_path / ("x" * 245 + ".mp4")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_on_a_drive_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: False)  # as for Z:\\ and everything in it
    with pytest.raises(KeyboardInterrupt), folder(tmp_path / "a" / "b"):
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()


def test_a_state_is_not_gathered_in_memory(tmp_path):
    state = {"weights": [torch.zeros(2**18) for _ in range(16)]}  # of 1 MiB each
    tracemalloc.start()
    replace_state(tmp_path / "x.pt", state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20
    assert len(torch.load(tmp_path / "x.pt", weights_only=True)["weights"]) == 16


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none/x.mp4", "x.mp4 cannot be written (No such file or directory); choose another place."),
        ("folder.mp4", "is a folder; choose the name of a file."),
    ],
)
@pytest.mark.parametrize("command", ["generate", "edit", "decode"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path, capsys, command, place, message):
    (tmp_path / "folder.mp4").mkdir()
    save_latents(torch.zeros(1, 12, 1, 2, 2), tmp_path / "x.latent")
    models = ["--transformer", "a", "--t5", "c", "--prompt", "x"]
    arguments = {
        "generate": models,
        "edit": [*models, "--source-prompt", "y", "--video", "d"],
        "decode": [str(tmp_path / "x.latent")],
    }
    assert main([command, *arguments[command], "--vae", "b", "-o", str(tmp_path / place)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder.mp4", "x.latent"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
            "CUDA out of memory. Tried to",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
            "Main memory is full.",
        ),
        (MemoryError(), "Main memory is full."),
        (RuntimeError("CUDA error: out of memory"), "The device is out of memory."),
        (RuntimeError("MPS backend out of memory (allocated 9 GB)"), "The device is out of memory."),
    ],
    ids=["GPU", "CPU", "Python", "driver", "Apple"],
)
def test_memory_that_is_full_is_one_sentence_with_a_remedy(monkeypatch, tmp_path, capsys, error, said):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("mochi_core.commands.load_latents", full)
    monkeypatch.setattr("mochi_core.commands.load_pipeline", full)
    models = ["--transformer", "a", "--t5", "c", "--prompt", "x"]
    for command, remedy in (
        (["decode", "x.latent"], "Close other programs"),
        (["generate", *models], "Use fewer frames"),
    ):
        assert main([*command, "--vae", "none", "-o", str(tmp_path / "x.mp4"), "--device", "cpu"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {said}")
        assert remedy in line


def test_an_error_of_another_kind_is_not_hidden(monkeypatch):
    def broken(_):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr("mochi_core.commands.load_latents", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main(["decode", "x.latent", "--vae", "none", "--device", "cpu"])


def test_a_video_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"an earlier video")

    def fail():
        with video_file(path) as writer:
            writer.write(np.zeros((2, 32, 48, 3)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"an earlier video"]


@pytest.mark.slow
def test_command_line_loras(models, tokenizer, tmp_path, capsys):
    files = [str(part) for pair in models.items() for part in pair]
    size = ["--height", "32", "--width", "48", "--frames", "7", "--steps", "3", "--dtype", "fp32"]
    command = ["generate", *files, "--tokenizer", str(tokenizer), "--prompt", "a kite", *size]
    lora = write_adapter(tmp_path / "a.safetensors", random_adapter(random_dit().state_dict()), "comfyui")
    videos = {}
    for name, loras in {
        "none": [],
        "off": ["--lora", f"{lora}:0"],
        "on": ["--lora", str(lora)],
        "summed": ["--lora", f"{lora}:2.5", "--lora", f"{lora}:-1.5"],
    }.items():
        assert main([*command, *loras, "-o", str(tmp_path / f"{name}.mp4")]) == 0
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            videos[name] = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]) / 255
    assert np.array_equal(videos["off"], videos["none"])
    assert np.abs(videos["on"] - videos["none"]).mean() > 0.05
    assert np.abs(videos["on"] - videos["summed"]).mean() < 0.01
    assert main([*command, "--lora", f"{models['--vae']}:0.5"]) == 2
    assert "mochi_vae.safetensors holds a Mochi autoencoder" in capsys.readouterr().err


def test_command_line_inspect(models, tmp_path, capsys):
    assert main(["inspect", str(models["--transformer"])]) == 0
    out = capsys.readouterr().out
    assert "a Mochi transformer, 3 blocks, bfloat16" in out
    assert "GB" in out
    assert main(["inspect", str(tmp_path / "gone.safetensors")]) == 2
    assert "There is no file" in capsys.readouterr().err


def test_latent_output_is_in_vae_space(pipe):
    noise = torch.randn(1, 12, 2, 4, 6)
    out = pipe("a kite", latents=noise, output_type="latent", sigmas=torch.tensor([1.0, 1.0]), **SIZE)
    torch.testing.assert_close(out, denormalize_latents(noise))


TEXT = {"height": 32, "width": 48, "num_frames": 7, "num_inference_steps": 2, "output_type": "latent"}


def test_encoded_text_needs_no_text_encoder(pipe, t5):
    without = MochiPipeline(pipe.dit, pipe.vae, None)
    (embeds, mask), (fog, fog_mask) = t5.encode("a kite"), t5.encode("fog")
    given = without(prompt_embeds=embeds, prompt_attention_mask=mask, **TEXT)
    assert torch.equal(given, pipe("a kite", **TEXT))
    cut = without(prompt_embeds=embeds[:, : mask.sum()], negative_prompt=None, **TEXT)
    torch.testing.assert_close(cut, given)
    negative = {"negative_prompt_embeds": fog, "negative_prompt_attention_mask": fog_mask.int()}
    assert torch.equal(pipe("a kite", "", **negative, **TEXT), pipe("a kite", "fog", **TEXT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "There is no prompt; pass a string, or a list of one or more."),
        ({"prompt": None}, "There is no prompt"),
        ({"negative_prompt": []}, "There is no negative_prompt"),
        ({"prompt_embeds": torch.zeros(1, 4, TEXT_WIDTH)}, "prompt and prompt_embeds are both given"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(4, TEXT_WIDTH)},
            r"shapes \(4, 96\) and \(4, 96\)|pass \(B, L, width\)",
        ),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 3)}, f"width 3; this denoiser needs {TEXT_WIDTH}"),
        ({"prompt_attention_mask": torch.ones(1, 4)}, "prompt_attention_mask is for prompt_embeds"),
        ({"negative_prompt": "fog"}, "This pipeline has no text encoder; pass prompt_embeds"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0; use 1 or more"),
    ],
)
def test_text_that_does_not_fit_is_told(pipe, arguments, message):
    without = MochiPipeline(pipe.dit, pipe.vae, None)
    with pytest.raises(ValueError, match=message):
        without(**{"prompt": "a kite", **arguments, **TEXT})


def test_several_videos_of_each_prompt(pipe):
    prompts = ["a kite", "the deep blue sea at night"]
    noise = torch.randn(4, 12, 2, 4, 6)
    videos = pipe(prompts, ["fog", "rain"], latents=noise, num_videos_per_prompt=2, **TEXT)
    twice = [prompts[0], prompts[0], prompts[1], prompts[1]]
    torch.testing.assert_close(videos, pipe(twice, ["fog", "fog", "rain", "rain"], latents=noise, **TEXT))
    one, two = (pipe("a kite", seed=3, num_videos_per_prompt=count, **TEXT) for count in (1, 2))
    torch.testing.assert_close(two[:1], one, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(two[1:], one, rtol=0.1, atol=0.1)


def test_images_and_a_list_of_noise_levels(pipe):
    sigmas = [1.0, 0.7, 0.0]
    frames = pipe("a kite", sigmas=sigmas, **{**TEXT, "output_type": "np"})
    assert np.array_equal(frames, pipe("a kite", sigmas=torch.tensor(sigmas), **{**TEXT, "output_type": "np"}))
    (images,) = pipe("a kite", sigmas=sigmas, **{**TEXT, "output_type": "pil"})
    assert [image.size for image in images] == [(48, 32)] * 7
    assert np.abs(np.stack([np.asarray(image) for image in images]) / 255 - frames[0]).max() < 0.5 / 255 + 1e-6


def test_loras_by_name(tmp_path, t5):
    pipe = MochiPipeline(random_dit(), random_vae(), t5)
    paths = {}
    for name, seed in (("kites", 1), ("fog", 2)):
        paths[name] = write_adapter(
            tmp_path / f"{name}.safetensors", random_adapter(pipe.dit.state_dict(), seed=seed), "comfyui"
        )
    plain = pipe("a kite", **TEXT)

    def made_by(**strengths):
        other = MochiPipeline(random_dit(), pipe.vae, t5)
        for name, strength in strengths.items():
            other.load_lora_weights(paths[name], strength=strength)
        return other("a kite", **TEXT)

    pipe.load_lora_weights(paths["kites"])
    pipe.load_lora_weights(paths["fog"], "dense fog", 0.5)
    both = made_by(kites=1.0, fog=0.5)
    assert torch.equal(pipe("a kite", **TEXT), both)
    pipe.set_adapters("dense fog", 0.3)
    assert torch.equal(pipe("a kite", **TEXT), made_by(fog=0.3))
    pipe.set_adapters(["dense fog", "kites"], [0.5, 1.0])
    assert torch.equal(pipe("a kite", **TEXT), both)
    for call, message in {
        lambda: pipe.load_lora_weights(paths["kites"]): "There is already a LoRA kites; pass another adapter_name",
        lambda: pipe.set_adapters(["kites", "rain"]): "There is no LoRA rain; there are: kites, dense fog.",
        lambda: pipe.set_adapters(["kites"], [1, 2]): "There are 1 names, but 2 strengths",
        lambda: pipe.set_adapters(["kites", "dense fog"], [0, float("nan")]): "The strength of a LoRA is nan",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(pipe("a kite", **TEXT), both)
    pipe.delete_adapters("dense fog")
    assert torch.equal(pipe("a kite", **TEXT), made_by(kites=1.0))
    kites = pipe.loras["kites"]
    pipe.fuse_lora()
    kites.remove()  # is no longer there
    assert not pipe.loras
    assert not [module for module in pipe.dit.modules() if hasattr(module, "lora")]
    torch.testing.assert_close(pipe("a kite", **TEXT), made_by(kites=1.0), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(pipe("a kite", **TEXT), plain, rtol=0.01, atol=0.01)
    pipe.load_lora_weights(paths["fog"])
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe("a kite", **TEXT), made_by(kites=1.0), rtol=1e-3, atol=1e-3)
