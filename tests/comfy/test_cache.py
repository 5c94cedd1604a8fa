"""Mochi Cache: in a ComfyUI process, where blocks can be counted, and in a real server with the host's own nodes."""

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import trained
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.graphs import MODEL, PATCHES, SAMPLER, node, upto_sampler, with_defaults
from tests.harness.numbers import relative_error

STEPS = 24
LOOSE = {"teacache": 0.09, "first_block": 0.03}
# Two videos at once, with prompts of unequal lengths.
PREAMBLE = f"""
import gc, logging
import comfy.sample, comfy.samplers, comfy.model_management
from pack.mochi_core import BlockCache, linear_quadratic_schedule
from pack.mochi_core.sampling.block_cache import CacheState
from pack.nodes.bridge.cache import add_cache
from pack.nodes.bridge.model import load_model

logging.basicConfig(level=logging.INFO, force=True)
path, result, method, threshold = arguments
model = load_model(path, torch.float32)
generator = torch.Generator().manual_seed(0)
noise, embeds = (torch.randn(shape, generator=generator) for shape in ((2, 12, 2, 8, 8), (2, 256, 64)))
noise[1] *= 0.1
positive, negative = (
    [[embeds[i : i + 1], {{"attention_mask": (torch.arange(256) < length)[None]}}]] for i, length in ((0, 9), (1, 3))
)
calls = []
for block in model.model.diffusion_model.blocks:
    block.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))

def sample(model, callback=None, steps={STEPS}):
    calls.clear()
    sampler, sigmas = comfy.samplers.sampler_object("euler"), linear_quadratic_schedule(steps)
    latents = comfy.sample.sample_custom(
        model, noise, 4.5, sampler, sigmas, positive, negative, torch.zeros_like(noise), callback=callback,
        disable_pbar=True, seed=0,
    )
    return latents, torch.tensor(sum(calls)), torch.tensor(max(calls))

def states():
    gc.collect()
    return torch.tensor(sum(type(found) is CacheState for found in gc.get_objects()))

def out(**runs):
    found = {{f"{{name}}{{part}}": value for name, run in runs.items() for part, value in zip(("", " calls", " batch"), run)}}
    save_file(found | {{"states": states()}}, result)

cached = add_cache(model, BlockCache(method, float(threshold)))
"""
EXACT = """
out(plain=sample(model), first=sample(cached))
"""
RUNS = """
plain, first, second = sample(model), sample(cached), sample(cached)
# So little memory that the host no longer runs both prompts in one forward.
model.model.memory_required = lambda *_, **__: float("inf")
out(plain=plain, first=first, second=second, apart=sample(cached), after=sample(model))
"""
SPLIT = """
def one_by_one(apply_model, args):
    c = args["c"]
    parts = [{k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in c.items()} for i in range(len(args["input"]))]
    rows = zip(args["input"], args["timestep"], parts)
    return torch.cat([apply_model(x[None], t[None], **part) for x, t, part in rows])

split, plain_split = cached.clone(), model.clone()
for patched in (split, plain_split):
    patched.set_model_unet_function_wrapper(one_by_one)
out(plain=sample(plain_split), cached=sample(split))
"""
WINDOWS = """
from comfy_extras.nodes_context_windows import ContextWindowsManualNode

noise, held = torch.randn((1, 12, 25, 4, 4), generator=generator), []
windows = lambda model: ContextWindowsManualNode.execute(model, 4, 1, "standard_uniform", 1, False, "pyramid", 2, False)[0]
exact = sample(windows(model), steps=12)
cached = sample(windows(cached), lambda step, *_: step % 3 or held.append(states()), steps=12)
held = torch.stack(held), torch.tensor(0), torch.tensor(0)
out(exact=exact, cached=cached, held=held)
"""
EASY = """
from comfy_extras.nodes_easycache import EasyCacheNode

def states_of(model):
    entering = []
    latents = sample(model, lambda step, denoised, x, steps: entering.append(x.clone()), steps=12)[0]
    return torch.stack([*entering, latents])

beside = lambda model: EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False)[0]
both = add_cache(beside(model), BlockCache(method, float(threshold)))
runs = {"plain": model, "easy": beside(model), "cached": cached, "both": both}
save_file({name: states_of(run) for name, run in runs.items()}, result)
"""
BESIDE = """
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

# An empty negative prompt, which is far from the other.
generator = torch.Generator().manual_seed(0)
noise, embeds = (torch.randn(shape, generator=generator) for shape in ((1, 12, 3, 8, 12), (2, 256, 64)))
positive, negative = (
    [[embeds[i : i + 1], {"attention_mask": (torch.arange(256) < length)[None]}]] for i, length in ((0, 9), (1, 0))
)

def latents_of(model, sampler):
    return comfy.sample.sample_custom(
        model, noise, 4.5, comfy.samplers.sampler_object(sampler), linear_quadratic_schedule(12), positive, negative,
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )

cases = {
    "alone": (model, "euler"),
    "ContextWindowsManual": (
        ContextWindowsManualNode.execute(model, 2, 1, "standard_static", 1, False, "pyramid", 2, False)[0], "euler"
    ),
    "SkipLayerGuidanceDiT": (
        SkipLayerGuidanceDiT.execute(model, scale=3.0, double_layers="1", start_percent=0.0, end_percent=1.0)[0], "euler"
    ),
    "heun": (model, "heun"),
}
found = {}
for name, (patched, sampler) in cases.items():
    found[name] = latents_of(patched, sampler)
    found[name + " cached"] = latents_of(add_cache(patched, BlockCache(method, float(threshold))), sampler)
save_file(found, result)
"""
CANCEL = """
def press(step, *_):
    if step == 10:
        comfy.model_management.interrupt_current_processing()

before = sample(cached)
try:
    sample(cached, press)
except comfy.model_management.InterruptProcessingException:
    cancelled = True
assert cancelled
out(before=before, after=sample(cached), plain=sample(model))
"""


