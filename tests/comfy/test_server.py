"""A real ComfyUI server, driven over its API as a client would."""

import io
import math
import os
import shutil
import threading
import time
from dataclasses import replace

import av
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness import trained
from tests.harness.client import PromptRefused
from tests.harness.formats import sharded
from tests.harness.graphs import (
    FRESH_SEEDS,
    MODEL,
    NEGATIVE,
    PATCHES,
    POSITIVE,
    SAMPLER,
    T5,
    VAE,
    assert_healthy,
    node,
    prompt,
    upto_sampler,
    with_defaults,
)
from tests.harness.lora_files import write_genmo_lora
from tests.harness.quantized_files import GGUF, SAFETENSORS
from tests.harness.server import ROOT
from tests.harness.tiny_models import DIT, random_dit, random_t5


def test_workflow_makes_an_mp4_of_the_right_size_length_and_rate(comfy_client):
    run = comfy_client.run(prompt(num_frames=19))
    assert run.outcome == "execution_success", run.error
    with av.open(io.BytesIO(comfy_client.download(run.files[0]))) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (96, 64)
        assert stream.average_rate == 30
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 19
    assert frames[0].std() > 5


def test_run_shows_progress(comfy_client):
    run = comfy_client.run(prompt())
    steps = [data["value"] for name, data in run.events if name == "progress" and data["node"] == SAMPLER]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, 4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 100}, "width is 100, but Mochi needs a multiple of 16; use 96 or 112."),
        (
            {"height": 50, "num_frames": 24},
            "height is 50, but Mochi needs a multiple of 16; use 48 or 64. "
            "num_frames is 24, but Mochi needs 6k + 1 frames (7, 13, 19, ... 163); use 19 or 25.",
        ),
        ({"cfg": math.nan}, "cfg is nan, but must be finite; use 1 (off) or more, such as 4.5."),
        ({"denoise": math.nan}, "denoise is nan, but it is a share of the schedule; use a value above 0 and up to 1."),
    ],
)
def test_invalid_sizes_are_refused_with_the_nearest_valid_ones_before_anything_is_loaded(comfy_client, inputs, message):
    graph = prompt(**inputs)
    graph[POSITIVE]["inputs"]["prompt"] = message  # no result is cached for it
    run = comfy_client.run(graph)
    assert (run.outcome, run.error) == ("execution_error", message)
    started = {data["node"] for name, data in run.events if name == "executing"}
    assert SAMPLER in started
    assert POSITIVE not in started


@pytest.mark.parametrize(
    ("inputs", "kinds"),
    [
        ({"num_frames": "13.0"}, {"num_frames": "invalid_input_type"}),
        ({"width": 1e30, "height": 8}, {"width": "value_bigger_than_max", "height": "value_smaller_than_min"}),
        ({"width": True, "steps": 0}, {"width": "value_smaller_than_min", "steps": "value_smaller_than_min"}),
    ],
)
def test_each_value_out_of_range_is_reported_once_at_its_input(comfy_client, inputs, kinds):
    with pytest.raises(PromptRefused) as refused:
        comfy_client.run(prompt(**inputs))
    ((node_id, found),) = refused.value.details["node_errors"].items()
    assert node_id == SAMPLER
    assert {error["extra_info"]["input_name"]: error["type"] for error in found["errors"]} == kinds
    assert len(found["errors"]) == len(kinds)


