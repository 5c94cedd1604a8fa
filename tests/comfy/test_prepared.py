"""A sampling run computes what does not depend on the latents only once, with unchanged results.

One ComfyUI process samples all variants; the tests compare its results. Computations of the modulation are counted at the first
block's mod_x.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness.comfy_process import run_in_comfyui
from tests.harness.graphs import MODEL, SAMPLER, node, upto_sampler
from tests.harness.tiny_models import random_dit

SCRIPT = """
import gc, json
import comfy.hooks, comfy.model_management as mm, comfy.sample, comfy.samplers
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from pack.mochi_core import linear_quadratic_schedule
from pack.nodes.bridge import prepared
from pack.nodes.bridge.model import load_model

torch.set_num_threads(1)
torch.set_grad_enabled(False)
path, result = arguments
generator = torch.Generator().manual_seed(0)
latents, counts = {}, {}

def randn(*shape):
    return torch.randn(shape, generator=generator)

def prompt(length):
    return [[randn(1, 32, 64), {"attention_mask": (torch.arange(32) < length)[None].long()}]]

def watch(model):
    "Grows by one for each modulation that a MODEL computes."
    made = []
    model.model.diffusion_model.blocks[0].mod_x.register_forward_hook(lambda *_: made.append(1))
    return made

model = load_model(path, torch.float32)
network, made, passes = model.model.diffusion_model, watch(model), []
network.x_embedder.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
noise, positive, negative = randn(1, 12, 5, 8, 8), prompt(9), prompt(0)

def sample(model, sampler="euler", steps=5, positive=positive, noise=noise, callback=None):
    made.clear(), passes.clear()
    return comfy.sample.sample_custom(
        model, noise, 4.5, comfy.samplers.sampler_object(sampler), linear_quadratic_schedule(steps), positive, negative,
        torch.zeros_like(noise), callback=callback, disable_pbar=True, seed=1,
    )

def held():
    kinds = (prepared.SamplingRun, prepared.PreparedPrompts, prepared.Conditioning)
    return sum(type(thing) in kinds for thing in gc.get_objects())

def compare(name, model, **how):
    plain = model.clone()
    del plain.wrappers[WrappersMP.SAMPLER_SAMPLE]["mochi_run"]
    latents[f"{name}/plain"], unprepared = sample(plain, **how), len(made)
    latents[f"{name}/prepared"] = sample(model, **how)
    counts[name] = {"plain": unprepared, "prepared": len(made), "held": held(), "passes": passes[:]}

for sampler in ("euler", "heun", "dpm_2", "dpmpp_2m"):
    compare(sampler, model, sampler=sampler)
compare("70 steps", model, steps=70)
compare("batch of videos and prompts", model, noise=randn(2, 12, 5, 8, 8), positive=prompt(9) + prompt(30))
compare("context windows", ContextWindowsManualNode.execute(model, 3, 1, "standard_static", 1, False, "pyramid", 2, False)[0])
compare("EasyCache", EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False)[0], steps=12)

lora = {}
for layer in ("blocks.0.mod_x", "blocks.1.attn.qkv_x", "t5_yproj"):
    rows, columns = network.get_submodule(layer).weight.shape
    lora[f"diffusion_model.{layer}.lora_A.weight"] = randn(4, columns) * 0.2
    lora[f"diffusion_model.{layer}.lora_B.weight"] = randn(rows, 4) * 0.2
elsewhere = {name: tensor for name, tensor in lora.items() if "attn" in name}
patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
compare("LoRA", patched)

