"""Mochi Image to Video with the host's samplers and ours, and the mask of VAE Encode (Mochi), with the trained tiny model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import MochiPipeline, load_text_encoder, load_transformer, load_vae
from tests.harness import trained
from tests.harness.comfy_process import run_in_comfyui

SCRIPT = """
import json
import nodes as host
from comfy_extras.nodes_custom_sampler import (
    CFGGuider, DisableNoise, KSamplerSelect, RandomNoise, SamplerCustom, SamplerCustomAdvanced
)
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from pack.nodes.bridge.model import load_model
from pack.nodes.bridge.text import load_clip
from pack.nodes.bridge.vae import load_vae
from pack.nodes.image_to_video import ImageToVideo
from pack.nodes.sampling import Sampler, Sigmas
from pack.nodes.text import T5Encode
from pack.nodes.vae import VAEEncode

torch.set_num_threads(1)
torch.set_grad_enabled(False)
folder, transformer, vae, t5 = arguments
given = load_file(folder + "/given.safetensors")
clip, vae = load_clip(t5, torch.float32), load_vae([vae], torch.float32)
positive, negative = (T5Encode.execute(clip, text).args[0] for text in ("a red circle moving right", ""))
size = {"width": 64, "height": 64, "num_frames": 25}
STEPS, CFG, SEED = 6, 3.0, 5
made, told = {}, {}

def ours(model, latent, **more):
    return Sampler.execute(model, positive, negative, **size, steps=STEPS, cfg=CFG, seed=SEED, latent=latent, **more).args[0]

def ksampler(model, latent):
    return host.KSampler().sample(model, SEED, STEPS, CFG, "euler", "linear_quadratic", positive, negative, latent, 1.0)[0]

def custom(model, latent, noise=RandomNoise.execute(SEED), steps=slice(None)):
    (sigmas,), (sampler,) = Sigmas.execute(STEPS).args, KSamplerSelect.execute("euler").args
    (guider,) = CFGGuider.execute(model, positive, negative, CFG).args
    return SamplerCustomAdvanced.execute(noise.args[0], guider, sampler, sigmas[steps], latent).args[0]

def with_another_seed(model, latent):
    return custom(model, custom(model, latent, steps=slice(4)), DisableNoise.execute(), slice(3, None))

def in_two_runs(model, latent):
    (sigmas,), (sampler,) = Sigmas.execute(STEPS).args, KSamplerSelect.execute("euler").args
    for noise, part in ((True, sigmas[:4]), (False, sigmas[3:])):
        latent = SamplerCustom.execute(model, noise, SEED, CFG, positive, negative, sampler, part, latent).args[0]
    return latent

for levels in (False, True):
    model = load_model(transformer, torch.float32, frame_levels=levels)
    options = {"start_noise": 0.1} if levels else {}
    both, latent, kept = ImageToVideo.execute(
        model, vae, **size, start_image=given["start"], end_image=given["end"], end_noise=0.2, **options
    ).args
    told[str(levels)] = [latent["noise_mask"].flatten().tolist(), list(latent["samples"].shape), kept]
    for name, sample in (("ours", ours), ("ksampler", ksampler), ("custom", custom), ("two runs", in_two_runs),
                         ("another seed", with_another_seed)):
        made[f"{name} {levels}"] = sample(both, latent)["samples"]
    made[f"given {levels}"] = latent["samples"]
    made[f"two {levels}"] = ours(both, {**latent, "samples": latent["samples"].repeat(2, 1, 1, 1, 1)})["samples"]
    if not levels:
        made["differential"] = ksampler(DifferentialDiffusion.execute(model).args[0], latent)["samples"]
        assert "denoise_mask_function" not in model.model_options, "the MODEL that came in has changed"
    _, continued, kept = ImageToVideo.execute(model, vae, **size, start_image=given["clip"], keep=14).args
    told[f"clip {levels}"] = [continued["noise_mask"].flatten().tolist(), list(continued["samples"].shape), kept]
    made[f"clip {levels}"] = continued["samples"]

model = load_model(transformer, torch.float32, frame_levels=False)
for name in ("mask", "one mask", "larger mask"):
    latent = VAEEncode.execute(given["clip"], vae, given[name]).args[0]
    made[name], made[name + ", video"] = latent["noise_mask"], ours(model, latent, denoise=0.5)["samples"]