@pytest.fixture
def runs_of(comfy_path, tmp_path):
    def run(code, method, threshold):
        result = tmp_path / "out.safetensors"
        done = run_in_comfyui(comfy_path, PREAMBLE + code, trained.TRANSFORMER, result, method, threshold)
        return load_file(result), done.stderr

    return run


@pytest.mark.parametrize("method", LOOSE)
def test_threshold_0_is_exact(runs_of, method):
    out, log = runs_of(EXACT, method, 0)
    assert torch.equal(out["first"], out["plain"])
    assert out["first calls"] == out["plain calls"] == 4 * STEPS * 6
    assert f"Mochi cache: {method} with threshold 0 skipped blocks in 0 of {4 * STEPS} forward passes (0%)." in log


@pytest.mark.parametrize("method", LOOSE)
def test_a_loose_threshold_leaves_out_blocks_of_each_video_and_prompt_for_itself(runs_of, method):
    out, log = runs_of(RUNS, method, LOOSE[method])
    assert 0.4 < out["first calls"] / out["plain calls"] < 0.9
    assert 0 < (out["first"] - out["plain"]).norm() / out["plain"].norm() < 0.1
    assert torch.equal(out["second"], out["first"])
    assert log.count("Mochi cache: ") == 3
    assert (out["plain batch"], out["apart batch"]) == (4, 2)
    assert out["apart calls"] == out["first calls"]
    torch.testing.assert_close(out["apart"], out["first"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out["after"], out["plain"], rtol=1e-4, atol=1e-4)
    assert out["states"] == 0


def test_a_node_that_splits_batches_turns_it_off(runs_of):
    out, log = runs_of(SPLIT, "teacache", 0.06)
    assert torch.equal(out["cached"], out["plain"])
    assert out["cached calls"] == out["plain calls"]
    assert "Mochi cache: off where another node runs the prompts of a batch one by one." in log


def test_windows_that_move_are_not_kept(runs_of):
    """Eight windows per step and two prompts; most windows change from step to step, and a whole run has 22."""
    out, _ = runs_of(WINDOWS, "teacache", 0.06)
    assert out["held"].max() <= 2 * 8 * 2  # the states of two steps
    assert (out["cached"] - out["exact"]).norm() < 0.1 * out["exact"].norm()
    assert out["states"] == 0


@pytest.mark.parametrize("method", LOOSE)
def test_beside_easycache_both_leave_out_what_they_do_alone(runs_of, method):
    """With this threshold, EasyCache skips the last three steps, the first that it may skip; the others are ours.

    Videos cannot be compared: in those steps it extrapolates what it saw last, which amplifies any difference.
    """
    states, log = runs_of(EASY, method, LOOSE[method])
    first_other = lambda one, other: (one != other).flatten(1).any(1).int().argmax().item()  # noqa: E731
    assert first_other(states["easy"], states["plain"]) == 10
    assert first_other(states["both"], states["cached"]) == 10
    assert 1 < first_other(states["cached"], states["plain"]) < 10
    assert not torch.equal(states["both"], states["easy"])
    assert log.count("EasyCache - skipped 3/12 steps") == 2


def test_only_what_belongs_to_a_forward_is_used_again(runs_of):
    """A state of another prompt, or with other blocks replaced, would be far off: by 0.6 or more of the video's norm."""
    out, _ = runs_of(BESIDE, "teacache", 0.06)
    changes = {name: relative_error(out[f"{name} cached"], out[name]) for name in out if f"{name} cached" in out}
    assert len(changes) == 4
    assert min(changes.values()) > 0 and max(changes.values()) < 0.1, changes


def test_cancel_leaves_nothing(runs_of):
    out, log = runs_of(CANCEL, "teacache", 0.09)
    assert torch.equal(out["after"], out["before"])
    assert out["plain calls"] == 4 * STEPS * 6
    assert out["states"] == 0
    assert log.count("Mochi cache: ") == 3


def cache(model=MODEL, threshold=0.0, **inputs):
    return node(
        "Mochi1Cache",
        **{"model": [model, 0], "method": "teacache", "threshold": threshold, "start": 0.0, "end": 1.0, **inputs},
    )


def sampled(graph, model):
    return node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "model": [model, 0]})


