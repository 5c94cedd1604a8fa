"""Several devices in a ComfyUI process: `cpu` and `cpu:0`, which the host takes for different devices.

Each case samples on one device and on both; hooks on the blocks record which networks ran in which threads.
"""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.harness.comfy_process import run_in_comfyui
from tests.harness.parallel_runs import HEADS_24
from tests.harness.products import is_the_same
from tests.harness.tiny_models import random_dit

SCRIPT = """
import faulthandler, gc, json, logging, threading
import comfy.hooks, comfy.model_management as mm, comfy.sample, comfy.samplers
import nodes as stock
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode
from comfy_extras.nodes_nag import NAGuidance
from pack.mochi_core import BlockCache, linear_quadratic_schedule
from pack.mochi_core.parallel.group import MEETING_TIMEOUT
from pack.nodes.bridge import parallel
from pack.nodes.bridge.cache import add_cache
from pack.nodes.bridge.guider import make_guider
from pack.nodes.bridge.model import load_model
from pack.nodes.speed import Parallel

torch.set_num_threads(1)
torch.set_grad_enabled(False)
path, result = arguments
FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 0)
mm.get_all_torch_devices = lambda exclude_current=False: [FIRST, SECOND]
generator = torch.Generator().manual_seed(0)
latents, found, said, ran = {}, {}, [], set()

class Console(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

logging.basicConfig(level=logging.INFO, handlers=[Console()], force=True)

def randn(*shape):
    return torch.randn(shape, generator=generator)

def prompt(length):
    return [[randn(1, 32, 64), {"attention_mask": (torch.arange(32) < length)[None].long()}]]

noise, positive, negative = randn(1, 12, 3, 6, 10), prompt(9), prompt(0)

def watch(patcher, index):
    "Notes whether the main thread runs a network's middle block, and the samples and tokens that it gets."
    def note(_, inputs, __):
        ran.add((index, threading.current_thread() is threading.main_thread(), *inputs[0].shape[:2]))
    return patcher.model.diffusion_model.blocks[1].register_forward_hook(note)

def clone_of(model):
    (clone,) = model.get_additional_models_with_key("multigpu")
    return clone

def sample(model, cfg=4.5, positive=positive, steps=4, noise=noise, **options):
    return comfy.sample.sample_custom(
        model, noise, cfg, comfy.samplers.sampler_object("euler"), linear_quadratic_schedule(steps), positive, negative,
        torch.zeros_like(noise), disable_pbar=True, seed=1, **options,
    )

def on_both(model, split="auto"):
    return Parallel.execute(model, 0, split)[0]

def cfg_split(model, _):
    return MultiGPUCFGSplitNode.execute(model, 2)[0]

def says(part):
    return [text for text in said if part in text]

def compare(name, model, run=sample, split="auto", add=on_both, plain=None, **options):
    said.clear()
    latents[f"{name}/one"], counted = run(plain or model, **options), says("skipped blocks")
    both = add(model, split)
    said.clear(), ran.clear()
    hooks = [watch(both, 0), watch(clone_of(both), 1)]
    latents[f"{name}/both"] = run(both, **options)
    [hook.remove() for hook in hooks]
    found[name] = {"ran": sorted(map(list, ran)), "said": says("Mochi parallel"), "counted": [counted, says("skipped blocks")]}

def guide(model):
    guider = make_guider(model, positive, negative, 4.5, 0.0, 0.0, 0.5)
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, linear_quadratic_schedule(6), seed=0, disable_pbar=True)

def k_sample(model):
    (done,) = stock.KSampler().sample(
        model, 3, 4, 4.5, "euler", "linear_quadratic", positive, negative, {"samples": torch.zeros_like(noise)}
    )
    return done["samples"]

model = load_model(path, torch.float32)
network = model.model.diffusion_model
compare("CFG split", model, add=cfg_split)
compare("guided", model)
lost = load_model(path, torch.float32)
network_of_lost, lost.itself = lost.model, lost
mm.load_models_gpu([lost])
del lost
gc.collect()
assert None in mm.loaded_models()
compare("beside a network whose MODEL is gone", model)
del network_of_lost
compare("guided by tokens", model, split="sequence")
compare("unguided", model, cfg=1.0)
compare("unguided, whole prompts", model, cfg=1.0, split="guidance")
compare("batch of videos", model, noise=randn(2, 12, 3, 6, 10))
compare("Mochi Guider", model, run=guide)
compare("KSampler", model, run=k_sample)
compare("context windows", ContextWindowsManualNode.execute(model, 2, 1, "standard_static", 1, False, "pyramid", 2, False)[0])
compare("EasyCache", EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False)[0], steps=8)
compare("attention guidance", NAGuidance.execute(model, 5.0, 0.5, 2.5)[0])

lora = {}
for layer in ("blocks.0.mod_x", "blocks.1.attn.qkv_x", "blocks.2.mlp_x.w1", "t5_yproj"):
    rows, columns = network.get_submodule(layer).weight.shape
    lora[f"diffusion_model.{layer}.lora_A.weight"] = randn(4, columns) * 0.2
    lora[f"diffusion_model.{layer}.lora_B.weight"] = randn(rows, 4) * 0.2
compare("LoRA", comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0])
group, keyframes = comfy.hooks.create_hook_lora(lora, 1.0, 0.0), comfy.hooks.HookKeyframeGroup()
for start, strength in ((0.0, 0.5), (0.2, 1.0)):
    keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
group.set_keyframes_on_hooks(keyframes)
compare("hooks", model, positive=comfy.hooks.set_hooks_for_conditioning(positive, group))

for method, threshold in (("teacache", 0.3), ("first_block", 2.0)):
    for split in ("auto", "sequence"):
        compare(f"{method}, {split}", add_cache(model, BlockCache(method, threshold)), steps=10, split=split)
compare("guider with cache", add_cache(model, BlockCache("teacache", 0.3)), run=guide, split="sequence")

leveled = load_model(path, torch.float32, frame_levels=True)
mask = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3, 1, 1)
compare("frame levels", leveled, noise_mask=mask)
compare("frame levels by tokens", leveled, noise_mask=mask, split="sequence")
compare("q4_0", load_model(path, torch.float32, "q4_0"), split="sequence")

compiled = model.clone()
set_torch_compile_wrapper(compiled, "eager")
compare("compiled", compiled, plain=model)

reach = parallel.reach_each_other
parallel.reach_each_other = lambda devices: False
compare("ring", model, split="sequence")
parallel.reach_each_other = reach

# What ends one device ends both; where one waits for the other instead, this process ends.
faulthandler.dump_traceback_later(MEETING_TIMEOUT / 2, exit=True)
broken = on_both(model, "sequence")
for error in (ValueError("wrong"), mm.InterruptProcessingException(), mm.OOM_EXCEPTION("full")):
    for patcher, which in ((broken, "first"), (clone_of(broken), "second")):
        def fail(_, inputs):
            raise error
        hook = patcher.model.diffusion_model.blocks[1].register_forward_pre_hook(fail)
        said.clear()
        threads = threading.active_count()
        try:
            sample(broken)
            raised = None
        except BaseException as caught:
            raised = caught
        hook.remove()
        found[f"{type(error).__name__} on the {which}"] = {
            "shown": raised is error, "threads": threading.active_count() - threads, "said": says("failed, and all devices stop"),
        }
def no_device(device):
    if device == SECOND:
        raise ValueError("no such device")
    original(device)

original, mm.set_torch_device = mm.set_torch_device, no_device
said.clear()
try:
    sample(broken)
    raised = None
except ValueError as caught:
    raised = str(caught)
found["no device"] = {"raised": raised, "said": says("failed, and all devices stop")}
faulthandler.cancel_dump_traceback_later()
mm.set_torch_device = original
compare("after errors", model, split="sequence", add=lambda *_: broken)

found["plans"] = {}
for split in parallel.SPLITS:
    for count in (2, 3, 4, 8):
        devices = tuple(torch.device("meta", index) for index in range(count))
        found["plans"][f"{split} {count}"] = [str(parallel.plan_for(split, devices, prompts)) for prompts in (2, 1)]

required = model.model.memory_required((2, 12, 3, 6, 10))
with parallel._shared_memory(model.model, "auto", (FIRST, SECOND)):
    found["memory"] = required / model.model.memory_required((2, 12, 3, 6, 10))
options = str(broken.model_options)
found["left"] = [model.model.shared_by, *(key for key in ("multigpu_clones", "mochi_parallel") if key in options)]

mm.get_all_torch_devices = lambda exclude_current=False: [FIRST]
said.clear()
alone = on_both(broken)
found["one GPU"] = {"said": says("Mochi parallel"), "clones": alone.get_additional_models()}
found["one GPU"]["wrappers"] = [place for place, by_key in alone.wrappers.items() if "mochi_parallel" in by_key]
save_file(latents, result)
print(json.dumps(found))
"""


