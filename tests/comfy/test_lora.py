"""Load Mochi LoRA in a real ComfyUI server, against checkpoints merged by hand and together with the host's own LoRA nodes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import AsymmDiT, load_lora
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.graphs import (
    MODEL,
    NEGATIVE,
    POSITIVE,
    SAMPLER,
    assert_healthy,
    node,
    prompt,
    upto_sampler,
    with_defaults,
)
from tests.harness.lora_files import (
    ALPHA,
    ATTENTION,
    RANK,
    diffusers_weights,
    merged,
    random_adapter,
    random_changes,
    with_weights,
    write_adapter,
)
from tests.harness.numbers import relative_error
from tests.harness.random_inputs import inputs
from tests.harness.tiny_models import random_dit

INPUTS = inputs([5, 9])

GENMO_NOTES = {"kwargs": {"qkv_proj_lora_alpha": ALPHA, "out_proj_lora_alpha": ALPHA}}
PEFT_NOTES = {"lora_adapter_metadata": {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}}
own_weights = AsymmDiT.state_dict
KINDS = {
    "genmo": {"names": own_weights, "endings": ATTENTION, "metadata": GENMO_NOTES},
    "diffusers": {"names": diffusers_weights, "metadata": PEFT_NOTES},
    "kohya": {"names": own_weights, "alpha": ALPHA},
    "comfyui": {"names": own_weights, "alpha": ALPHA, "dora": True},
    "peft": {"names": diffusers_weights, "alpha": ALPHA, "dora": True},
}


@pytest.fixture(scope="module")
def dit():
    """The server's denoiser; the numbers in its file are bf16."""
    return with_weights(random_dit(), {name: t.bfloat16().float() for name, t in random_dit().state_dict().items()})


@pytest.fixture
def write_lora(comfy_server):
    """Write a LoRA of one of the `KINDS`; returns the denoiser with it."""

    def write(kind, base, strength=1.0):
        options = KINDS[kind]
        weights = options["names"](base)
        adapter = random_adapter(weights, *options.get("endings", ()), dora=options.get("dora", False))
        path = comfy_server.base / "models" / "loras" / f"{kind}.safetensors"
        write_adapter(path, adapter, kind, options.get("alpha"), options.get("metadata"))
        return with_weights(base, merged(weights, adapter, ALPHA / RANK, strength))

    return write


@pytest.fixture
def with_checkpoint(comfy_server):
    """A graph that also samples from a file with the given weights, as "by hand"."""

    def build(name, weights, dtype="fp32"):
        save_file(weights.state_dict(), comfy_server.base / "models" / "diffusion_models" / name)
        graph = upto_sampler()
        graph[MODEL]["inputs"]["weight_dtype"] = dtype
        graph["file"] = node("Mochi1LoadTransformer", model_name=name, weight_dtype=dtype)
        return graph | {"by hand": sampled(graph, "file")}

    return build


def sampled(graph, model, **inputs):
    return node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "model": [model, 0], **inputs})


def ours(model, kind, strength=1.0):
    return node("Mochi1LoadLoRA", model=[model, 0], lora_name=f"{kind}.safetensors", strength=strength)


def stock(model, kind, strength=1.0):
    return node("LoraLoaderModelOnly", model=[model, 0], lora_name=f"{kind}.safetensors", strength_model=strength)


