"""LoRAs of every kind equal merging by hand, and leave nothing behind."""

import argparse
import json
from dataclasses import replace
from pathlib import PureWindowsPath

import pytest
import torch
from safetensors.torch import save_file

from mochi_core import AsymmDiT, AsymmDiTConfig, fuse_loras, load_lora, load_transformer
from mochi_core.lora import Lora, LoraDelta, read_lora
from mochi_core.lora.targets import find_target, lora_targets
from mochi_core.options import lora_option
from mochi_core.quantization.weights import QuantizedLinear
from tests.harness.lora_files import (
    ALPHA,
    ATTENTION,
    RANK,
    SPELLINGS,
    diffusers_weights,
    merged,
    random_adapter,
    random_changes,
    with_weights,
    write_adapter,
)
from tests.harness.numbers import relative_error
from tests.harness.random_inputs import inputs
from tests.harness.tiny_models import DIT, random_dit

INPUTS = inputs([5, 9])


@pytest.fixture
def dit():
    return random_dit()


def own_names(dit):
    return dit.state_dict()


def assert_changes_like(dit, lora_path, weights):
    """Assert that the LoRA changes the output to that of the given weights; it stays loaded in `dit`."""
    expected = with_weights(dit, weights)(*INPUTS)
    assert relative_error(dit(*INPUTS), expected) > 0.01
    lora = load_lora(dit, lora_path)
    assert relative_error(dit(*INPUTS), expected) <= 1e-5
    return lora


@pytest.mark.parametrize("config", [AsymmDiTConfig(), DIT, AsymmDiTConfig(depth=1, patch_size=4, timestep_features=64)])
def test_every_parameter_has_its_names(config):
    expected = {name: tuple(p.shape) for name, p in AsymmDiT(config, device="meta").named_parameters()}
    targets = lora_targets(config)
    assert {target.parameter for target in targets.values()} == expected.keys()
    for name, shape in expected.items():
        layer, _, leaf = name.rpartition(".")
        target = find_target(targets, f"diffusion_model.{layer or leaf}", leaf if layer else "weight")
        assert (target.parameter, target.first_row, target.shape) == (name, 0, shape)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("names", [own_names, diffusers_weights])
def test_every_spelling_of_every_layer(dit, tmp_path, names, spelling):
    weights = names(dit)
    adapter = random_adapter(weights)
    assert len(adapter) == {own_names: 35, diffusers_weights: 47}[names]
    path = write_adapter(tmp_path / "a.safetensors", adapter, spelling, alpha=ALPHA)
    assert_changes_like(dit, path, merged(weights, adapter, scale=ALPHA / RANK))


@pytest.mark.parametrize("layers", [("to_v", "to_add_out"), ("add_q_proj",), ("ff.net.0.proj",), ("norm_out.linear",)])
def test_parts_of_fused_layers_and_swapped_halves(dit, tmp_path, layers):
    weights = diffusers_weights(dit)
    adapter = random_adapter(weights, *layers)
    path = write_adapter(tmp_path / "a.safetensors", adapter, "diffusers")
    assert_changes_like(dit, path, merged(weights, adapter))


