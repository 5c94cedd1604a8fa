"""What other nodes do to a conditioning, or request from the model, in a ComfyUI process: nothing is lost."""

import json

import pytest

from tests.harness.comfy_process import run_in_comfyui
from tests.harness.tiny_models import write_models

SCRIPT = """
import copy, json, sys
from threading import Barrier, Thread
import comfy.hooks
import comfy_extras.nodes_hooks as nodes_hooks
import comfy.ldm.genmo.joint_model.asymm_models_joint as stock
import nodes
from comfy.model_patcher import ModelPatcher
from pack.mochi_core import BlockCache
from pack.nodes.bridge.cache import RunCache
from pack.nodes.bridge.model import load_model
from pack.nodes.bridge.prepared import OPTION, SamplingRun, full_mask
from pack.nodes.bridge.text import encode_prompt, load_clip
from pack.nodes.bridge.vae import load_vae

(folder,) = arguments
found = {}
clip = load_clip(folder + "/text_encoders/t5xxl_fp16.safetensors")

def stock_encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))

def mask_of(entry):
    embeds, extra = entry
    return full_mask(embeds, extra.get("attention_mask")).flatten().tolist()

weight = clip.cond_stage_model.t5xxl.transformer.encoder.block[0].layer[0].SelfAttention.q.weight
key = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.diff"
lora = {key: torch.ones_like(weight, dtype=torch.float32)}

def hooked(schedule):
    group, keyframes = comfy.hooks.create_hook_lora(lora, 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
    for start, strength in ((0.0, 1.0), (0.5, 0.0)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    group.set_keyframes_on_hooks(keyframes)
    return nodes_hooks.SetClipHooks().apply_hooks(clip=clip, apply_to_conds=True, schedule_clip=schedule, hooks=group)[0]



plain = encode_prompt(clip, "a kite")
for schedule in (False, True):
    with_hooks = hooked(schedule)
    entries = {
        "ours": encode_prompt(with_hooks, "a kite"),
        "stock": stock_encode(with_hooks, "a kite"),
        "empty": encode_prompt(with_hooks, ""),
    }
    found[f"scheduled {schedule}"] = {
        name: {
            "entries": len(several),
            "hooks": all("hooks" in extra for _, extra in several),
            "ranges": [extra.get("clip_start_percent") for _, extra in several],
            "masks": [mask_of(entry) for entry in several],
        }
        for name, several in entries.items()
    }
found["mask"] = mask_of(plain[0])

longer = encode_prompt(clip, "a red kite over the sea")
(both,), = [nodes.ConditioningConcat().concat(plain, longer)]
found["both"] = mask_of(both[0])
found["longer"] = mask_of(longer[0])

patcher = load_model(folder + "/diffusion_models/mochi_preview_bf16.safetensors", torch.float32)
model = patcher.model
network, config = model.diffusion_model, model.diffusion_model.config
conds = model.extra_conds(cross_attn=both[0][0], attention_mask=both[0][1]["attention_mask"], noise=None, device="cpu")
found["mask of the model"] = conds["attention_mask"].cond.flatten().tolist()

network.t5_yproj.weight.requires_grad_()
run = SamplingRun([1.0, 0.5])
gradients = []
with torch.enable_grad():
    for sigma in (1.0, 0.5):
        x = torch.ones(1, 12, 1, 4, 4) * sigma
        text = {"c_crossattn": plain[0][0], "attention_mask": plain[0][1]["attention_mask"]}
        out = model.apply_model(x, torch.tensor([sigma]), transformer_options={OPTION: run}, **text)
        out.square().sum().backward()
        gradients.append(network.t5_yproj.weight.grad.abs().sum().item())
found["gradients"] = gradients

peer = stock.AsymmDiTJoint(
    depth=1, num_heads=24, hidden_size_x=3072, hidden_size_y=1536, mlp_ratio_x=4.0, mlp_ratio_y=4.0, patch_size=2,
    in_channels=12, use_t5=True, t5_feat_dim=config.text_width, t5_token_length=256, learn_sigma=False, timestep_scale=1000.0,
    posenc_preserve_area=True, qk_norm=True, qkv_bias=False, out_bias=True, device="meta", operations=torch.nn,
)
own_sizes = {"num_heads", "hidden_size_x", "hidden_size_y"}
wanted = {n: v for n, v in vars(peer).items() if not n.startswith("_") and n not in ("training", "dtype")}
found["attributes"] = {
    name: (value, getattr(network, name, "missing")) for name, value in wanted.items() if name not in own_sizes | {"head_dim"}
}
found["sizes"] = {name: (getattr(config, name), getattr(network, name)) for name in (*own_sizes, "head_dim")}

second = torch.device("cpu", 0)  # to the host it is another device than "cpu"
patched = clip.clone()
patched.add_patches({key.replace("text_encoders.", "").replace(".diff", ".weight"): ("diff", (lora[key],))}, 1.0)
moved = patched.clone()
moved.patcher = moved.patcher.deepclone_multigpu(second)
found["clip on another device"] = {
    "same": torch.equal(encode_prompt(moved, "a kite")[0][0], encode_prompt(patched, "a kite")[0][0]),
    "changed": not torch.equal(encode_prompt(moved, "a kite")[0][0], plain[0][0]),
    "its own": moved.cond_stage_model is moved.patcher.model is not clip.patcher.model,
    "clones, too": moved.clone().cond_stage_model is moved.patcher.model,
    "there": moved.patcher.load_device == second,
}
vae, latents = load_vae([folder + "/vae/mochi_vae.safetensors"]), torch.randn(1, 12, 2, 4, 6)
frames = vae.decode(latents)
moved = copy.copy(vae)
moved.patcher = vae.patcher.deepclone_multigpu(second)
moved.first_stage_model, moved.device, vae.first_stage_model = moved.patcher.model, second, None
found["vae on another device"] = {"same": torch.equal(moved.decode(latents), frames)}
reload, arguments = moved.patcher.cached_patcher_init
found["vae on another device"]["plain patcher"] = type(reload(*arguments, disable_dynamic=True)) is ModelPatcher

run, wrong = RunCache(BlockCache("teacache", 0.1), 1), []
in_step = Barrier(2)

def sample_on(device):
    known = {}
    for step in range(1000):
        in_step.wait()
        for window in range(8):
            (state,) = run.use_states([(device, window)], step)
            if known.setdefault(window, state) is not state:
                wrong.append((device, window, step))
            run.forward_cache().forwards += 1

sys.setswitchinterval(1e-6)
threads = [Thread(target=sample_on, args=(device,), daemon=True) for device in ("first", "second")]
[thread.start() for thread in threads]
[thread.join(60) for thread in threads]
alive = [thread.is_alive() for thread in threads]
found["two threads"] = {"wrong": wrong[:3], "alive": alive, "report": run.report(), "kept": len(run.states)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(comfy_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return json.loads(run_in_comfyui(comfy_path, SCRIPT, folder).stdout.splitlines()[-1])


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("by", ["ours", "stock", "empty"])
def test_hooks_on_the_clip_reach_the_conditioning(found, by, scheduled):
    entries = found[f"scheduled {scheduled}"][by]
    assert entries["entries"] == (2 if scheduled else 1)
    assert entries["hooks"]
    assert entries["ranges"] == ([0.0, 0.5] if scheduled else [None])
    expected = [0] * 256 if by == "empty" else found["mask"]
    assert entries["masks"] == [expected] * entries["entries"]


def test_concatenated_prompts_have_the_masks_of_both(found):
    assert 0 < sum(found["mask"]) < sum(found["longer"]) < 256
    assert found["both"] == found["mask of the model"] == found["mask"] + found["longer"]


def test_a_second_step_has_gradients_of_its_own(found):
    first, both = found["gradients"]
    assert 0 < first < both


def test_attributes_of_the_stock_class_are_there(found):
    assert len(found["attributes"]) >= 9
    assert all(theirs == ours for theirs, ours in found["attributes"].values()), found["attributes"]
    assert all(config == ours for config, ours in found["sizes"].values()), found["sizes"]


@pytest.mark.parametrize("kind", ["clip", "vae"])
def test_another_device_gets_weights_of_its_own(found, kind):
    assert all(found[f"{kind} on another device"].values()), found[f"{kind} on another device"]


def test_two_threads_share_the_record_of_a_cache(found):
    shared = found["two threads"]
    assert (shared["wrong"], shared["alive"], shared["kept"]) == ([], [False, False], 16)
    assert "skipped blocks in 0 of 16000 forward passes" in shared["report"]