made["encoded"] = VAEEncode.execute(given["clip"], vae).args[0]["samples"]
stretched = host.SetLatentNoiseMask().set_mask({"samples": made["encoded"]}, given["mask"])[0]["noise_mask"]
made["stretched"] = comfy.utils.reshape_mask(stretched, made["encoded"].shape)
half = torch.full((26, 64, 64), 0.5)
made["values of a mask"] = VAEEncode.execute(given["clip"], vae, 4 * half - 1).args[0]["noise_mask"]
encoded, nothing = {"samples": made["encoded"]}, float("nan") * half
for name, run in {
    "no number in a mask": lambda: VAEEncode.execute(given["clip"], vae, nothing),
    "no pixel in a mask": lambda: VAEEncode.execute(given["clip"], vae, half[:, :0]),
    "no number in a noise mask": lambda: ours(model, {**encoded, "noise_mask": nothing}),
    "no number in an image": lambda: ImageToVideo.execute(model, vae, **size, start_image=given["start"] / 0),
    "no frames": lambda: host.VAEEncode().encode(vae, given["clip"] * float("nan")),
    "no image": lambda: ImageToVideo.execute(model, vae, **size),
    "frames of a mask": lambda: VAEEncode.execute(given["clip"], vae, given["mask"][:3]),
    "size": lambda: ImageToVideo.execute(model, vae, 60, 64, 25, start_image=given["start"]),
}.items():
    try:
        run()
    except ValueError as error:
        told[name] = str(error)