# Rows are (network, whether its thread is the main one, samples, tokens); a video has 45 tokens.
PAIR = [[0, True, 1, 45], [1, False, 1, 45]]
ONE_BY_TOKENS = [[0, True, 1, 23], [1, False, 1, 22]]
TWO_BY_TOKENS = [[0, True, 2, 23], [1, False, 2, 22]]
RAN = {
    "CFG split": [[0, False, 1, 45], [1, False, 1, 45]],
    "guided": PAIR,
    "beside a network whose MODEL is gone": PAIR,
    "guided by tokens": TWO_BY_TOKENS,
    "unguided": ONE_BY_TOKENS,
    "unguided, whole prompts": [[0, True, 1, 45]],
    "batch of videos": [[0, True, 2, 45], [1, False, 2, 45]],
    "Mochi Guider": sorted(PAIR + ONE_BY_TOKENS),
    "KSampler": PAIR,
    "context windows": sorted([[0, True, 1, 30], [1, False, 1, 30], *PAIR]),
    "EasyCache": PAIR,
    "attention guidance": TWO_BY_TOKENS,  # needs both prompts
    "LoRA": PAIR,
    "hooks": ONE_BY_TOKENS,  # the host runs prompts with different weights one after another
    "teacache, auto": PAIR,
    "teacache, sequence": TWO_BY_TOKENS,
    "first_block, auto": PAIR,
    "first_block, sequence": TWO_BY_TOKENS,
    "guider with cache": sorted(ONE_BY_TOKENS + TWO_BY_TOKENS),
    "frame levels": PAIR,
    "frame levels by tokens": TWO_BY_TOKENS,
    "q4_0": TWO_BY_TOKENS,
    "compiled": PAIR,
    "ring": TWO_BY_TOKENS,
    "after errors": TWO_BY_TOKENS,
}
CACHED = [name for name in RAN if "cache" in name]
ROUNDED = {"CFG split", "ring"}
"""Cases that sum in another order than a single device."""
ERRORS = ["InterruptProcessingException", "OutOfMemoryError", "ValueError"]