def test_genmos_alphas_are_in_its_notes(dit, tmp_path):
    weights = own_names(dit)
    adapter = random_adapter(weights, *ATTENTION)
    notes = {
        "qkv_proj_lora_rank": RANK,
        "qkv_proj_lora_alpha": 10,
        "out_proj_lora_rank": RANK,
        "out_proj_lora_alpha": 2,
    }
    path = write_adapter(tmp_path / "a.safetensors", adapter, "genmo", metadata={"kwargs": notes})
    qkv = {layer: factors for layer, factors in adapter.items() if "qkv" in layer}
    expected = merged(merged(weights, adapter, scale=2 / RANK), {}) | {
        name: weight for name, weight in merged(weights, qkv, scale=10 / RANK).items() if "qkv" in name
    }
    assert_changes_like(dit, path, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_alphas_are_in_its_configuration(dit, tmp_path, rslora):
    weights = diffusers_weights(dit)
    adapter = random_adapter(weights, "attn1.to_q", "attn1.to_k")
    config = {"r": RANK, "lora_alpha": 10, "alpha_pattern": {"attn1.to_k": 2}, "use_rslora": rslora}
    scales = {name: alpha / (RANK**0.5 if rslora else RANK) for name, alpha in (("to_q", 10), ("to_k", 2))}
    expected = weights
    for name, scale in scales.items():
        expected = merged(expected, {n: f for n, f in adapter.items() if n.endswith(name)}, scale=scale)
    packed = {"lora_adapter_metadata": {f"transformer.{name}": value for name, value in config.items()}}
    write_adapter(tmp_path / "a.safetensors", adapter, "diffusers", metadata=packed)
    assert_changes_like(dit, tmp_path / "a.safetensors", expected).remove()
    write_adapter(tmp_path / "adapter_model.safetensors", adapter, "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_changes_like(dit, tmp_path / "adapter_model.safetensors", expected)


def test_pefts_configuration_without_an_alpha_means_the_rank(dit, tmp_path):
    weights, config = diffusers_weights(dit), {"r": RANK, "use_rslora": True}
    adapter = random_adapter(weights, "attn1.to_q")
    write_adapter(tmp_path / "adapter_model.safetensors", adapter, "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    expected = merged(weights, adapter, scale=RANK / RANK**0.5)
    assert_changes_like(dit, tmp_path / "adapter_model.safetensors", expected)


@pytest.mark.parametrize(("names", "spelling"), [(own_names, "kohya"), (diffusers_weights, "peft")])
def test_dora(dit, tmp_path, names, spelling):
    weights = names(dit)
    adapter = random_adapter(weights, dora=True)
    path = write_adapter(tmp_path / "a.safetensors", adapter, spelling, alpha=ALPHA)
    lora = assert_changes_like(dit, path, merged(weights, adapter, scale=ALPHA / RANK))
    lora.strength = 0.3
    blended = merged(weights, adapter, scale=ALPHA / RANK, strength=0.3)
    assert relative_error(dit(*INPUTS), with_weights(dit, blended)(*INPUTS)) <= 1e-5


@pytest.mark.parametrize("spelling", ["comfyui", "kohya"])
@pytest.mark.parametrize("names", [own_names, diffusers_weights])
def test_whole_parameters(dit, tmp_path, names, spelling):
    """Norms, biases, convolutions and frequencies, and whole matrices."""
    weights, before = names(dit), dit(*INPUTS)
    changes = random_changes(weights)
    assert changes.keys() == weights.keys()
    path = write_adapter(tmp_path / "a.safetensors", {}, spelling, changes=changes)
    lora = assert_changes_like(dit, path, {name: weights[name] + change for name, change in changes.items()})
    lora.strength = -0.5
    halved = with_weights(dit, {name: weights[name] - 0.5 * change for name, change in changes.items()})
    assert relative_error(dit(*INPUTS), halved(*INPUTS)) <= 1e-5
    lora.remove()
    assert torch.equal(dit(*INPUTS), before)


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_of_the_convolution(dit, tmp_path, dora):
    weight = dit.x_embedder.proj.weight
    adapter = random_adapter({"x_embedder.proj.weight": weight.flatten(1)}, dora=dora)
    expected = merged({"x_embedder.proj.weight": weight.flatten(1)}, adapter)["x_embedder.proj.weight"]
    path = write_adapter(tmp_path / "a.safetensors", adapter, "comfyui")
    changed = {**own_names(dit), "x_embedder.proj.weight": expected.reshape(weight.shape)}
    assert_changes_like(dit, path, changed)


def test_changes_of_one_parameter_add_up_and_follow_the_denoiser(tmp_path):
    dit, name = AsymmDiT(DIT, dtype=torch.bfloat16), "final_layer.linear.bias"
    dit.load_state_dict(random_dit().state_dict())
    original, loras = dit.state_dict()[name].clone(), []
    changes = {name: torch.full_like(original, 0.001, dtype=torch.float32)}
    path = write_adapter(tmp_path / "a.safetensors", {}, "comfyui", changes=changes)
    loras = [load_lora(dit, path, strength) for strength in (1.0, 3.0)]
    total = original.float() + 0.001 + 0.003
    assert torch.equal(dit.state_dict()[name], total.bfloat16())
    dit.to(torch.float32)
    loras[0].remove()
    assert torch.equal(dit.state_dict()[name], original.float() + 3 * changes[name])
    loras[1].remove()
    assert torch.equal(dit.state_dict()[name], original.float())


def test_several_add_up_whatever_their_kind(dit, tmp_path):
    weights = diffusers_weights(dit)
    first, second = (random_adapter(weights, "attn1.to_q", "ff.net.2", seed=seed, dora=True) for seed in (1, 2))
    third = random_adapter(weights, seed=3)
    expected = dict(weights)
    for i, (adapter, strength) in enumerate(((first, 0.5), (second, 0.8), (third, -0.3))):
        path = write_adapter(tmp_path / f"{i}.safetensors", adapter, "diffusers")
        load_lora(dit, path, strength)
        changed = merged(weights, adapter, strength=strength)
        expected = {name: expected[name] + changed[name] - weights[name] for name in weights}
    assert relative_error(dit(*INPUTS), with_weights(dit, expected)(*INPUTS)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_and_removal_leave_no_trace(tmp_path, dtype):
    dit = AsymmDiT(DIT, dtype=dtype)
    dit.load_state_dict(random_dit().state_dict())
    before, weights = dit(*INPUTS), {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    modules = [name for name, _ in dit.named_modules()]
    adapter, changes = random_adapter(weights, dora=True), random_changes(weights, "bias", "norm_x.weight")
    path = write_adapter(tmp_path / "a.safetensors", adapter, "comfyui", changes=changes)
    lora, other = load_lora(dit, path, 0), load_lora(dit, path, 0.7)
    with_other = dit(*INPUTS)
    assert not torch.equal(with_other, before)
    other.strength = 0
    assert torch.equal(dit(*INPUTS), before)
    other.strength = 0.7
    assert torch.equal(dit(*INPUTS), with_other)
    other.remove()
    assert torch.equal(dit(*INPUTS), before)
    lora.strength = 0.7
    assert torch.equal(dit(*INPUTS), with_other)
    lora.remove()
    assert torch.equal(dit(*INPUTS), before)
    assert [name for name, _ in dit.named_modules()] == modules
    for name, tensor in dit.state_dict().items():
        assert torch.equal(tensor, weights[name])


def dense_weights(dit):
    """The weights that a denoiser's layers compute with, quantised or not."""
    layers = {name: layer for name, layer in dit.named_modules() if isinstance(layer, QuantizedLinear)}
    return dict(dit.named_parameters()) | {f"{name}.weight": layer.dequantized() for name, layer in layers.items()}


@pytest.mark.parametrize("quantize", ["fp8", "int8", "q4_0"])
def test_quantised_denoisers(dit, tmp_path, quantize):
    save_file(dit.state_dict(), tmp_path / "dit.safetensors")
    quantised = load_transformer(tmp_path / "dit.safetensors", torch.float32, quantize=quantize)
    before, weights = quantised(*INPUTS), dense_weights(quantised)
    assert any(isinstance(layer, QuantizedLinear) for layer in quantised.modules())
    for dora in (False, True):
        adapter = random_adapter(weights, dora=dora)
        path = write_adapter(tmp_path / "a.safetensors", adapter, "kohya")
        assert_changes_like(quantised, path, merged(weights, adapter)).remove()
        assert torch.equal(quantised(*INPUTS), before)


def test_it_is_not_saved_and_moves_with_the_denoiser(dit, tmp_path):
    names = dit.state_dict().keys()
    path = write_adapter(tmp_path / "a.safetensors", random_adapter(own_names(dit), dora=True), "comfyui")
    load_lora(dit, path)
    assert dit.state_dict().keys() == names
    moved = dit.to("meta", torch.float16)
    assert all((b.device.type, b.dtype) == ("meta", torch.float16) for b in moved.buffers())


def test_whole_schedules_and_empty_prompts(dit, tmp_path):
    weights = own_names(dit)
    adapter = random_adapter(weights)
    other = with_weights(dit, merged(weights, adapter))
    load_lora(dit, write_adapter(tmp_path / "a.safetensors", adapter, "comfyui"))
    latents, sigma, embeds, mask = inputs([0])
    assert relative_error(dit(latents, sigma, embeds, mask), other(latents, sigma, embeds, mask)) <= 1e-5
    pooled = dit.prepare_text(*INPUTS[2:]).pooled
    sigmas = torch.tensor([1.0, 0.4, 0.1])
    ours, theirs = (model.schedule_modulation(sigmas, pooled).levels for model in (dit, other))
    assert relative_error(ours.final, theirs.final) <= 1e-4
    for pair, expected in zip(ours.blocks, theirs.blocks, strict=True):
        torch.testing.assert_close(pair, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
def test_compiled(dit, tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", random_adapter(own_names(dit), dora=True), "comfyui")
    plain = random_dit()
    loras = [load_lora(model, path) for model in (dit, plain)]
    dit.blocks[0].compile(backend="aot_eager", fullgraph=True)
    for strength in (1.0, 0.5, 0.0):
        for lora in loras:
            lora.strength = strength
        torch.testing.assert_close(dit(*INPUTS), plain(*INPUTS), rtol=1e-5, atol=1e-5)


def test_names_without_a_place_are_reported(dit, tmp_path):
    weights = own_names(dit)
    adapter = random_adapter(weights, "qkv_x")
    strays = random_adapter({"blocks.7.attn.qkv_x.weight": torch.zeros(4, 4)})
    path = write_adapter(tmp_path / "a.safetensors", adapter | strays, "genmo")
    with pytest.warns(
        UserWarning,
        match=r"a.safetensors: Mochi has no layers for 1 of its names, which are ignored: blocks.7.attn.qkv_x",
    ):
        load_lora(dit, path)
    assert relative_error(dit(*INPUTS), with_weights(dit, merged(weights, adapter))(*INPUTS)) <= 1e-5


def refusal(dit, path):
    before = dit(*INPUTS)
    with pytest.raises(ValueError, match=path.name) as error:
        load_lora(dit, path)
    assert torch.equal(dit(*INPUTS), before)
    return str(error.value)


@pytest.mark.parametrize(
    ("names", "phrase"),
    [
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA for FLUX or HunyuanVideo"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA for FLUX or SD3"),
        (["diffusion_model.blocks.0.cross_attn.k.lora_A.weight"], "a LoRA for Wan"),
        (["lora_unet_blocks_0_self_attn_k.lora_down.weight"], "a LoRA for Wan"),
        (["transformer.transformer_blocks.0.attn2.to_k.lora_A.weight"], "a LoRA for LTX"),
        (["lora_unet_down_blocks_0_x.lora_down.weight"], "a LoRA for Stable Diffusion"),
        (["lora_te_text_model_encoder_layers_0_x.lora_down.weight"], "a LoRA for a text encoder"),
        (["lora_unet_blocks_0_attn_qkv_x.hada_w1_a", "lora_unet_blocks_0_attn_qkv_x.alpha"], "a LoHa, LoKr or OFT"),
        (["something.lora_A.weight"], "a LoRA for another model"),
        (["t5_yproj.weight", "blocks.0.attn.qkv_x.weight"], "a Mochi transformer"),
        (["decoder.mid.block_1.conv1.weight"], "an image autoencoder"),
    ],
)
def test_other_files_are_told_apart(dit, tmp_path, names, phrase):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    message = refusal(dit, path)
    assert f"holds {phrase}" in message
    assert names[0].split(".lora_")[0] in message


def test_misfits_name_the_layer_and_both_shapes(dit, tmp_path):
    adapter = random_adapter({"transformer_blocks.0.ff.net.2.weight": torch.zeros(8, 32)})
    flux = random_adapter({"single_transformer_blocks.0.attn.to_q.weight": torch.zeros(8, 8)})
    message = refusal(dit, write_adapter(tmp_path / "x.safetensors", adapter | flux, "diffusers"))
    for part in ("transformer_blocks.0.ff.net.2", "(8, 4) by (4, 32)", "(96, 256)", "a LoRA for FLUX"):
        assert part in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.attn.qkv_x.lora_B"), "only one half of blocks.0.attn.qkv_x"),
        (lambda t: t.update({"blocks.0.attn.qkv_x.lora_B": torch.zeros(288, 3)}), r"(288, 3) by (4, 96)"),
        (lambda t: t.update({"blocks.0.attn.qkv_x.lora_A": torch.zeros(4)}), r"by (4,)"),
        (lambda t: t.update({"blocks.0.attn.qkv_x.lora_A": torch.tensor(1.0)}), r"by ()"),
        (lambda t: t.update({name: tensor[:0, :0] for name, tensor in t.items()}), r"(0, 0) by (0, 0)"),
        (lambda t: t.update({"blocks.0.attn.qkv_x.lora_A": torch.full((4, 96), torch.nan)}), "NaN or infinite"),
        (lambda t: t.update({"blocks.0.attn.qkv_x.alpha": torch.ones(2)}), "must have one"),
        (lambda t: t.update({"blocks.0.attn.qkv_x.alpha": torch.tensor(torch.inf)}), "NaN or infinite"),
        (lambda t: t.update({"blocks.0.attn.qkv_x.dora_scale": torch.ones(1, 96)}), "per-column scales"),
        (
            lambda t: t.update({"blocks.0.attn.qkv_x.lora_A": torch.ones(4, 96).long()}),
            "has int64 values in blocks.0.attn.qkv_x",
        ),
        (lambda t: t.update({"blocks.0.attn.qkv_x.alpha": torch.tensor(True)}), "has bool for the alpha of blocks.0"),
        (lambda t: t.update({"blocks.0.attn.qkv_x.diff": torch.ones(288, 96)}), "changes blocks.0.attn.qkv_x twice"),
        (lambda t: t.update({"final_layer.linear.diff_b": torch.ones(3)}), "the change of final_layer.linear is (3,)"),
        (
            lambda t: t.update({"final_layer.linear.diff_b": torch.ones(48).bool()}),
            "has bool values in final_layer.linear",
        ),
        (
            lambda t: t.update({f"diffusion_model.{name}.weight": tensor for name, tensor in t.items()}),
            "changes blocks.0.attn.qkv_x twice",
        ),
    ],
)
def test_damaged_files(dit, tmp_path, change, message):
    tensors = {"blocks.0.attn.qkv_x.lora_A": torch.zeros(4, 96), "blocks.0.attn.qkv_x.lora_B": torch.zeros(288, 4)}
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    assert message in refusal(dit, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "notes",
    [
        {"kwargs": "{'rank': 4}"},
        {"kwargs": "[1]"},
        {"kwargs": '{"qkv_proj_lora_alpha": "much"}'},
        {"lora_adapter_metadata": '{"transformer.alpha_pattern": 3}'},
        {"lora_adapter_metadata": '{"transformer.lora_alpha": [1]}'},
        {"kwargs": f'{{"qkv_proj_lora_alpha": 1{400 * "0"}}}'},
        {"kwargs": 100_000 * "["},
    ],
)
def test_notes_that_make_no_sense(dit, tmp_path, notes):
    tensors = {"blocks.0.attn.qkv_x.lora_A": torch.zeros(4, 96), "blocks.0.attn.qkv_x.lora_B": torch.zeros(288, 4)}
    save_file(tensors, tmp_path / "x.safetensors", notes)
    assert "invalid metadata about its alpha" in refusal(dit, tmp_path / "x.safetensors")


@pytest.mark.parametrize("alpha", ["NaN", "1e999"])
def test_alphas_that_are_no_numbers(dit, tmp_path, alpha):
    tensors = {"blocks.0.attn.qkv_x.lora_A": torch.zeros(4, 96), "blocks.0.attn.qkv_x.lora_B": torch.zeros(288, 4)}
    save_file(tensors, tmp_path / "x.safetensors", {"kwargs": f'{{"qkv_proj_lora_alpha": {alpha}}}'})
    assert "NaN or infinite values in blocks.0.attn.qkv_x" in refusal(dit, tmp_path / "x.safetensors")


def test_torch_files(dit, tmp_path):
    weights = own_names(dit)
    adapter = random_adapter(weights, *ATTENTION)
    tensors = {}
    for layer, factors in adapter.items():
        tensors |= {f"{layer}.lora_A": factors.down, f"{layer}.lora_B": factors.up}
    torch.save(tensors, tmp_path / "a.pt")
    assert_changes_like(dit, tmp_path / "a.pt", merged(weights, adapter))


def test_file_may_be_written_again(dit, tmp_path):
    weights = own_names(dit)
    path = write_adapter(tmp_path / "a.safetensors", random_adapter(weights), "comfyui")
    load_lora(dit, path)
    before = dit(*INPUTS)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(dit(*INPUTS), before)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strength_is_a_number(dit, tmp_path, strength):
    path = write_adapter(tmp_path / "a.safetensors", random_adapter(own_names(dit), "qkv_x"), "genmo")
    with pytest.raises(ValueError, match="must be finite"):
        load_lora(dit, path, strength)
    lora = load_lora(dit, path, 0)
    with pytest.raises(ValueError, match="must be finite"):
        lora.strength = strength


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        (str(PureWindowsPath("C:/loras/a.safetensors")), ("C:\\loras\\a.safetensors", 1.0)),
        (str(PureWindowsPath("C:/loras/a.safetensors")) + ":0.5", ("C:\\loras\\a.safetensors", 0.5)),
        ("12", ("12", 1.0)),
    ],
)
def test_command_line_option(text, expected):
    assert lora_option(text) == expected


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf"])
def test_a_strength_is_finite(strength):
    with pytest.raises(argparse.ArgumentTypeError, match=f"a.safetensors:{strength} has a non-finite strength"):
        lora_option(f"a.safetensors:{strength}")


def test_fused_loras_change_the_weights(tmp_path):
    """A DoRA, a LoRA and changes of whole parameters, all relative to the denoiser's original weights."""
    dit = random_dit()
    weights = {name: weight.clone() for name, weight in dit.state_dict().items()}
    layer = dit.get_submodule("blocks.0.attn.qkv_x")
    for name, dora in (("a", False), ("b", True)):
        adapter = random_adapter(weights, "attn.qkv_x", seed=int(dora), dora=dora)
        load_lora(dit, write_adapter(tmp_path / f"{name}.safetensors", adapter, "kohya"), 0.7)
    whole = {"blocks.0.attn.qkv_x.weight", "blocks.1.attn.q_norm_x.weight", "final_layer.linear.bias"}
    diffs = {name.replace(".weight", ".diff").replace(".bias", ".diff_b"): weights[name] * 0.1 for name in whole}
    save_file(diffs, tmp_path / "c.safetensors")
    last = load_lora(dit, tmp_path / "c.safetensors")
    x = torch.randn(5, layer.in_features)
    beside = layer(x)
    fuse_loras(dit)
    torch.testing.assert_close(layer(x), beside, rtol=1e-4, atol=1e-4)
    last.strength = 0.5  # of a LoRA that has been fused
    last.remove()
    torch.testing.assert_close(layer(x), beside, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dit.final_layer.linear.bias, weights["final_layer.linear.bias"] * 1.1)
    assert dit.state_dict().keys() == weights.keys()
    changed = {name for name, weight in dit.state_dict().items() if not torch.equal(weight, weights[name])}
    assert changed == whole | {name for name in weights if name.endswith("attn.qkv_x.weight")}


def test_what_was_fused_stays_under_later_loras(dit, tmp_path):
    name = "final_layer.linear.bias"
    original = dit.state_dict()[name].clone()
    path = write_adapter(tmp_path / "a.safetensors", {}, "comfyui", changes={name: torch.full_like(original, 0.5)})
    fused = load_lora(dit, path)
    fuse_loras(dit)
    load_lora(dit, path, 2.0)
    fused.strength = 0.25
    assert torch.equal(dit.state_dict()[name], original + 0.5 + 1.0)


def test_a_lora_that_fails_halfway_leaves_nothing(dit, tmp_path):
    before, weights = dit(*INPUTS), own_names(dit)
    adapter = random_adapter(weights | {"x_embedder.proj.weight": weights["x_embedder.proj.weight"].flatten(1)})
    path = write_adapter(tmp_path / "a.safetensors", adapter, "comfyui", changes=random_changes(weights, "bias"))
    deltas = read_lora(path, dit.config).deltas
    last = next(delta for delta in deltas if isinstance(delta, LoraDelta) and delta.layer == "x_embedder.proj")
    deltas = [delta for delta in deltas if delta is not last]
    with pytest.raises(RuntimeError, match="shape"):
        Lora(dit, [*deltas, replace(last, down=last.down[:1])], 1.0)
    with pytest.raises(ValueError, match="must be finite"):
        Lora(dit, [*deltas, last], float("nan"))
    assert not [module for module in dit.modules() if hasattr(module, "lora")]
    assert torch.equal(dit(*INPUTS), before)
    load_lora(dit, path).remove()
    assert torch.equal(dit(*INPUTS), before)


def test_what_is_quantised_is_not_fused(tmp_path):
    save_file(random_dit().state_dict(), tmp_path / "dit.safetensors")
    dit = load_transformer(tmp_path / "dit.safetensors", quantize="int8")
    lora = load_lora(
        dit, write_adapter(tmp_path / "a.safetensors", random_adapter(random_dit().state_dict()), "comfyui")
    )
    with pytest.raises(
        ValueError, match="is quantised, so a LoRA cannot be fused into it; use the LoRA without fusing"
    ):
        fuse_loras(dit)
    lora.remove()
    assert not [module for module in dit.modules() if hasattr(module, "lora")]