def scheduled(lora):
    "The prompt with a LoRA that grows during the run."
    group, keyframes = comfy.hooks.create_hook_lora(lora, 1.0, 0.0), comfy.hooks.HookKeyframeGroup()
    for start, strength in ((0.0, 0.5), (0.2, 1.0)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    group.set_keyframes_on_hooks(keyframes)
    return comfy.hooks.set_hooks_for_conditioning(positive, group)

compare("hooks", model, positive=scheduled(lora))
compare("hooks elsewhere", model, positive=scheduled(elsewhere))

for place, change in {
    WrappersMP.DIFFUSION_MODEL: lambda run, x, t, context, mask, options: run(
        x, t, context=context * 0.5, attention_mask=mask, transformer_options=options
    ),
    WrappersMP.APPLY_MODEL: lambda run, x, t, n, context, *rest, **named: run(x, t, n, context * t[0], *rest, **named),
}.items():
    changed = model.clone()
    changed.add_wrapper_with_key(place, "test", change)
    compare(f"prompt changed by {place}", changed)

first = load_model(path, torch.float32)
second = first.deepclone_multigpu(torch.device("cpu", 0))
second.is_multigpu_base_clone = True
first.set_additional_models("multigpu", [second])
on_second = watch(second)
compare("two devices", first)
counts["two devices"]["on the second"] = len(on_second)

def cancel(step, *_):
    if step == 2:
        mm.interrupt_current_processing()

try:
    sample(model, callback=cancel)
except mm.InterruptProcessingException:
    counts["cancelled"] = {"passes": passes[:]}
counts["cancelled"]["held"] = held()

model.model.memory_required = lambda *_, **__: 1 << 60  # as on a device that is full: one prompt at a time
compare("one by one", model)
del model.model.memory_required

def velocity(resident=None):
    "Of one call in a run; with `resident` bytes allowed on the device, the rest is cast and patched layer by layer."
    patched.detach()
    patched.patch_model(patched.load_device, lowvram_model_memory=resident or 0)
    assert patched.model.model_lowvram == bool(resident)
    options = {"mochi_run": prepared.SamplingRun([0.9, 0.6])}
    mask = positive[0][1]["attention_mask"]
    return model.model.apply_model(
        noise, torch.tensor([0.6]), c_crossattn=positive[0][0], attention_mask=mask, transformer_options=options
    )

known = prepared.PreparedPrompts(network, positive[0][0], positive[0][1]["attention_mask"], torch.device("cpu"), torch.float32)
assert known.matches(known.context.clone(), known.mask)
assert not known.matches(known.context.to("meta"), known.mask), "prompts on two devices are not compared"

latents["offloaded/plain"], latents["offloaded/prepared"] = velocity(), velocity(resident=1)
patched.detach()

compiled = model.clone()
set_torch_compile_wrapper(compiled, "eager", options={"guard_filter_fn": skip_torch_compile_dict}, fullgraph=True)
for steps in (5, 7):
    sample(model, steps=steps)
    latents[f"compiled, {steps} steps/plain"] = sample(model, steps=steps)
    latents[f"compiled, {steps} steps/prepared"] = sample(compiled, steps=steps)
save_file(latents, result)
print(json.dumps(counts))
"""
CASES = {
    # Number of modulations without and with preparation.
    "euler": (5, 1),
    "heun": (9, 1),
    "dpm_2": (9, 5),  # four of its noise levels are between those of the schedule
    "dpmpp_2m": (5, 1),
    "70 steps": (70, 2),
    "batch of videos and prompts": (5, 1),
    "context windows": (10, 1),
    "EasyCache": (10, 1),
    "LoRA": (5, 1),
    "hooks": (10, 10),
    "hooks elsewhere": (10, 2),
    "prompt changed by diffusion_model": (5, 6),
    "prompt changed by apply_model": (5, 5),
    "one by one": (10, 2),
}
COMPILED = ["compiled, 5 steps", "compiled, 7 steps"]


@pytest.fixture(scope="module")
def ran(comfy_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    save_file(random_dit().state_dict(), folder / "dit.safetensors")
    done = run_in_comfyui(comfy_path, SCRIPT, folder / "dit.safetensors", folder / "out.safetensors")
    return load_file(folder / "out.safetensors"), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*CASES, "two devices", "offloaded", *COMPILED])
def test_same_latents(ran, case):
    plain, prepared = (ran[0][f"{case}/{kind}"] for kind in ("plain", "prepared"))
    assert plain.std() > 0.1
    assert (plain - prepared).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("case", CASES)
def test_how_often_modulation_is_computed(ran, case):
    assert (ran[1][case]["plain"], ran[1][case]["prepared"]) == CASES[case]


def test_each_device_prepares_for_itself(ran):
    assert ran[1]["two devices"]["on the second"] == 5 + 1


def test_nothing_is_left_of_a_run(ran):
    assert {case: count["held"] for case, count in ran[1].items()} == dict.fromkeys(ran[1], 0)
    assert len(ran[1]["cancelled"]["passes"]) == 3


def test_loras_change_the_latents(ran):
    plain = ran[0]["euler/plain"]
    for case in ("LoRA", "hooks", "hooks elsewhere"):
        assert (ran[0][f"{case}/prepared"] - plain).norm() > 0.1 * plain.norm()


def test_prompts_of_unequal_lengths_share_a_batch_and_do_not_notice(ran):
    latents, counts = ran
    assert counts["euler"]["passes"] == [2] * 5, "conditional, nine tokens, and unconditional, none, in one pass"
    assert counts["one by one"]["passes"] == [1] * 10
    together, apart = latents["euler/prepared"], latents["one by one/prepared"]
    assert (together - apart).norm() < 1e-5 * apart.norm()


def test_same_latents_in_a_server(latents_of):
    graph = upto_sampler()
    graph["plain"] = node("ProbeUnprepared", model=[MODEL, 0])
    graph["sampled"] = node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "model": ["plain", 0]})
    prepared, plain = latents_of(graph, [SAMPLER, 0], ["sampled", 0])
    torch.testing.assert_close(prepared, plain, rtol=1e-4, atol=1e-4)