save_file({name: tensor.float().clone() for name, tensor in made.items()}, folder + "/made.safetensors")
print("TOLD " + json.dumps(told))
"""
SIZE = {"height": 64, "width": 64, "num_frames": 25}
LEVELS = {"False": [0, 0.8, 0.95, 0.8, 0.2], "True": [0.1, 1, 1, 1, 0.2]}
MOVED = 20
"""The first frame with the mask at the right."""


@pytest.fixture(scope="module")
def given():
    """Images larger than the video, a clip of 26 frames, and masks."""
    start, end = torch.full((2, 1, 64, 96, 3), 0.03)
    start[:, 20:40, 30:50] = end[:, 20:40, 50:70] = torch.tensor([0.9, 0.1, 0.1])
    clip = torch.full((26, 64, 64, 3), 0.03)
    for i, frame in enumerate(clip):
        frame[20:40, i : i + 20] = torch.tensor([0.12, 0.2, 0.92])
    mask = torch.zeros(26, 64, 64)
    mask[:MOVED, 8:56, :17] = 1
    mask[MOVED:, 8:56, 40:] = 1
    larger = torch.zeros(1, 128, 128)
    larger[:, :, 64:] = 1
    names = ("start", "end", "clip", "mask", "one mask", "larger mask")
    return dict(zip(names, (start, end, clip, mask, mask[:1], larger), strict=True))


@pytest.fixture(scope="module")
def made(comfy_path, tmp_path_factory, given):
    folder = tmp_path_factory.mktemp("i2v")
    save_file({name: tensor.clone() for name, tensor in given.items()}, folder / "given.safetensors")
    output = run_in_comfyui(comfy_path, SCRIPT, folder, trained.TRANSFORMER, trained.VAE, trained.T5).stdout
    told = json.loads(next(line for line in output.splitlines() if line.startswith("TOLD "))[5:])
    return load_file(folder / "made.safetensors"), told


@pytest.mark.parametrize("levels", LEVELS)
def test_every_sampler_and_the_pipeline_make_the_same_video(made, given, levels):
    tensors, told = made
    mask, shape, kept = told[levels]
    assert mask == pytest.approx(LEVELS[levels])
    assert (shape, kept) == ([1, 12, 5, 8, 8], 1)
    dit = load_transformer(trained.TRANSFORMER, torch.float32, frame_levels=levels == "True")
    pipe = MochiPipeline(dit, load_vae(trained.VAE), load_text_encoder(trained.T5))
    video = pipe(
        "a red circle moving right", **SIZE, num_inference_steps=6, guidance_scale=3.0, seed=5, output_type="latent",
        image=given["start"], last_image=given["end"], start_noise=0.1 if levels == "True" else 0.0, end_noise=0.2,
    )  # fmt: skip
    for name in ("ours", "ksampler", "custom"):
        assert (tensors[f"{name} {levels}"] - video).norm() / video.norm() < 2e-3, name


@pytest.mark.parametrize("levels", [False, True])
def test_two_runs_one_after_the_other_make_the_video_of_one(made, levels):
    """The host itself would pass on the noisy state of masked parts as if it were the given picture."""
    tensors, _ = made
    torch.testing.assert_close(tensors[f"two runs {levels}"], tensors[f"custom {levels}"], rtol=0, atol=1e-4)


def test_two_runs_with_other_seeds_keep_what_the_mask_keeps(made):
    """DisableNoise has the seed 0. Frames with their own levels have no noise besides what the first run passes on."""
    tensors, _ = made
    torch.testing.assert_close(tensors["another seed True"], tensors["custom True"], rtol=0, atol=1e-4)
    found, single = tensors["another seed False"], tensors["custom False"]
    torch.testing.assert_close(found[:, :, 0], tensors["given False"][:, :, 0], rtol=0, atol=1e-5)
    assert (found - single).abs().max() > 0.01


@pytest.mark.parametrize("levels", [False, True])
def test_two_videos_begin_with_one_image(made, levels):
    tensors, _ = made
    two = tensors[f"two {levels}"]
    torch.testing.assert_close(two[:1], tensors[f"ours {levels}"], rtol=0, atol=1e-4)
    if not levels:  # in that case the first frame has no noise
        torch.testing.assert_close(two[1:, :, 0], tensors[f"given {levels}"][:, :, 0], rtol=0, atol=1e-5)
    assert (two[0, :, 2] - two[1, :, 2]).abs().mean() > 0.01


def test_frames_are_released_as_by_differential_diffusion(made):
    tensors, _ = made
    torch.testing.assert_close(tensors["differential"], tensors["ksampler False"], rtol=1e-4, atol=1e-4)
    assert (tensors["ours False"] - tensors["ours True"]).norm() > 0.1 * tensors["ours True"].norm()


def test_the_last_frames_of_a_clip_are_kept(made, given):
    tensors, told = made
    vae = load_vae(trained.VAE)
    expected = vae.encode(given["clip"][-13:].movedim(-1, 0)[None] * 2 - 1).mode()
    for levels, mask in (("False", [0, 0, 0, 0.8, 0.95]), ("True", [0, 0, 0, 1, 1])):
        assert told[f"clip {levels}"] == [pytest.approx(mask), [1, 12, 5, 8, 8], 13]
        torch.testing.assert_close(tensors[f"clip {levels}"][:, :, :3], expected, rtol=1e-4, atol=1e-4)


def test_a_mask_that_moves_keeps_everything_else_exactly(made):
    tensors, _ = made
    mask, video, encoded = tensors["mask"], tensors["mask, video"], tensors["encoded"]
    assert mask.shape == (1, 1, 5, 8, 8)
    # Latents hold frames 0, 1-6, 7-12, 13-18 and 19-24; frame 19 is the last one before the mask moves.
    left, right = torch.zeros(2, 8, 8)
    left[1:7, :3] = right[1:7, 5:] = 1
    assert torch.equal(mask[0, 0], torch.stack([left, left, left, left, torch.maximum(left, right)]))
    kept = (mask == 0).expand_as(video)
    torch.testing.assert_close(video[kept], encoded[kept], rtol=1e-5, atol=1e-5)
    assert (video - encoded)[~kept].abs().max() > 0.3
    assert not torch.equal((tensors["stretched"][:, :1] > 0).float(), mask), "the host's own stretch says the same"


def test_masks_of_one_frame_and_of_other_sizes(made):
    tensors, _ = made
    still, half = tensors["one mask"], tensors["larger mask"]
    assert torch.equal(still, tensors["mask"][:, :, :1].expand_as(still))
    assert half[..., 4:].all()
    assert not half[..., :4].any()


def test_what_is_wrong_is_one_sentence(made):
    tensors, told = made
    assert told["no image"] == "There is no image to make a video from; give a first image, a last one or both."
    assert told["frames of a mask"].startswith("The mask has 3 frames and the video 26; give one mask")
    assert tensors["values of a mask"].eq(1).all(), "a mask is from 0 to 1"
    for name in ("no number in a mask", "no number in a noise mask"):
        assert told[name] == "The mask has values that are infinite or not a number; use 0 (kept) to 1 (regenerated)."
    assert told["no pixel in a mask"].startswith("The mask has shape (26, 0, 64); it has to be")
    for name in ("no number in an image", "no frames"):
        assert told[name].startswith("The frames hold values that are infinite or not a number")
    assert told["size"] == "width is 60, but Mochi needs a multiple of 16; use 48 or 64."