def test_empty_latents_of_other_models_get_mochis_size(latents_of):
    """LTX's latents span 32 x 32 pixels, Mochi's 8 x 8."""
    graph = upto_sampler(steps=1)
    graph["ours"] = node("EmptyMochiLatentVideo", width=96, height=64, length=13, batch_size=1)
    graph["others"] = node("EmptyLTXVLatentVideo", width=96, height=64, length=17, batch_size=1)
    inputs = graph[SAMPLER]["inputs"]
    graph[SAMPLER]["inputs"] = {**inputs, "latent": ["ours", 0]}
    graph["sample"] = node("Mochi1Sampler", **{**inputs, "latent": ["others", 0]})
    ours, others = latents_of(graph, [SAMPLER, 0], ["sample", 0])
    assert ours.shape == others.shape == (1, 12, 3, 8, 12)
    assert torch.equal(ours, others)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("latent", "sixteen channels", "latents have shape (1, 16, 1, 8, 12), but Mochi's are (batch, 12, T, H, W)"),
        ("latent", "no frames", "latents have shape (1, 12, 0, 4, 4), but Mochi's are (batch, 12, T, H, W)"),
        ("latent", "no number", "latents contain 1 infinite or NaN values out of 192"),
        ("sigmas", "no step", "sigmas have shape (1,), but must be one-dimensional"),
        ("sigmas", "no level", "sigmas have shape (0,), but must be one-dimensional"),
        ("decode", "no number", "latents contain 1 infinite or NaN values out of 192"),
        ("decode", "no frames", "latents have shape (1, 12, 0, 4, 4), but Mochi's are (batch, 12, T, H, W)"),
        ("stock decode", "no frames", "latents have shape (1, 12, 0, 4, 4), but Mochi's are (batch, 12, T, H, W)"),
    ],
)
def test_latents_and_schedules_that_make_no_video(comfy_client, comfy_server, name, source, message):
    folder, mark = comfy_server.base / "input", {"latent_format_version_0": torch.tensor([])}
    wrong = torch.ones(1, 12, 1, 4, 4)
    wrong[0, 3, 0, 2, 1] = math.nan
    files = {
        "no frames": torch.zeros(1, 12, 0, 4, 4),
        "no number": wrong,
        "sixteen channels": torch.ones(1, 16, 1, 8, 12),
    }
    for file, tensor in files.items():
        save_file({"latent_tensor": tensor, **mark}, folder / f"{file}.latent")
    graph = prompt(steps=1)
    graph["split"] = node("SplitSigmas", sigmas=["levels", 0], step=1)
    graph["levels"] = node("Mochi1Sigmas", steps=1, threshold_noise=0.025, linear_steps=0, denoise=1.0)
    graph["none"] = node("ManualSigmas", sigmas="nothing")
    outputs = {"no step": ["split", 1], "no level": ["none", 0]}
    graph["load"] = node("LoadLatent", latent=f"{source}.latent" if source in files else "no number.latent")
    given = outputs.get(source, ["load", 0])
    if "decode" in name:
        kind = "VAEDecode" if "stock" in name else "Mochi1TiledVAEDecode"
        graph["7"] = node(kind, samples=given, vae=[VAE, 0])
    else:
        graph[SAMPLER]["inputs"][name] = given
    run = comfy_client.run(graph)
    assert run.outcome == "execution_error"
    assert message in run.error
    assert not run.files


def test_missing_file_is_refused(comfy_client):
    graph = prompt()
    graph[MODEL]["inputs"]["model_name"] = "nowhere.safetensors"
    with pytest.raises(PromptRefused, match="nowhere"):
        comfy_client.run(graph)


def test_file_names_cannot_leave_the_model_folders(comfy_client, comfy_server):
    graph = prompt()
    graph[MODEL]["inputs"]["model_name"] = "../vae/mochi_vae.safetensors"
    assert (comfy_server.base / "models/vae/mochi_vae.safetensors").is_file()
    with pytest.raises(PromptRefused, match="not in list"):
        comfy_client.run(graph)


def test_model_folders_are_read_again_when_one_has_changed_and_only_then(comfy_client, comfy_server):
    def reads():
        return comfy_client.run({"count": node("ProbeCountReads", turn=next(FRESH_SEEDS))}).outputs["count"]["count"][0]

    def listed():
        return comfy_client.get("/object_info/Mochi1LoadT5")["Mochi1LoadT5"]["input"]["required"]["t5_name"][1][
            "options"
        ]

    folder = comfy_server.base / "models" / "text_encoders" / "of mine"
    (folder / ".git").mkdir(parents=True)
    for name in ("new.gguf", ".git/old.gguf", "other.json"):
        (folder / name).touch()
    assert f"of mine{os.sep}new.gguf" in listed()
    assert not [name for name in listed() if name.endswith(("old.gguf", "other.json"))]
    comfy_client.run(prompt())
    before = reads()
    comfy_client.run(prompt())
    assert reads() == before + 1  # the count from the line above
    (folder / "newer.gguf").touch()
    assert f"of mine{os.sep}newer.gguf" in listed()
    shutil.rmtree(folder)
    assert not [name for name in listed() if name.startswith("of mine")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda source, target: target.write_bytes(source.read_bytes()[:-1000]), "is incomplete"),
        (lambda _, target: target.write_text("<html>Not found</html>"), "is not a safetensors file"),
        (
            lambda source, target: shutil.copy(source.parents[1] / "vae/mochi_vae.safetensors", target),
            "not a Mochi transf",
        ),
    ],
    ids=["truncated", "web page", "wrong kind"],
)
def test_bad_files_are_told_what_is_wrong(comfy_client, comfy_server, make, message):
    models = comfy_server.base / "models" / "diffusion_models"
    make(models / "mochi_preview_bf16.safetensors", models / "bad.safetensors")
    graph = prompt()
    graph[MODEL]["inputs"]["model_name"] = "bad.safetensors"
    run = comfy_client.run(graph)
    assert run.outcome == "execution_error"
    assert message in run.error
    assert run.error.count(".") <= 4
    assert_healthy(comfy_client)