def test_in_a_graph(latents_of, comfy_server):
    graph = upto_sampler(steps=12)
    # The range ends before it begins, so nothing is skipped whatever the threshold.
    graph |= {"off": cache(), "on": cache(threshold=1.0), "never": cache(threshold=1.0, start=0.6, end=0.4)}
    graph |= {"twice": cache("on")}
    graph |= {f"with {name}": sampled(graph, name) for name in ("off", "on", "never", "twice")}
    plain, off, on, never, twice = latents_of(
        graph, [SAMPLER, 0], ["with off", 0], ["with on", 0], ["with never", 0], ["with twice", 0]
    )
    assert torch.equal(off, plain)
    assert torch.equal(never, plain)
    assert torch.equal(twice, plain), "the last cache counts"
    assert not torch.equal(on, plain)
    assert (
        "Mochi cache: teacache with threshold 1 skipped blocks in 20 of 24 forward passes (83%)."
        in comfy_server.log_tail()
    )


@pytest.mark.parametrize("patch", sorted(PATCHES.keys() - {"LoraLoaderModelOnly"}))
def test_with_the_hosts_own_patches(latents_of, comfy_client, patch):
    """EasyCache skips whole forwards, skip-layer guidance adds a forward per step, context windows one per window."""
    graph = upto_sampler(steps=12)
    graph["patch"] = with_defaults(comfy_client, patch, model=[MODEL, 0], **PATCHES[patch])
    graph |= {"exact": cache("patch"), "loose": cache("patch", 0.1)}
    graph |= {f"with {name}": sampled(graph, name) for name in ("patch", "exact", "loose")}
    patched, exact, loose = latents_of(graph, ["with patch", 0], ["with exact", 0], ["with loose", 0])
    assert torch.equal(exact, patched)
    assert not torch.equal(loose, exact)


def test_samplers_that_ask_between_the_steps(latents_of):
    graph = upto_sampler(steps=12)
    graph |= {"off": cache(), "on": cache(threshold=0.1)}
    graph["empty"] = node("EmptyMochiLatentVideo", width=96, height=64, length=13, batch_size=1)
    inputs = graph[SAMPLER]["inputs"]
    for name, model in (("plain", MODEL), ("exact", "off"), ("loose", "on")):
        graph[name] = node(
            "KSampler", model=[model, 0], seed=1, steps=8, cfg=4.5, sampler_name="heun", scheduler="linear_quadratic",
            positive=inputs["positive"], negative=inputs["negative"], latent_image=["empty", 0], denoise=1.0,
        )  # fmt: skip
    plain, exact, loose = latents_of(graph, ["plain", 0], ["exact", 0], ["loose", 0])
    assert torch.equal(exact, plain)
    assert not torch.equal(loose, exact)


def test_a_model_of_another_loader_is_refused(comfy_path):
    code = """
import comfy.model_detection, comfy.model_patcher
from pack.mochi_core import BlockCache
from pack.nodes.bridge.cache import add_cache

config = comfy.model_detection.model_config_from_unet({"t5_yproj.weight": torch.zeros(1)}, "")
config.set_inference_dtype(torch.bfloat16, None)
model = config.get_model({}, device="meta")
try:
    add_cache(comfy.model_patcher.ModelPatcher(model, "cpu", "cpu"), BlockCache("teacache", 0.1))
except ValueError as error:
    print(error)
"""
    assert run_in_comfyui(comfy_path, code).stdout.splitlines()[-1] == (
        "The MODEL is GenmoMochi from another loader, whose blocks Mochi Cache cannot skip; connect Load Mochi Transformer."
    )
