"""Masks of whole frames with weights for per-frame noise levels: the host's samplers match the core's `sample`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import linear_quadratic_schedule, sample
from mochi_core.autoencoder.latents import denormalize_latents
from mochi_core.sampling.given import Given
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.tiny_models import random_dit

SCRIPT = """
import json, logging
import comfy.sample, comfy.samplers
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from pack.mochi_core import linear_quadratic_schedule
from pack.mochi_core.autoencoder.latents import denormalize_latents
from pack.nodes.bridge.model import load_model

torch.set_num_threads(1)
torch.set_grad_enabled(False)
folder, = arguments
given = load_file(folder + "/given.safetensors")
made, said = [], []

def prompt(name):
    return [[given[name], {"attention_mask": given[name + "_mask"]}]]

def sample(model, mask, sampler="euler"):
    made.clear()
    return comfy.sample.sample_custom(
        model, given["noise"], 3.0, comfy.samplers.sampler_object(sampler), linear_quadratic_schedule(5), prompt("cond"),
        prompt("uncond"), denormalize_latents(given["clean"]), noise_mask=mask, disable_pbar=True, seed=1,
    )

def load(name, **options):
    model = load_model(folder + "/" + name, torch.float32, **options)
    model.model.diffusion_model.blocks[0].mod_x.register_forward_hook(lambda *_: made.append(1))
    return model

trained, other = load("Pusa.safetensors"), load("mochi.safetensors")
frames = given["levels"].view(1, 1, -1, 1, 1)
inside = frames.expand(1, 1, -1, 4, 6).clone()
inside[..., :3] = 1
latents = {"frames": sample(trained, frames)}
prepared = len(made)
latents["heun"] = sample(trained, frames, "heun")
latents |= {"inside": sample(trained, inside), "inside, other": sample(other, inside), "other": sample(other, frames)}
latents["chosen"] = sample(load("mochi.safetensors", frame_levels=True), frames)
latents["refused"] = sample(load("Pusa.safetensors", frame_levels=False), frames)
for name, model in (("saved", trained), ("saved, other", other)):
    comfy.sd.save_checkpoint(folder + "/saved.safetensors", model)
    latents[name] = sample(load("saved.safetensors"), frames)
logging.warning = lambda text, *values: said.append(text % values)
latents["lcm"] = sample(trained, frames, "lcm")
seen = []
trained.model.diffusion_model.register_forward_pre_hook(
    lambda _, inputs, named: seen.append(named["frame_levels"].shares.tolist()), with_kwargs=True
)
windows = ContextWindowsManualNode.execute(trained, 3, 1, "standard_static", 1, False, "pyramid", 2, False).args[0]
latents["windows"] = sample(windows, frames)
save_file({name: tensor.contiguous() for name, tensor in latents.items()}, folder + "/made.safetensors")
print(json.dumps([prepared, said, seen]))
"""
LEVELS = torch.tensor([0.0, 0.4, 1.0, 1.0, 0.8])


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def given():
    shape = (1, 12, len(LEVELS), 4, 6)
    mask = torch.arange(16)[None]
    return {
        "noise": randn(*shape, seed=1), "clean": randn(*shape, seed=2), "levels": LEVELS,
        "cond": randn(1, 16, 64, seed=3), "cond_mask": (mask < 9).long(),
        "uncond": randn(1, 16, 64, seed=4), "uncond_mask": (mask < 2).long(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(comfy_path, tmp_path_factory, given):
    folder = tmp_path_factory.mktemp("levels")
    save_file(given, folder / "given.safetensors")
    for name in ("Pusa", "mochi"):
        save_file(random_dit().state_dict(), folder / f"{name}.safetensors")
    output = run_in_comfyui(comfy_path, SCRIPT, folder).stdout.splitlines()
    prepared, said, seen = json.loads(output[-1])
    return load_file(folder / "made.safetensors") | {"prepared": prepared, "said": said, "seen": seen}


def test_the_host_samples_what_the_core_does(made, given):
    cond, uncond = ((given[name], given[f"{name}_mask"].bool()) for name in ("cond", "uncond"))
    expected = sample(
        random_dit(), given["noise"], linear_quadratic_schedule(5), cond, uncond, 3.0,
        given=Given(given["clean"], LEVELS),
    )  # fmt: skip
    torch.testing.assert_close(made["frames"], denormalize_latents(expected), rtol=1e-4, atol=1e-4)


def test_a_frame_without_noise_is_kept_by_every_sampler(made, given):
    clean = denormalize_latents(given["clean"])
    for name in ("frames", "heun", "lcm", "windows"):
        torch.testing.assert_close(made[name][:, :, 0], clean[:, :, 0], rtol=1e-5, atol=1e-5)
    assert (made["heun"] - made["frames"]).norm() < (made["heun"] - clean).norm()


def test_modulation_is_prepared_once_for_a_run(made):
    assert made["prepared"] == 1, "one for both prompts"


def test_the_name_of_the_file_or_the_person_says_which_weights_these_are(made):
    torch.testing.assert_close(made["chosen"], made["frames"], rtol=0, atol=0)
    torch.testing.assert_close(made["refused"], made["other"], rtol=0, atol=0)
    torch.testing.assert_close(made["saved"], made["frames"], rtol=0, atol=0)
    torch.testing.assert_close(made["saved, other"], made["other"], rtol=0, atol=0)
    assert (made["other"] - made["frames"]).norm() > 0.1 * made["frames"].norm()


def test_a_mask_inside_of_a_frame_stays_the_hosts_inpainting(made):
    torch.testing.assert_close(made["inside"], made["inside, other"], rtol=0, atol=0)


def test_samplers_that_add_noise_are_warned_of(made):
    assert [line.partition(" adds")[0] for line in made["said"]] == ["Mochi: sample_lcm"]


def test_context_windows_have_the_levels_of_their_frames(made):
    windows = {tuple(round(share, 4) for share in video) for videos in made["seen"] for video in videos}
    starts = {
        window: [i for i in range(5) if LEVELS[i : i + len(window)].tolist() == pytest.approx(window)]
        for window in windows
    }
    assert len(windows) > 1
    assert all(starts.values()), starts
    assert made["windows"].isfinite().all()