def test_incomplete_t5_is_refused(comfy_client, comfy_server):
    folder = comfy_server.base / "models" / "text_encoders"
    tensors = load_file(folder / "t5xxl_fp16.safetensors")
    del tensors["encoder.block.3.layer.0.SelfAttention.o.weight"]
    save_file(tensors, folder / "bad.safetensors")
    graph = prompt()
    graph[T5]["inputs"]["t5_name"] = "bad.safetensors"
    run = comfy_client.run(graph)
    assert run.outcome == "execution_error"
    assert "1 missing (encoder.block.3.layer.0.SelfAttention.o.weight)" in run.error


def test_cancel_ends_within_a_step_and_leaves_the_server_healthy(comfy_client):
    pressed = []

    def press_cancel(name, data):
        if name == "progress" and data["node"] == SAMPLER and data["value"] >= 2 and not pressed:
            pressed.append(time.monotonic())
            threading.Thread(target=comfy_client.interrupt).start()

    run = comfy_client.run(prompt(steps=300, width=256, height=256), on_event=press_cancel)
    last = max(data["value"] for name, data in run.events if name == "progress" and data["node"] == SAMPLER)
    assert run.outcome == "execution_interrupted"
    assert last < 50
    assert_healthy(comfy_client)


def test_ksampler_returns_the_same_latents(latents_of):
    graph = upto_sampler(seed=77)
    graph["empty"] = node("EmptyMochiLatentVideo", width=96, height=64, length=13, batch_size=1)
    graph["ksampler"] = node(
        "KSampler", model=[MODEL, 0], seed=77, steps=4, cfg=4.5, sampler_name="euler", scheduler="linear_quadratic",
        positive=[POSITIVE, 0], negative=[NEGATIVE, 0], latent_image=["empty", 0], denoise=1.0,
    )  # fmt: skip
    ours, theirs = latents_of(graph, [SAMPLER, 0], ["ksampler", 0])
    assert ours.shape == (1, 12, 3, 8, 12)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_sampler_custom_advanced_with_our_sigmas_returns_the_same_latents(latents_of):
    graph = upto_sampler(seed=78)
    graph["empty"] = node("EmptyMochiLatentVideo", width=96, height=64, length=13, batch_size=1)
    graph["noise"] = node("RandomNoise", noise_seed=78)
    graph["euler"] = node("KSamplerSelect", sampler_name="euler")
    graph["sigmas"] = node("Mochi1Sigmas", steps=4, threshold_noise=0.1, linear_steps=3, denoise=1.0)
    graph["guider"] = node("CFGGuider", model=[MODEL, 0], positive=[POSITIVE, 0], negative=[NEGATIVE, 0], cfg=4.5)
    graph["advanced"] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["euler", 0], sigmas=["sigmas", 0],
        latent_image=["empty", 0],
    )  # fmt: skip
    graph[SAMPLER]["inputs"]["sigmas"] = ["sigmas", 0]
    ours, theirs = latents_of(graph, [SAMPLER, 0], ["advanced", 0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_python_pipeline_returns_the_same_latents(latents_of, comfy_server):
    from mochi_core import MochiPipeline, load_text_encoder, load_transformer, load_vae

    graph = upto_sampler(seed=79)
    (ours,) = latents_of(graph, [SAMPLER, 0])
    models = comfy_server.base / "models"
    pipe = MochiPipeline(
        load_transformer(models / "diffusion_models/mochi_preview_bf16.safetensors", torch.float32),
        load_vae(models / "vae/mochi_vae.safetensors"),
        load_text_encoder(models / "text_encoders/t5xxl_fp16.safetensors", trained.TOKENIZER),
    )
    words = graph[POSITIVE]["inputs"]["prompt"]
    latents = pipe(words, height=64, width=96, num_frames=13, num_inference_steps=4, seed=79, output_type="latent")
    torch.testing.assert_close(ours, latents, rtol=1e-3, atol=1e-3)


def test_video_to_video_and_batches(latents_of):
    graph = upto_sampler(batch_size=2)
    (batch,) = latents_of(graph, [SAMPLER, 0])
    assert batch.shape == (2, 12, 3, 8, 12)
    graph = upto_sampler()
    again = {**graph[SAMPLER]["inputs"], "latent": [SAMPLER, 0], "seed": next(FRESH_SEEDS)}
    graph["again"] = node("Mochi1Sampler", **{**again, "denoise": 0.25})
    graph["other"] = node("Mochi1Sampler", **{**again, "denoise": 0.5})
    first, near, far = latents_of(graph, [SAMPLER, 0], ["again", 0], ["other", 0])
    assert 0 < (near - first).norm() < (far - first).norm()


@pytest.mark.parametrize("patch", PATCHES)
def test_stock_model_patches_change_the_result(latents_of, comfy_client, comfy_server, patch):
    write_genmo_lora(comfy_server.base / "models" / "loras" / "genmo.safetensors", random_dit())
    graph = upto_sampler(steps=12)
    graph["patch"] = with_defaults(comfy_client, patch, model=[MODEL, 0], **PATCHES[patch])
    graph["patched"] = node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "model": ["patch", 0]})
    plain, patched = latents_of(graph, [SAMPLER, 0], ["patched", 0])
    assert patched.isfinite().all()
    assert not torch.equal(plain, patched)


