"""fp8_rowwise in ComfyUI: the server samples the same as the core, and patches, offloading and saving work.

One ComfyUI process computes all variants; the tests compare its results.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import MochiPipeline, load_lora, load_text_encoder, load_transformer, load_vae
from tests.harness import trained
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.formats import WIDE, quantized_layers
from tests.harness.graphs import MODEL, POSITIVE, SAMPLER, upto_sampler
from tests.harness.numbers import relative_error
from tests.harness.random_inputs import velocity
from tests.harness.tiny_models import random_dit

# A different last bit, as when a file is mapped elsewhere, can become an fp8 step; altogether 3 to 5 %.
ROUNDING = 0.01
SCRIPT = """
from contextlib import suppress
from pathlib import Path
import comfy.model_management
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from pack.mochi_core.quantization import fp8
from pack.nodes.bridge import model as bridge
from pack.nodes.bridge.lora import add_lora

torch.set_grad_enabled(False)
folder, results = Path(*arguments), {}
said = []
bridge.log_choice = lambda *words: said.append("; ".join(words))

def load(name, kind=None):
    with torch.inference_mode():  # as in a node
        return bridge.load_model(str(folder / name), None, kind)

def velocity(patcher, resident=None, tokens=9):
    "With `resident` bytes allowed on the device, the rest is cast and patched layer by layer, as on a small card."
    patcher.patch_model(patcher.load_device, lowvram_model_memory=resident or 0)
    assert patcher.model.model_lowvram == bool(resident)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 12, 2, 8, 8, generator=generator)
    embeds = torch.randn(1, 16, 256, generator=generator)
    out = patcher.model.apply_model(
        latents, torch.tensor([0.6]), c_crossattn=embeds, attention_mask=(torch.arange(16) < tokens)[None]
    )
    denoised_to_velocity = (out - latents) / 0.6
    patcher.detach()
    return denoised_to_velocity

def weights(patcher):
    return patcher.model.diffusion_model.blocks[0].attn.qkv_x.weight._qdata.clone().view(torch.uint8)

