"""What other nodes do to a MODEL, in a ComfyUI process: patches, guiders, sampling settings and merges take effect."""

import json

import pytest

from tests.harness import trained
from tests.harness.comfy_process import run_in_comfyui

SCRIPT = """
import json
import comfy.sample, comfy.samplers
import comfy_extras.nodes_custom_sampler as guiders
import comfy_extras.nodes_model_advanced as settings
import comfy_extras.nodes_model_merging as merging
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_tomesd as tome
from comfy_extras.nodes_cfg import CFGZeroStar
from pack.mochi_core import BlockCache
from pack.nodes.bridge.cache import add_cache
from pack.nodes.bridge.guider import scaled_to_projection
from pack.nodes.bridge.model import load_model

(path,) = arguments
model = load_model(path, torch.float32)
network = model.model.diffusion_model
noise = torch.randn(1, 12, 2, 6, 4, generator=torch.Generator().manual_seed(0))
found = {}

def prompt(seed, length):
    embeds = torch.randn(1, 256, network.config.text_width, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(256) < length).long()[None]
    return [[embeds * mask[..., None], {"attention_mask": mask}]]

POSITIVE, NEGATIVE = prompt(1, 9), prompt(2, 4)

def sample(model, scheduler="linear_quadratic"):
    arguments = 2, 4.5, "euler", scheduler, POSITIVE, NEGATIVE, torch.zeros_like(noise)
    return comfy.sample.sample(model, noise, *arguments, denoise=1.0, disable_pbar=True)

def guide(guider):
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, seed=0, disable_pbar=True)

def difference(one, other):
    return ((one - other).norm() / other.norm()).item()

def hooked(register):
    hooks = [register(block) for block in network.blocks]
    try:
        return sample(model)
    finally:
        for hook in hooks:
            hook.remove()

def patched(**patches):
    clone = model.clone()
    for name, patch in patches.items():
        clone.set_model_patch(patch, name)
    return clone

plain = sample(model)

# The projection of the visual stream gets exactly that stream's part of what attention gives.
def double_visual(out, options):
    start, end = options["img_slice"]
    out[:, start:end] *= 2
    return out

def keep(args, extra):
    return extra["original_block"](args)

doubled = patched(attn1_output_patch=double_visual)
expected = hooked(lambda block: block.attn.proj_x.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,)))
replaced = doubled.clone()
replaced.set_model_patch_replace(keep, "dit", "double_block", 0)
found["output patch"] = difference(sample(doubled), expected), difference(expected, plain)
found["output patch in a replaced block"] = difference(sample(replaced), expected), difference(expected, plain)

blocks = []
def shift(args):
    blocks.append(args["block_index"])
    return {"img": args["img"] + args["x"].shape[2]}

expected = hooked(lambda block: block.register_forward_hook(lambda *call: (call[-1][0] + 2, call[-1][1])))
found["block patch"] = difference(sample(patched(double_block=shift)), expected), difference(expected, plain)
found["blocks"] = blocks[: len(network.blocks)], len(network.blocks)

# Two prompts of different lengths in one batch, where the node mixes both.
guided = nag.NAGuidance.execute(model, 5.0, 0.5, 2.5)[0]
(patch,) = guided.model_options["transformer_options"]["patches"]["attn1_output_patch"]
batch = {}
watch = network.register_forward_pre_hook(lambda _, given, named: batch.update(named["transformer_options"]), with_kwargs=True)
def mix(_, inputs):
    (visual,) = inputs
    return (patch(visual.clone(), {**batch, "img_slice": [0, visual.shape[1]]}),)
expected = hooked(lambda block: block.attn.proj_x.register_forward_pre_hook(mix))
watch.remove()
found["batch"] = sorted(batch["cond_or_uncond"])
found["attention guidance"] = difference(sample(guided), expected), difference(expected, plain)
cached = add_cache(guided, BlockCache("first_block", 1000.0))
found["attention guidance with a cache"] = difference(sample(cached), expected), difference(expected, plain)

merged_tokens = tome.TomePatchModel.execute(model, 0.3)[0]
found["token merging"] = difference(sample(merged_tokens), plain)

projected = model.clone()
projected.set_model_sampler_post_cfg_function(scaled_to_projection)
zero_star, projected = sample(CFGZeroStar.execute(model)[0]), sample(projected)
found["CFG-Zero*"] = difference(zero_star, projected), difference(projected, plain)

# No negative prompt, which is an empty one.
guider = guiders.DualModelGuider.execute(model, POSITIVE, 4.5, model)[0]
without = guide(guider)
guider = guiders.DualModelGuider.execute(model, POSITIVE, 4.5, model, prompt(3, 0))[0]
empty = guide(guider)
guider = guiders.DualModelGuider.execute(model, POSITIVE, 4.5, model, NEGATIVE)[0]
found["no negative"] = difference(without, empty), difference(guide(guider), empty)

# Mochi's own shift is 6.
def shifted(node, shift):
    method = getattr(node(), node.FUNCTION)
    return sample(method(model, shift)[0], "simple")
simple = sample(model, "simple")
three, six = (shifted(settings.ModelSamplingSD3, shift) for shift in (3.0, 6.0))
found["shift 6"] = difference(six, simple)
found["shift 3"] = difference(three, shifted(settings.ModelSamplingAuraFlow, 3.0)), difference(three, simple)

second = load_model(path, torch.float32, "int8")
for place in second.model.diffusion_model.parameters():
    if type(place.data) is torch.Tensor and place.ndim == 1:
        place.data *= 1.5
alone = sample(second)
for ratio in (0.0, 0.5, 1.0):
    (merged,) = merging.ModelMergeSimple().merge(model, second, ratio)
    latents = sample(merged)
    found[f"merge {ratio}"] = difference(latents, alone), difference(latents, plain)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def done(comfy_path):
    return run_in_comfyui(comfy_path, SCRIPT, trained.TRANSFORMER)


@pytest.fixture(scope="module")
def found(done):
    return json.loads(done.stdout.splitlines()[-1])


PATCHES = [
    "attention guidance",
    "attention guidance with a cache",
    "block patch",
    "output patch",
    "output patch in a replaced block",
]


@pytest.mark.parametrize("patch", PATCHES)
def test_patches_do_what_hooks_in_their_place_do(found, patch):
    error, effect = found[patch]
    assert error < 1e-5
    assert effect > 0.01


def test_patches_know_the_block_and_the_batch(found):
    numbers, depth = found["blocks"]
    assert numbers == list(range(depth))
    assert found["batch"] == [0, 1]


def test_patches_that_have_no_place_are_named_and_change_nothing(found, done):
    assert found["token merging"] == 0
    assert done.stderr.count("attn1_output_patch, attn1_patch ignored") == 1
    assert "off where another node's patches work" in done.stderr


def test_the_hosts_cfg_zero_is_not_the_published_one(found):
    """As docs/guidance.md says, it scales the predicted video, not the velocity."""
    assert min(found["CFG-Zero*"]) > 0.01


def test_no_negative_is_an_empty_one(found):
    error, effect = found["no negative"]
    assert error < 1e-5
    assert effect > 0.01


def test_the_shift_of_a_schedule_leaves_the_scale_of_levels_alone(found):
    assert found["shift 6"] < 1e-5
    error, effect = found["shift 3"]
    assert error < 1e-5
    assert effect > 0.01


def test_a_quantised_model_can_be_merged_into_another(found):
    (second, _), (half, other_half), (_, first) = (found[f"merge {ratio}"] for ratio in (0.0, 0.5, 1.0))
    assert second < 1e-5
    assert first < 1e-5
    assert min(half, other_half) > 0.001