def assert_same(result, expected, plain):
    assert (result - expected).norm() <= 1e-4 * expected.norm()
    assert (plain - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_checkpoint_merged_by_hand(latents_of, dit, write_lora, with_checkpoint, kind):
    graph = with_checkpoint(f"merged {kind}.safetensors", write_lora(kind, dit, 0.8))
    graph["lora"] = ours(MODEL, kind, 0.8)
    graph["result"] = sampled(graph, "lora")
    plain, result, expected = latents_of(graph, [SAMPLER, 0], ["result", 0], ["by hand", 0])
    assert_same(result, expected, plain)


def test_strength_0_and_removal_leave_no_trace(comfy_client, latents_of, dit, write_lora):
    write_lora("peft", dit)
    graph = upto_sampler()
    (before,) = latents_of(graph, [SAMPLER, 0])
    # The same schedule from another node, so that no result comes from the cache.
    sigmas = {"sigmas": with_defaults(comfy_client, "Mochi1Sigmas", steps=graph[SAMPLER]["inputs"]["steps"])}
    loras = {"on": ours(MODEL, "peft"), "off": ours(MODEL, "peft", 0.0)}
    samplers = {"with": sampled(graph, "on"), "without": sampled(graph, "off", sigmas=["sigmas", 0], steps=7)}
    on, off = latents_of(graph | sigmas | loras | samplers, ["with", 0], ["without", 0])
    (after,) = latents_of({**graph, **sigmas, "after": sampled(graph, MODEL, sigmas=["sigmas", 0])}, ["after", 0])
    assert not torch.equal(on, before)
    assert torch.equal(off, before)
    assert torch.equal(after, before)


@pytest.mark.parametrize("second", [ours, stock])
def test_loras_follow_each_other(latents_of, dit, write_lora, with_checkpoint, second):
    both = write_lora("kohya", write_lora("diffusers", dit))
    graph = with_checkpoint("both.safetensors", both)
    graph |= {"first": ours(MODEL, "diffusers"), "second": second("first", "kohya")}
    graph["result"] = sampled(graph, "second")
    plain, result, expected = latents_of(graph, [SAMPLER, 0], ["result", 0], ["by hand", 0])
    assert_same(result, expected, plain)


def test_hooks_come_on_top(latents_of, dit, write_lora, with_checkpoint):
    both = write_lora("kohya", write_lora("peft", dit))
    graph = with_checkpoint("hooked.safetensors", both)
    graph["lora"] = ours(MODEL, "peft")
    graph["hook"] = node("CreateHookLoraModelOnly", lora_name="kohya.safetensors", strength_model=1.0)
    graph["prompts"] = node(
        "PairConditioningSetProperties", positive_NEW=[POSITIVE, 0], negative_NEW=[NEGATIVE, 0], strength=1.0,
        set_cond_area="default", hooks=["hook", 0],
    )  # fmt: skip
    graph["result"] = sampled(graph, "lora", positive=["prompts", 0], negative=["prompts", 1])
    plain, result, expected = latents_of(graph, [SAMPLER, 0], ["result", 0], ["by hand", 0])
    assert_same(result, expected, plain)


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_rowwise", "int8", "q4_0"])
def test_on_quantised_weights(latents_of, dit, write_lora, with_checkpoint, dtype):
    """The host rounds changed 8-bit weights again; the file's are rounded once."""
    graph = with_checkpoint("to be quantised.safetensors", write_lora("peft", dit), dtype)
    graph["lora"] = ours(MODEL, "peft")
    graph["result"] = sampled(graph, "lora")
    plain, result, expected = latents_of(graph, [SAMPLER, 0], ["result", 0], ["by hand", 0])
    assert (result - expected).norm() < 0.3 * (plain - expected).norm()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 8)}, "holds a LoRA for FLUX or HunyuanVideo"),
        ({"blocks.0.attn.qkv_x.lora_A": torch.zeros(4, 8)}, "has only one half of blocks.0.attn.qkv_x"),
        ({"t5_yproj.weight": torch.zeros(4, 8)}, "holds a Mochi transformer"),
        ("<html>Not found</html>", "is not a safetensors file"),
    ],
)
def test_bad_files_are_told_what_is_wrong(comfy_client, comfy_server, content, message):
    path = comfy_server.base / "models" / "loras" / "bad.safetensors"
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    else:
        save_file(content, path)
    graph = prompt()
    graph["lora"] = ours(MODEL, "bad")
    graph[SAMPLER]["inputs"]["model"] = ["lora", 0]
    run = comfy_client.run(graph)
    assert run.outcome == "execution_error"
    assert message in run.error
    assert_healthy(comfy_client)


def test_names_without_a_place_are_logged(comfy_client, comfy_server, dit):
    strays = random_adapter({"blocks.7.attn.qkv_x.weight": torch.zeros(4, 4)})
    adapter = random_adapter(dit.state_dict(), "qkv_x") | strays
    write_adapter(comfy_server.base / "models" / "loras" / "stray.safetensors", adapter, "genmo")
    graph = prompt()
    graph["lora"] = ours(MODEL, "stray")
    graph[SAMPLER]["inputs"]["model"] = ["lora", 0]
    assert comfy_client.run(graph).outcome == "execution_success"
    assert (
        "stray.safetensors: Mochi has no layers for 1 of its names, which are ignored: blocks.7.attn.qkv_x."
        in comfy_server.log_tail(200)
    )