plain = load("plain.safetensors", "fp8_rowwise")
before = weights(plain)
results["loaded"], results["offloaded"] = velocity(plain), velocity(plain, resident=1)
results["no text"] = velocity(plain, tokens=0)
with_lora = add_lora(plain, str(folder / "lora.safetensors"), 1.0)
results["LoRA"], results["LoRA, offloaded"] = velocity(with_lora), velocity(with_lora, resident=1)
small = add_lora(plain, str(folder / "lora.safetensors"), 0.02)
small.patch_model(small.load_device)
changed = small.model.diffusion_model.blocks[0].attn.qkv_x.weight.dequantize()
small.detach()
results["small change"] = changed - plain.model.diffusion_model.blocks[0].attn.qkv_x.weight.dequantize()
results["restored"] = torch.tensor(torch.equal(weights(plain), before))
compiled = plain.clone()
set_torch_compile_wrapper(compiled, "aot_eager", options={"guard_filter_fn": skip_torch_compile_dict}, fullgraph=True)
results["compiled"] = velocity(compiled)
comfy.sd.save_checkpoint(str(folder / "saved.safetensors"), plain)
again = load("saved.safetensors")
results["saved"], results["same weights"] = velocity(again), torch.tensor(torch.equal(weights(again), before))
blocks = load("plain.safetensors", "q4_0").model.diffusion_model.blocks[0].attn.qkv_x
results["bytes in blocks"] = torch.tensor(blocks.weight.nbytes)
fp8._probe = lambda device: f"{device} is too old"
results["refused"] = velocity(load("plain.safetensors", "fp8_rowwise"))
(folder / "said.txt").write_text("\\n".join(said))
save_file({name: t.clone().contiguous() for name, t in results.items()}, folder / "results.safetensors")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, comfy_path):
    folder, generator = tmp_path_factory.mktemp("fp8"), torch.Generator().manual_seed(5)
    save_file(random_dit(WIDE).state_dict(), folder / "plain.safetensors")
    down, up = torch.randn(4, 256, generator=generator), torch.randn(768, 4, generator=generator) * 0.02
    name = "diffusion_model.blocks.0.attn.qkv_x"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, folder / "lora.safetensors")
    run_in_comfyui(comfy_path, SCRIPT, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return load_file(folder / "results.safetensors")


@pytest.fixture(scope="module")
def core(folder):
    return load_transformer(folder / "plain.safetensors", torch.float32, quantize="fp8_rowwise")


@pytest.mark.parametrize("way", ["loaded", "offloaded", "compiled", "saved"])
def test_same_as_the_core(core, results, way):
    expected = velocity(core)
    assert relative_error(velocity(random_dit(WIDE)), expected) > 2 * ROUNDING
    assert relative_error(results[way], expected) < ROUNDING


def test_an_empty_prompt(results):
    assert results["no text"].isfinite().all()
    assert relative_error(results["no text"], results["loaded"]) > 2 * ROUNDING


@pytest.mark.parametrize("way", ["LoRA", "LoRA, offloaded"])
def test_lora_changes_it_as_it_changes_the_core(core, folder, results, way):
    before = velocity(core)
    lora = load_lora(core, folder / "lora.safetensors")
    expected = velocity(core)
    lora.remove()
    assert relative_error(results[way], expected) < 0.3 * relative_error(before, expected)
    assert results["restored"]


def test_small_changes_are_not_lost_to_rounding(folder, results):
    lora = load_file(folder / "lora.safetensors")
    down, up = (lora[f"diffusion_model.blocks.0.attn.qkv_x.lora_{half}.weight"] for half in "AB")
    wanted, got = 0.02 * up @ down, results["small change"]
    assert (got * wanted).sum() / (wanted * wanted).sum() == pytest.approx(1, abs=0.2)


def test_what_the_host_saves_is_the_same_form(folder, core, results):
    assert results["same weights"]
    saved = load_transformer(folder / "saved.safetensors", torch.float32)
    assert quantized_layers(saved) == quantized_layers(core)
    assert relative_error(velocity(saved), velocity(core)) < ROUNDING


def test_blocks_of_4_bits_stay_so_where_nodes_run(results):
    assert results["bytes in blocks"] == 768 * 256 // 32 * 18


def test_a_device_without_fp8_products_dequantizes_the_weights_and_the_console_says_so(folder, results):
    dequantized = load_transformer(folder / "plain.safetensors", torch.float32, quantize="fp8_rowwise")
    for name in quantized_layers(dequantized):
        dequantized.get_submodule(name).fp8_product = False
    assert relative_error(results["refused"], velocity(dequantized)) < 1e-5
    first, *_, last = (folder / "said.txt").read_text().splitlines()
    assert "weights fp8_rowwise, as requested; arithmetic fp32 on cpu, products in fp8;" in first
    assert (
        "arithmetic fp32 on cpu; weights are dequantised, because this device cannot multiply in fp8 (cpu is too old);"
        in last
    )


def test_the_server_samples_what_the_core_does(latents_of, comfy_server):
    """One step without text or guidance: differences in a last bit grow to fp8 steps, with every step of the sampler."""
    graph = upto_sampler(seed=80, steps=1, cfg=1.0)
    graph[MODEL]["inputs"]["weight_dtype"] = "fp8_rowwise"
    graph[POSITIVE]["inputs"]["prompt"] = ""
    (ours,) = latents_of(graph, [SAMPLER, 0])
    models, tokenizer = comfy_server.base / "models", trained.TOKENIZER

    def latents(quantize):
        file = models / "diffusion_models/mochi_preview_bf16.safetensors"
        pipe = MochiPipeline(
            load_transformer(file, torch.float32, quantize=quantize),
            load_vae(models / "vae/mochi_vae.safetensors"),
            load_text_encoder(models / "text_encoders/t5xxl_fp16.safetensors", tokenizer),
        )
        size = {"height": 64, "width": 96, "num_frames": 13, "num_inference_steps": 1}
        return pipe("", **size, guidance_scale=1.0, seed=80, output_type="latent")

    expected = latents("fp8_rowwise")
    assert relative_error(ours, expected) < 0.3 * relative_error(latents(None), expected)