@pytest.mark.parametrize(
    ("patch", "inputs"),
    # This backend traces like inductor but builds nothing for the CPU, which would take half a minute.
    [("TorchCompileModel", {"backend": "cudagraphs"}), ("SelectModelDevice", {"device": "cpu"})],
)
def test_stock_model_patches_that_must_not_change_it(latents_of, comfy_server, patch, inputs):
    shallow = random_dit(replace(DIT, depth=1)).state_dict()  # PyTorch's compiler takes ten seconds for each block
    save_file(shallow, comfy_server.base / "models" / "diffusion_models" / "shallow.safetensors")
    graph = upto_sampler()
    graph[MODEL]["inputs"]["model_name"] = "shallow.safetensors"
    graph["patch"] = node(patch, model=[MODEL, 0], **inputs)
    graph["patched"] = node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "model": ["patch", 0]})
    plain, patched = latents_of(graph, [SAMPLER, 0], ["patched", 0])
    torch.testing.assert_close(plain, patched, rtol=1e-3, atol=1e-3)


# Relative error of the latents; the first three only reorder the arithmetic.
WEIGHT_DTYPES = {
    "fp32": 0.02,
    "bf16": 0.02,
    "fp16": 0.02,
    "fp8_e4m3fn": 0.3,
    "fp8_rowwise": 0.3,
    "int8": 0.1,
    "q4_0": 0.6,
}


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_weight_dtypes(latents_of, dtype):
    graph = upto_sampler()
    graph["other"] = node("Mochi1LoadTransformer", model_name="mochi_preview_bf16.safetensors", weight_dtype=dtype)
    graph["sampled"] = node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "model": ["other", 0]})
    auto, chosen = latents_of(graph, [SAMPLER, 0], ["sampled", 0])
    error = (auto - chosen).norm() / auto.norm()
    assert error < WEIGHT_DTYPES[dtype]
    assert (error > 1e-4) == (WEIGHT_DTYPES[dtype] > 0.02)