SCRIPT = """
import json
import comfy.model_detection, comfy.model_patcher
from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model
from comfy_extras.nodes_model_merging import ModelSubtract
from comfy_extras.nodes_train import _setup_lora_adapters
model, other_model, lora, released_lora, folder = arguments
from pack.nodes.bridge.lora import add_lora
from pack.nodes.bridge.model import load_model

def streamed(patched, name):
    weights = {}
    for key, weight in patched.model.state_dict().items():
        if key in patched.patches:
            patch = comfy.model_patcher.LowVramPatch(key, patched.patches)
            patch.prepare(None, None, copy=False)
            weights[name + key.removeprefix("diffusion_model.")] = patch(weight.clone())
    return weights

def host(file):
    tensors = comfy.utils.load_torch_file(file)
    return comfy.sd.load_lora_for_models(load_model(model, torch.float32), None, tensors, 0.8, 0.0)[0]

ours = add_lora(load_model(model, torch.float32), lora, 0.8)
save_file(streamed(ours, "") | streamed(host(lora), "host/"), folder + "/result.safetensors")

# Files as the host's nodes Extract and Save LoRA and Train LoRA write them, by both loaders.
difference = ModelSubtract().merge(load_model(other_model, torch.float32), load_model(model, torch.float32), 1.0)[0]
generator = torch.Generator().manual_seed(0)
files = {f"extracted {kind.name}": calc_lora_model(difference, 4, *2 * ["diffusion_model."], {}, kind, True) for kind in LORAType}
for algorithm in ("LoRA", "LoHa", "LoKr"):
    tensors, _ = _setup_lora_adapters(load_model(model, torch.float32), {}, algorithm, torch.float32, 2)
    files[f"trained {algorithm}"] = {
        name: t if "alpha" in name else 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()
    }
for name, tensors in files.items():
    path = f"{folder}/{name}.safetensors"
    save_file({key: t.detach().contiguous() for key, t in tensors.items()}, path)
    both = streamed(add_lora(load_model(model, torch.float32), path, 0.8), "") | streamed(host(path), "host/")
    save_file(both, f"{folder}/{name} weights.safetensors")
assert not host(released_lora).patches

names = {"t5_yproj.weight": torch.zeros(1)}
config = comfy.model_detection.model_config_from_unet(names, "")
config.set_inference_dtype(torch.bfloat16, None)
stock = comfy.model_patcher.ModelPatcher(config.get_model({}, device="meta"), torch.device("cpu"), torch.device("cpu"))
print(json.dumps(sorted(add_lora(stock, released_lora, 1.0).patches)))
stock.model = torch.nn.Identity()
for strength in (1.0, float("nan"), float("inf")):
    try:
        add_lora(stock, lora, strength)
    except ValueError as error:
        print(error)
"""


HOSTS_FILES = ("extracted FULL_DIFF", "extracted STANDARD", "trained LoHa", "trained LoKr", "trained LoRA")


def assert_equal_to_the_hosts_loader(folder, name, dit):
    """Compare ours in ComfyUI, and in the core unless only the host supports the adapter, including norms and biases."""
    weights = load_file(folder / f"{name} weights.safetensors")
    own = {key: tensor for key, tensor in weights.items() if not key.startswith("host/")}
    assert len(own) == len(weights) / 2 == len(dit.state_dict()) - 1  # none of the host's nodes changes pos_frequencies
    assert any("norm" in key for key in own)
    for key, tensor in own.items():
        assert relative_error(tensor, weights[f"host/{key}"]) < 1e-6, key
    if name not in ("trained LoHa", "trained LoKr"):
        changed = with_weights(dit, dit.state_dict() | own)
        applied = with_weights(dit, dit.state_dict())
        load_lora(applied, folder / f"{name}.safetensors", 0.8)
        assert relative_error(applied(*INPUTS), changed(*INPUTS)) < 1e-5
        assert relative_error(applied(*INPUTS), dit(*INPUTS)) > 0.05


def test_weight_streaming_and_the_stock_loaders_model(comfy_path, dit, tmp_path):
    """What the host's low-VRAM mode does without a GPU; the stock denoiser without its 20 GB."""
    weights = dit.state_dict()
    adapter = random_adapter(weights, dora=True)
    model, other, lora = (tmp_path / f"{name}.safetensors" for name in ("model", "other", "lora"))
    save_file(weights, model)
    save_file({name: weights[name] + change for name, change in random_changes(weights).items()}, other)
    write_adapter(lora, adapter, "comfyui", alpha=ALPHA)
    released = random_adapter(diffusers_weights(AsymmDiT(device="meta")), "0.attn1.to_k", "47.norm1_context.linear_1")
    released_lora = write_adapter(tmp_path / "released.safetensors", released, "diffusers")
    done = run_in_comfyui(comfy_path, SCRIPT, model, other, lora, released_lora, tmp_path)
    streamed, expected = load_file(tmp_path / "result.safetensors"), merged(weights, adapter, ALPHA / RANK, 0.8)
    assert streamed.keys() == {f"{host}{layer}.weight" for layer in adapter for host in ("", "host/")}
    for layer in adapter:
        name = f"{layer}.weight"
        assert relative_error(streamed[name], expected[name]) < 1e-6
        # The host divides by the norms of the rows without the LoRA.
        assert relative_error(streamed[f"host/{name}"], expected[name]) > 0.01
    *_, keys, refusal, nan, infinite = done.stdout.splitlines()
    blocks = "diffusion_model.blocks"
    assert json.loads(keys) == [
        *(f"{blocks}.{i}.attn.qkv_x.weight" for i in (0, 10, 20, 30, 40)), f"{blocks}.47.mod_y.weight"
    ]  # fmt: skip
    assert refusal == "The MODEL is Identity, not Mochi; connect Load Mochi Transformer."
    for strength, told in (("nan", nan), ("inf", infinite)):
        assert told == f"The strength of a LoRA is {strength}, but must be finite; 1 is as trained."
    for name in HOSTS_FILES:
        assert_equal_to_the_hosts_loader(tmp_path, name, dit)
