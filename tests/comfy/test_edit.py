"""Editing in ComfyUI: Mochi Edit, Mochi Invert and Mochi RF Edit against the core, and inversion with the host's own nodes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import denormalize_latents, normalize_latents, sample
from mochi_core.sampling.edit import edit, fresh_noise, invert, pulls, rf_edit
from mochi_core.sampling.sample import prepared_velocities
from mochi_core.sampling.schedule import linear_quadratic_schedule, schedule_below
from tests.harness import trained
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.numbers import relative_error

STEPS, ROUND_TRIP = 6, 12
SCRIPT = f"""
import json, logging
import comfy.hooks, comfy.sample, comfy.samplers, comfy.sd
import comfy_extras.nodes_custom_sampler as custom
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from pack.mochi_core import BlockCache, linear_quadratic_schedule
from pack.nodes.bridge.cache import add_cache
from pack.nodes.bridge.edit import edit_video, inversion_sampler, rf_edit_sampler
from pack.nodes.bridge.model import load_model
from pack.nodes.bridge.sampling import make_sigmas, sample, unscaled_noise

logging.basicConfig(level=logging.INFO, force=True)
path, inputs, result = arguments
given = load_file(inputs)
model = load_model(path, torch.float32)
source, target, negative, nothing = (
    [[given[name], {{"attention_mask": given[name + " mask"]}}]] for name in ("source", "target", "negative", "nothing")
)
video = {{"samples": given["video"], "downscale_ratio_spacial": 8}}
forwards = []
model.model.diffusion_model.blocks[0].register_forward_pre_hook(lambda _, inputs: forwards.append(len(inputs[0])))
out, errors = {{}}, {{}}

def edited(model, target, scales, latent=video, source=source, negative=negative):
    forwards.clear()
    latent = edit_video(model, source, target, negative, latent, {STEPS}, 0.9, scales, 3)
    assert "downscale_ratio_spacial" not in latent
    return latent["samples"]

out["same"] = edited(model, source, (3.0, 3.0))
out["edited"] = edited(model, target, (1.5, 5.5))
out["forwards"] = torch.tensor(sum(forwards))
out["unguided"] = edited(model, target, (1.0, 5.5))
out["unguided forwards"] = torch.tensor(sum(forwards))
out["cached"] = edited(add_cache(model, BlockCache("teacache", 0)), target, (1.5, 5.5))
mask = torch.zeros(1, 1, *given["video"].shape[2:])
mask[..., 4:] = 1
out["masked"] = edited(model, target, (1.5, 5.5), {{**video, "noise_mask": mask}})

layer = "blocks.0.attn.qkv_x"
rows, columns = model.model.diffusion_model.get_submodule(layer).weight.shape
ones = {{"A": torch.full((1, columns), 0.02), "B": torch.full((rows, 1), 0.5)}}
lora = {{f"diffusion_model.{{layer}}.lora_{{side}}.weight": weight for side, weight in ones.items()}}
out["LoRA"] = edited(comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0], target, (1.5, 5.5))
group = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
hooked = [comfy.hooks.set_hooks_for_conditioning(prompt, group) for prompt in (target, source, negative)]
out["LoRA by hooks"] = edited(model, hooked[0], (1.5, 5.5), source=hooked[1], negative=hooked[2])

falling = make_sigmas({ROUND_TRIP}, 1.0)
rising = custom.FlipSigmas.execute(falling)[0]
noisy = {{}}
for name, sampler in {{
    "stock": comfy.samplers.sampler_object("euler"), "ours": inversion_sampler(0.0, 0), "controlled": inversion_sampler(0.4, 9)
}}.items():
    noisy[name] = custom.SamplerCustom.execute(model, False, 0, 1.0, source, negative, sampler, rising, video)[0]
    out[f"inverted, {{name}}"] = noisy[name]["samples"]