@pytest.mark.parametrize("form", ["scaled fp8, older", "int8", "Q4_0 gguf"])
def test_quantised_files(latents_of, comfy_server, form):
    """The shipped workflow on a quantised transformer and T5, compared with the same numbers in float32."""
    models = comfy_server.base / "models"
    name = f"quantised.{'gguf' if 'gguf' in form else 'safetensors'}"
    write = {**SAFETENSORS, **GGUF}[form]
    for folder, tensors in (("diffusion_models", random_dit().state_dict()), ("text_encoders", random_t5())):
        save_file(write(tensors, models / folder / name), models / folder / "meaning.safetensors")
    graph = upto_sampler()
    graph[MODEL]["inputs"]["model_name"] = graph[T5]["inputs"]["t5_name"] = name
    seed = graph[SAMPLER]["inputs"]["seed"]
    (quantised,) = latents_of(graph, [SAMPLER, 0])
    graph = upto_sampler(seed=seed)
    graph[MODEL]["inputs"]["model_name"] = graph[T5]["inputs"]["t5_name"] = "meaning.safetensors"
    (meaning,) = latents_of(graph, [SAMPLER, 0])
    # The host multiplies in int8 unless the file forbids it; without VNNI, these products also saturate.
    assert (quantised - meaning).norm() / meaning.norm() < (0.25 if form == "int8" else 1e-3)


def save_as_a_trainer(tensors, path):
    torch.save({"model": tensors, "optimizer": {"step": torch.ones(1)}}, path)


@pytest.mark.parametrize(
    ("write", "path", "choice"),
    [
        (sharded("safetensors", save_file), "sharded", "sharded/model.safetensors.index.json"),
        (save_as_a_trainer, "trainer.pt", "trainer.pt"),
    ],
)
def test_files_that_the_host_cannot_read(latents_of, comfy_server, write, path, choice):
    folder = comfy_server.base / "models" / "diffusion_models"
    save_file(random_dit().state_dict(), folder / "whole.safetensors")
    write(random_dit().state_dict(), folder / path)
    graph = upto_sampler()
    graph[MODEL]["inputs"]["model_name"] = "whole.safetensors"
    graph["other"] = node("Mochi1LoadTransformer", model_name=choice, weight_dtype="auto")
    graph["sampled"] = node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "model": ["other", 0]})
    whole, other = latents_of(graph, [SAMPLER, 0], ["sampled", 0])
    assert torch.equal(whole, other)


def test_stock_text_encode_on_our_clip(latents_of):
    graph = upto_sampler()
    graph["stock"] = node("CLIPTextEncode", clip=[T5, 0], text=graph[POSITIVE]["inputs"]["prompt"])
    graph["sampled"] = node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "positive": ["stock", 0]})
    ours, stock = latents_of(graph, [SAMPLER, 0], ["sampled", 0])
    assert torch.equal(ours, stock)


def test_empty_prompt_differs_from_the_stock_encoders_end_token(latents_of):
    graph = upto_sampler()
    graph["stock"] = node("CLIPTextEncode", clip=[T5, 0], text="")
    graph["sampled"] = node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "negative": ["stock", 0]})
    ours, stock = latents_of(graph, [SAMPLER, 0], ["sampled", 0])
    assert not torch.equal(ours, stock)


def test_nodes_are_described(comfy_client):
    infos = {name: info for name, info in comfy_client.get("/object_info").items() if name.startswith("Mochi1")}
    assert set(infos) == {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert {"genmo", "video", "text to video", "t2v"} <= set(infos["Mochi1Sampler"]["search_aliases"])
    for name, info in infos.items():
        assert info["description"], name
        assert info["search_aliases"], name
        assert info["category"] == "Mochi"
        assert all(info["output_tooltips"]), name
        for kind in ("required", "optional"):
            for key, spec in info["input"].get(kind, {}).items():
                assert spec[1].get("tooltip"), f"{name}.{key}"


def test_start_prints_no_warning_about_the_pack(comfy_server):
    log = comfy_server.log.read_text(encoding="utf-8", errors="replace")
    start, gui, _ = log.partition("To see the GUI go to")
    assert gui
    ours = [line for line in start.splitlines() if "mochi" in line.lower()]
    assert any("seconds:" in line for line in ours)  # the list of what was imported
    assert not [line for line in ours if any(word in line.lower() for word in ("warn", "error", "fail", "traceback"))]