@pytest.fixture(scope="module")
def done(comfy_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    save_file(random_dit(HEADS_24).state_dict(), folder / "dit.safetensors")
    out = run_in_comfyui(comfy_path, SCRIPT, folder / "dit.safetensors", folder / "out.safetensors")
    return load_file(folder / "out.safetensors"), json.loads(out.stdout.splitlines()[-1])


@pytest.fixture
def found(done):
    return done[1]


@pytest.mark.parametrize("case", RAN)
def test_both_devices_work_and_make_what_one_makes(done, case):
    one, both = (done[0][f"{case}/{devices}"] for devices in ("one", "both"))
    assert done[1][case]["ran"] == RAN[case]
    assert one.std() > 0.1
    assert is_the_same(both, one, rounded=case in ROUNDED)


@pytest.mark.parametrize("case", ["LoRA", "hooks", "attention guidance", "first_block, auto", "q4_0"])
def test_what_cases_add_changes_the_latents(done, case):
    plain, changed = done[0]["guided/one"], done[0][f"{case}/one"]
    assert (changed - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("case", CACHED)
def test_a_cache_leaves_out_and_counts_what_it_does_on_one_device(found, case):
    (one,), (both,) = found[case]["counted"]
    assert one == both
    assert "skipped blocks in 0 of" not in both


def test_what_the_console_says(found):
    assert found["guided"]["said"] == [
        "Mochi parallel: cpu, cpu:0; guidance=2 where there is guidance; else ulysses=2."
    ]
    assert found["compiled"]["said"][1:] == [
        "Mochi parallel: the compiled transformer is not used, because the compiled code is for one GPU."
    ]
    assert found["ring"]["said"] == ["Mochi parallel: cpu, cpu:0; ring=2 where there is guidance; else ring=2."]


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_one_device_ends_both_and_is_shown(found, error, which):
    ended = found[f"{error} on the {which}"]
    assert ended["shown"]
    assert ended["threads"] == 0
    device, message = {"first": "cpu", "second": "cpu:0"}[which], {"ValueError": "wrong", "OutOfMemoryError": "full"}
    expected = [f"Mochi parallel: {device} failed, and all devices stop: {message[error]}"] if error in message else []
    assert ended["said"] == expected, "a cancel is no failure"


def test_a_thread_that_cannot_have_its_device_is_an_error(found):
    said = ["Mochi parallel: cpu:0 failed, and all devices stop: no such device"]
    assert found["no device"] == {"raised": "no such device", "said": said}


def test_plans_for_guided_and_unguided_steps(found):
    assert found["plans"] == {
        "auto 2": ["guidance=2", "ulysses=2"],
        "auto 3": ["ulysses=3", "ulysses=3"],
        "auto 4": ["guidance=2, ulysses=2", "ulysses=4"],
        "auto 8": ["guidance=2, ulysses=4", "ulysses=8"],
        "guidance 2": ["guidance=2", "guidance=1"],
        "guidance 3": ["guidance=2", "guidance=1"],
        "guidance 4": ["guidance=2", "guidance=1"],
        "guidance 8": ["guidance=2", "guidance=1"],
        "sequence 2": ["ulysses=2", "ulysses=2"],
        "sequence 3": ["ulysses=3", "ulysses=3"],
        "sequence 4": ["ulysses=4", "ulysses=4"],
        "sequence 8": ["ulysses=8", "ulysses=8"],
    }


def test_memory_is_shared_and_nothing_is_left_of_a_run(found):
    assert found["memory"] == 2
    assert found["left"] == [1]


def test_with_one_gpu_the_model_works_as_without_the_node(found):
    assert found["one GPU"] == {
        "said": ["Mochi parallel: one GPU of 1, so the MODEL works as without the node."],
        "clones": [],
        "wrappers": [],
    }