out["inverted, Mochi Sampler"] = sample(model, source, negative, video, rising, 1.0, 5, inversion_sampler(0.0, 0))["samples"]
shifted = ModelSamplingSD3().patch(model, 3.0)[0]
for name, given_model, latent, sigmas in (("inverted", shifted, video, rising), ("back", shifted, noisy["ours"], falling)):
    out[f"{{name}}, other settings"] = custom.SamplerCustom.execute(
        given_model, False, 0, 1.0, source, negative, comfy.samplers.sampler_object("euler"), sigmas, latent
    )[0]["samples"]
stock = custom.SamplerCustom.execute(
    model, False, 0, 1.0, source, negative, comfy.samplers.sampler_object("euler"), falling, noisy["ours"]
)[0]
out["back, stock"] = stock["samples"]
for name, options in {{
    "levels": (0.7, 0.99, 0.5, "linear_decrease", (0, 0)),
    "steps": (0.7, 1.0, 0.0, "linear_decrease", (2, 9)),
    "all": (1.0, 1.0, 0.0, "constant", (0, 0)),
}}.items():
    sampler = rf_edit_sampler(video, *options)
    out[f"back, {{name}}"] = sample(model, target, nothing, noisy["ours"], falling, 3.0, 5, sampler)["samples"]

# A noise mask: with weights of a level for each frame the host's inpainting is told of whole frames, and otherwise of any part.
euler, unpulled = comfy.samplers.sampler_object("euler"), rf_edit_sampler(video, 0.0, 1.0, 0.0, "constant", (0, 0))
first_frame = torch.ones(1, 1, 2, 1, 1)
first_frame[:, :, 0] = 0
masks = {{"part": (model, mask), "frame": (load_model(path, torch.float32, frame_levels=True), first_frame)}}
for name, (given_model, noise_mask) in masks.items():
    masked = custom.SamplerCustom.execute(
        given_model, False, 0, 1.0, source, negative, euler, rising, {{**video, "noise_mask": noise_mask}}
    )[0]
    for way, sampler in (("stock", euler), ("ours", unpulled)):
        out[f"{{name}}, {{way}}"] = custom.SamplerCustom.execute(
            given_model, False, 0, 1.0, target, negative, sampler, falling, masked
        )[0]["samples"]

# A meta tensor has no values to wait for.
sampling, nowhere = model.model.model_sampling, torch.zeros(1, 12, 2, 8, 8, device="meta")
with unscaled_noise(sampling, torch.zeros(1)):
    sampling.noise_scaling(nowhere[:, :1, :1, :1, :1], nowhere, nowhere)

