"""Mochi Guider: equals the host's guider if all steps are guided, else the core's sampling with the same scales."""

import torch
from safetensors.torch import load_file, save_file

from mochi_core import Guidance, guidance_schedule, linear_quadratic_schedule, sample
from tests.harness import trained
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.graphs import MODEL, NEGATIVE, POSITIVE, SAMPLER, node, upto_sampler
from tests.harness.numbers import relative_error

STEPS = 12
SCRIPT = f"""
import comfy.samplers, comfy.sample
from pack.mochi_core import linear_quadratic_schedule
from pack.nodes.bridge.guider import make_guider
from pack.nodes.bridge.model import load_model
from pack.nodes.bridge.sampling import step_at

path, inputs, result = arguments
given = load_file(inputs)
model = load_model(path, torch.float32)
positive, negative = (
    [[given[name], {{"attention_mask": given[name + " mask"]}}]] for name in ("positive", "negative")
)
forwards = []
model.model.diffusion_model.blocks[0].register_forward_pre_hook(lambda _, inputs: forwards.append(len(inputs[0])))
out = {{}}
schedules = {{"full": (4.5, 0, 0, 1), "part": (4.5, 0, 0.25, 0.75), "falling": (6, 3, 0, 0.5)}}
for name, schedule in (schedules | {{"zero": (4.5, 0, 0, 0.75, True)}}).items():
    cfg, cfg_end, start, end, *cfg_zero = schedule
    forwards.clear()
    guider = make_guider(model, positive, negative, cfg, cfg_end, start, end, *cfg_zero)
    noise = given["noise"]
    latents = guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), linear_quadratic_schedule({STEPS}), seed=0,
        disable_pbar=True,
    )
    out |= {{name: model.model.process_latent_in(latents), name + " forwards": torch.tensor(sum(forwards))}}
falling = linear_quadratic_schedule(4)
rising = falling.flip(0)
between = (rising[:-1] * 0.9 + rising[1:] * 0.1)[:, None]
out |= {{"rising": torch.tensor([step_at(rising, level[None]) for level in rising[:-1]])}}
out |= {{"between": torch.tensor([step_at(rising, level) for level in between])}}
out |= {{"steps": torch.tensor([step_at(falling, level[None]) for level in falling[:-1]])}}
save_file(out, result)
"""


def test_a_part_of_the_steps_equals_the_core_with_the_same_scales(comfy_path, tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise, embeds = (torch.randn(shape, generator=generator) for shape in ((1, 12, 2, 8, 8), (2, 256, 64)))
    conditions = [(embeds[i : i + 1], (torch.arange(256) < n)[None]) for i, n in ((0, 9), (1, 3))]
    given = {"noise": noise}
    for name, (text, mask) in zip(("positive", "negative"), conditions, strict=True):
        given |= {name: text.contiguous(), f"{name} mask": mask.to(torch.int64)}
    save = tmp_path / "in.safetensors"
    save_file(given, save)
    run_in_comfyui(comfy_path, SCRIPT, trained.TRANSFORMER, save, tmp_path / "out.safetensors")
    out, dit, sigmas = load_file(tmp_path / "out.safetensors"), trained.denoiser(), linear_quadratic_schedule(STEPS)
    schedules = {
        "full": guidance_schedule(STEPS, 4.5),
        "part": guidance_schedule(STEPS, 4.5, start=0.25, end=0.75),
        "falling": guidance_schedule(STEPS, 6, 3, end=0.5),
    }
    for name, scales in schedules.items():
        assert out[f"{name} forwards"] == STEPS + sum(scale != 1 for scale in scales)
        assert relative_error(out[name], sample(dit, noise, sigmas, *conditions, scales)) < 1e-4, name
    assert [int(out[f"{name} forwards"]) for name in (*schedules, "zero")] == [24, 18, 18, 19]
    scales = guidance_schedule(STEPS, 4.5, end=0.75)
    zero = sample(dit, noise, sigmas, *conditions, scales, guidance=Guidance(cfg_zero=True))
    assert relative_error(out["zero"], zero) < 1e-4
    assert relative_error(zero, sample(dit, noise, sigmas, *conditions, scales)) > 1e-3
    for name in ("steps", "rising", "between"):  # schedules back to noise rise
        assert out[name].tolist() == [0, 1, 2, 3], name


def test_all_of_the_steps_equal_the_hosts_guider(latents_of):
    graph = upto_sampler(steps=STEPS, cfg=3.0)
    seed = graph[SAMPLER]["inputs"]["seed"]
    prompts = {"model": [MODEL, 0], "positive": [POSITIVE, 0], "negative": [NEGATIVE, 0], "cfg": 3.0}
    graph |= {
        "empty": node("EmptyMochiLatentVideo", width=96, height=64, length=13, batch_size=1),
        "noise": node("RandomNoise", noise_seed=seed),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("Mochi1Sigmas", steps=STEPS, threshold_noise=0.025, linear_steps=0, denoise=1.0),
        "theirs": node("CFGGuider", **prompts),
        "ours": node("Mochi1Guider", **prompts, start=0.0, end=1.0),
        "half": node("Mochi1Guider", **prompts, start=0.0, end=0.5, cfg_end=2.0),
    }
    for name in ("theirs", "ours", "half"):
        graph[f"with {name}"] = node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=[name, 0], sampler=["euler", 0], sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        )  # fmt: skip
    plain, theirs, ours, half = latents_of(graph, [SAMPLER, 0], ["with theirs", 0], ["with ours", 0], ["with half", 0])
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, plain)
    assert not torch.equal(half, ours)