# Stopped half way, the two go on where they were.
half = rising[: {ROUND_TRIP} // 2 + 1]
stopped = sample(model, source, negative, video, half, 1.0, 0, inversion_sampler(0.0, 0))
out["half way"] = sample(model, source, negative, stopped, half.flip(0), 1.0, 0, unpulled)["samples"]

def refused(name, function):
    try:
        function()
    except ValueError as error:
        errors[name] = str(error)

empty = {{"samples": torch.zeros_like(given["video"])}}
other = {{"samples": given["video"][:, :, :1]}}
refused("empty", lambda: edit_video(model, source, target, negative, empty, 4, 0.9, (1.5, 5.5), 0))
refused("start", lambda: edit_video(model, source, target, negative, video, 4, 0.0, (1.5, 5.5), 0))
refused("cfg", lambda: edit_video(model, source, target, negative, video, 4, 0.9, (1.5, float("nan")), 0))
refused("falling", lambda: sample(model, source, negative, video, falling, 1.0, 0, inversion_sampler(0.0, 0)))
refused("rising", lambda: sample(model, source, negative, video, rising, 1.0, 0, rf_edit_sampler(video, *options)))
refused("size", lambda: sample(model, source, negative, video, falling, 1.0, 0, rf_edit_sampler(other, *options)))
refused("nothing to invert", lambda: sample(model, source, negative, empty, rising, 1.0, 0, inversion_sampler(0.0, 0)))
above = torch.tensor([0.0, 0.5, 1.5])
refused("above noise", lambda: sample(model, source, negative, video, above, 1.0, 0, inversion_sampler(0.0, 0)))
refused("window", lambda: rf_edit_sampler(video, 0.5, 0.2, 0.9, "constant", (0, 0)))
refused("gamma", lambda: inversion_sampler(float("inf"), 0))
refused("eta", lambda: rf_edit_sampler(video, float("nan"), 1, 0, "constant", (0, 0)))
save_file({{name: tensor.contiguous() for name, tensor in out.items()}}, result)
print(json.dumps(errors))
"""


def text(seed, length):
    embeds = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(seed))
    return embeds, (torch.arange(256) < length)[None]


PROMPTS = {"source": text(1, 9), "target": text(2, 7), "negative": text(3, 4), "nothing": text(4, 0)}
VIDEO = denormalize_latents(torch.randn(1, 12, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
CLEAN = normalize_latents(VIDEO)


@pytest.fixture(scope="module")
def done(comfy_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    given = {"video": VIDEO.contiguous()}
    for name, (embeds, mask) in PROMPTS.items():
        given |= {name: embeds, f"{name} mask": mask.to(torch.int64)}
    save_file(given, folder / "in.safetensors")
    done = run_in_comfyui(
        comfy_path, SCRIPT, trained.TRANSFORMER, folder / "in.safetensors", folder / "out.safetensors"
    )
    return load_file(folder / "out.safetensors"), done


@pytest.fixture(scope="module")
def out(done):
    return done[0]


@pytest.fixture(scope="module")
def dit():
    return trained.denoiser()


def velocity_of(dit, sigmas, *names, scale=1.0):
    velocities = prepared_velocities(dit, CLEAN, sigmas, [PROMPTS[name] for name in names])
    if scale == 1:
        return lambda x, step: velocities(x, step, 1)[0]

    def velocity(x, step):
        cond, uncond = velocities(x, step, 2)
        return uncond + scale * (cond - uncond)

    return velocity


@pytest.fixture(scope="module")
def rising():
    sigmas = linear_quadratic_schedule(ROUND_TRIP).flip(0)
    sigmas[0] = 0.0001
    return sigmas


@pytest.fixture(scope="module")
def inverted(dit, rising):
    return invert(velocity_of(dit, rising, "source"), CLEAN, rising)


def test_equal_prompts_and_scales_give_the_video_back_bit_for_bit(out):
    assert torch.equal(out["same"], VIDEO)


def test_an_edit_is_the_cores(out, dit):
    sigmas = schedule_below(0.9, STEPS)
    prompts = (PROMPTS[name] for name in ("source", "target", "negative"))
    expected = edit(dit, CLEAN, sigmas, *prompts, seed=3)
    assert relative_error(normalize_latents(out["edited"]), expected) < 1e-4
    assert relative_error(expected, CLEAN) > 0.1
    assert out["forwards"] == 4 * STEPS
    assert out["unguided forwards"] == 3 * STEPS
    assert not torch.equal(out["unguided"], out["edited"])
    assert relative_error(out["cached"], out["edited"]) < 1e-5


def test_a_lora_by_hooks_is_that_of_the_model(out):
    assert relative_error(out["LoRA by hooks"], out["LoRA"]) < 1e-4
    assert relative_error(out["LoRA"], out["edited"]) > 0.02


def test_outside_of_a_mask_nothing_changes(out):
    assert torch.equal(out["masked"][..., :4], VIDEO[..., :4])
    assert relative_error(out["masked"][..., 4:], VIDEO[..., 4:]) > 0.05


@pytest.mark.parametrize("way", ["stock", "ours", "Mochi Sampler"])
def test_inversion_with_genmos_schedule_ends_in_numbers(out, inverted, way):
    """The host's Euler adds noise at the level its schedule starts with, which is 0 here."""
    found = normalize_latents(out[f"inverted, {way}"])
    assert found.isfinite().all()
    assert relative_error(found, inverted) < (1e-3 if way == "stock" else 2e-4)
    assert relative_error(inverted, CLEAN) > 0.1


def test_controlled_inversion_is_the_cores(out, dit, rising):
    noise = fresh_noise(CLEAN, 9)()
    expected = invert(velocity_of(dit, rising, "source"), CLEAN, rising, 0.4, noise)
    assert relative_error(normalize_latents(out["inverted, controlled"]), expected) < 2e-4


def test_the_hosts_sampler_goes_on_from_inverted_noise(out, dit, inverted):
    expected = sample(dit, inverted, linear_quadratic_schedule(ROUND_TRIP), PROMPTS["source"], None, 1.0)
    assert relative_error(normalize_latents(out["back, stock"]), expected) < 1e-3


@pytest.mark.parametrize("way", ["inverted", "back"])
def test_beside_other_settings_of_noise_levels(out, way):
    """ModelSamplingSD3 sets levels of the host's that would divide by zero; the given schedule is used."""
    assert relative_error(out[f"{way}, other settings"], out[f"{way}, stock"]) < 1e-4


@pytest.mark.parametrize(("masked", "kept"), [("part", (..., slice(4))), ("frame", (slice(None), slice(None), 0))])
def test_the_hosts_sampler_goes_on_from_inverted_noise_with_a_mask(out, masked, kept):
    """Mochi RF Edit without a pull starts from the LATENT itself, whatever the host makes of it."""
    found = out[f"{masked}, stock"]
    torch.testing.assert_close(found[kept], VIDEO[kept], rtol=1e-4, atol=1e-4)
    assert relative_error(found, out[f"{masked}, ours"]) < 1e-4
    assert relative_error(found, VIDEO) > 0.05, "the prompt is another"


def test_rf_edit_is_the_cores(out, dit, inverted):
    sigmas = linear_quadratic_schedule(ROUND_TRIP)
    velocity = velocity_of(dit, sigmas, "target", "nothing", scale=3.0)
    for name, window in {"levels": (0.99, 0.5), "steps": (sigmas[2].item(), sigmas[8].item())}.items():
        expected = rf_edit(velocity, inverted, CLEAN, sigmas, pulls(sigmas, 0.7, *window, "linear_decrease"))
        assert relative_error(normalize_latents(out[f"back, {name}"]), expected) < 1e-3, name
    assert relative_error(out["back, all"], VIDEO) < 1e-5, "eta 1 to the end"


def test_the_console_says_which_noise_levels_steps_are(done):
    sigmas = linear_quadratic_schedule(ROUND_TRIP)
    assert f"Mochi RF Edit: steps 2 to 9 are start {sigmas[2]:.4f} and end {sigmas[8]:.4f}." in done[1].stderr


def test_stopped_half_way_and_back(out, dit, rising):
    half = rising[: ROUND_TRIP // 2 + 1]
    noisy = invert(velocity_of(dit, half, "source"), CLEAN, half)
    expected = rf_edit(velocity_of(dit, half.flip(0), "source"), noisy, CLEAN, half.flip(0), [0.0] * (ROUND_TRIP // 2))
    assert relative_error(normalize_latents(out["half way"]), expected) < 1e-3


MESSAGES = {
    "above noise": "sigmas continue from 0.5 to 1.5, but pure noise is level 1",
    "cfg": "cfg is nan",
    "empty": "The LATENT is empty, and there is nothing to edit",
    "eta": "eta is nan",
    "falling": "noise levels must rise; reverse the schedule (FlipSigmas)",
    "gamma": "gamma is inf, but it goes from 0 (follows the model) to 1",
    "nothing to invert": "The LATENT is empty, and there is nothing to invert",
    "rising": "sigmas[1] is 0.2944 after 0.0001, but from noise to a video, levels must fall",
    "size": "connect the video that was inverted",
    "start": "The starting noise level is 0.0",
    "window": "start is 0.2, below the end 0.9",
}


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_what_makes_no_sense_is_refused(done, name):
    assert MESSAGES[name] in json.loads(done[1].stdout.splitlines()[-1])[name]
