"""Every quantised format in the pack's loaders, in a ComfyUI process: weights stay as they are, results agree.

One process loads all files; the tests compare its results.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import load_text_encoder, load_transformer, load_vae
from tests.harness import trained
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.formats import FORMATS, T5_FORMS, VAE_FORMS, WIDE, file_name, passes, shallow_t5
from tests.harness.numbers import relative_error
from tests.harness.random_inputs import velocity
from tests.harness.tiny_models import random_dit, random_vae

SCRIPT = '''
import json
import comfy.model_management
from comfy_extras.nodes_model_merging import CLIPSave
from pathlib import Path
from pack.mochi_core.checkpoints import open_checkpoint
from pack.mochi_core.checkpoints.names.quantized import gather_quantized
from pack.nodes.bridge.model import load_model
from pack.nodes.bridge.quantized import read_part
from pack.nodes.bridge.text import encode_prompt, load_clip
from pack.nodes.bridge.vae import load_vae

def velocity(patcher, resident=None):
    """With `resident` bytes allowed on the device, the rest is cast and patched layer by layer, as on a small card."""
    if resident is None:
        comfy.model_management.load_models_gpu([patcher])
    else:
        patcher.patch_model(patcher.load_device, lowvram_model_memory=resident)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 12, 2, 8, 8, generator=generator)
    embeds = torch.randn(1, 16, 256, generator=generator)
    dit = patcher.model.diffusion_model
    with torch.inference_mode():
        return -dit(latents, torch.tensor([0.6]), embeds, (torch.arange(16) < 9)[None])

def matrices(patcher):
    return [getattr(p, "_qdata", p).clone() for p in patcher.model.diffusion_model.blocks.parameters() if p.ndim == 2]

def same(weights, others):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(weights, others, strict=True))

torch.inference_mode().__enter__()  # as nodes run
folder, results = Path(*arguments), {}
lora = load_file(folder / "lora.safetensors")
for path in sorted(folder.glob("dit/*")):
    patcher = load_model(str(path))
    results[f"{path.stem}/velocity"], before = velocity(patcher), matrices(patcher)
    results[f"{path.stem}/bytes"] = torch.tensor(sum(w.nbytes for w in before))
    comfy.sd.save_checkpoint(str(folder / "saved.safetensors"), patcher)
    again = load_model(str(folder / "saved.safetensors"))
    results[f"{path.stem}/saved"] = torch.tensor(same(before, matrices(again)))
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    results[f"{path.stem}/with LoRA"] = velocity(patched)
    patched.detach()
    results[f"{path.stem}/offloaded with LoRA"] = velocity(patched, resident=1)
    assert patched.model.model_lowvram
    patched.detach()
    velocity(patcher)
    results[f"{path.stem}/restored"] = torch.tensor(same(before, matrices(patcher)))
for kind in ("fp8", "int8", "q4_0"):
    patcher = load_model(str(folder / "plain.safetensors"), None, kind)
    results[f"{kind}/velocity"] = velocity(patcher)
for path in sorted(folder.glob("t5/*")):
    clip = load_clip(str(path))
    results[f"{path.stem}/text"] = encode_prompt(clip, "a red kite")[0][0]
    if path.stem in ("torch.float16", "scaled fp8", "Q4_0 gguf"):
        save = CLIPSave()
        save.output_dir = str(folder)
        save.save(clip, path.stem)
        clip = load_clip(str(folder / f"{path.stem}_t5xxl_00001_.safetensors"))
        results[f"{path.stem}/saved text"] = encode_prompt(clip, "a red kite")[0][0]
generator = torch.Generator().manual_seed(0)
latents, video = (torch.randn(s, generator=generator) for s in ((1, 12, 2, 2, 4), (1, 3, 7, 16, 16)))
for path in sorted(folder.glob("vae/*")):
    vae = load_vae([str(path)], torch.float32).first_stage_model
    results[f"{path.stem}/decoded"] = vae.decode(latents)
    results[f"{path.stem}/encoded"] = vae.encode(video / 4 + 0.5, torch.device("cpu"))  # it takes pixels from 0 to 1
# What the host's own layouts write, and what they make of it.
from comfy.quant_ops import QuantizedTensor
for kind, layout in (("nvfp4", "TensorCoreNVFP4Layout"), ("mxfp8", "TensorCoreMXFP8Layout")):
    written = QuantizedTensor.from_float(torch.randn(160, 192, generator=generator), layout)
    path = folder / f"{kind} by the host.safetensors"
    note = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    save_file({**written.state_dict("layer.weight"), "layer.comfy_quant": note}, path)
    results[f"{kind}/ours"] = gather_quantized(open_checkpoint(path))["layer.weight"].read()
    results[f"{kind}/host's"] = written.dequantize()
changing = folder / "changing.safetensors"
changing.write_bytes((folder / "plain.safetensors").read_bytes())
tensors = read_part(str(changing), "transformer").tensors
changing.write_bytes(b"")
try:
    tensors["blocks.0.mod_x.weight"].read()
except ValueError as error:
    results["change noticed"] = torch.tensor("changing.safetensors changed while it was being loaded" in str(error))
save_file({name: t.clone().contiguous() for name, t in results.items()}, folder / "results.safetensors")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory, comfy_path):
    folder = tmp_path_factory.mktemp("formats")
    dit, generator = random_dit(WIDE).state_dict(), torch.Generator().manual_seed(5)
    parts = {"dit": (FORMATS, dit), "t5": (T5_FORMS, shallow_t5()), "vae": (VAE_FORMS, random_vae().state_dict())}
    for kind, (forms, tensors) in parts.items():
        (folder / kind).mkdir()
        (folder / f"{kind} meaning").mkdir()
        for form, write in forms.items():
            meaning = write(tensors, folder / kind / file_name(form))
            save_file(meaning, folder / f"{kind} meaning" / f"{form}.safetensors")
    save_file(dit, folder / "plain.safetensors")
    down, up = torch.randn(4, 256, generator=generator), torch.randn(768, 4, generator=generator) * 0.02
    name = "diffusion_model.blocks.0.attn.qkv_x"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, folder / "lora.safetensors")
    (folder / "log.txt").write_text(run_in_comfyui(comfy_path, SCRIPT, folder).stderr)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return load_file(folder / "results.safetensors")


def merged(folder, form):
    """The core's model with the file's dequantised weights, and the LoRA added by hand."""
    tensors, lora = load_file(folder / "dit meaning" / f"{form}.safetensors"), load_file(folder / "lora.safetensors")
    down, up = (lora[f"diffusion_model.blocks.0.attn.qkv_x.lora_{half}.weight"] for half in "AB")
    tensors["blocks.0.attn.qkv_x.weight"] += up @ down
    save_file(tensors, folder / "merged.safetensors")
    return load_transformer(folder / "merged.safetensors", torch.float32)


@pytest.mark.parametrize("form", FORMATS)
def test_transformer_computes_what_the_file_means(folder, results, form):
    expected = velocity(load_transformer(folder / "dit meaning" / f"{form}.safetensors", torch.float32))
    # The host multiplies in int8 unless the file forbids it.
    assert relative_error(results[f"{form}/velocity"], expected) < (0.02 if form == "int8" else 1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_lora_is_applied_and_removed_without_a_trace(folder, results, form):
    """The host requantises fp8 and int8 weights; blocks become a full-precision matrix."""
    expected, before = velocity(merged(folder, form)), results[f"{form}/velocity"]
    effect = relative_error(expected, before)
    assert effect > 0.05
    # If cast layer by layer, a patched weight is never requantised.
    # Without VNNI the host's int8 products saturate.
    assert relative_error(results[f"{form}/offloaded with LoRA"], expected) < (0.06 if form == "int8" else 1e-5)
    requantised = "fp8" in form or "int8" in form
    assert relative_error(results[f"{form}/with LoRA"], expected) < (0.5 * effect if requantised else 1e-5)
    assert results[f"{form}/restored"]


@pytest.mark.parametrize("form", FORMATS)
def test_blocks_stay_in_the_files_form(results, form):
    bits = {
        "MXFP4": 4.3,
        "nf4": 4.6,
        "nvfp4": 4.6,
        "mxfp8": 8.3,
        "fp8": 8,
        "int8": 8,
        "Q4": 4.9,
        "Q5": 6,
        "Q8": 8.5,
        "Q2": 2.7,
        "Q3": 3.5,
        "Q6": 6.6,
        "F": 32,
        "BF16": 32,
    }
    weights = sum(p.numel() for p in random_dit(WIDE).blocks.parameters() if p.ndim == 2)
    allowed = next(bits[key] for key in bits if key in form)
    assert results[f"{form}/bytes"] * 8 / weights < allowed * 1.03


@pytest.mark.parametrize("form", FORMATS)
def test_what_the_host_saves_loads_again(results, form):
    assert results[f"{form}/saved"]


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_what_the_host_quantises_is_read(results, kind):
    assert results[f"{kind}/ours"].shape == (160, 192)
    torch.testing.assert_close(results[f"{kind}/ours"], results[f"{kind}/host's"], rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", ["fp8", "int8", "q4_0"])
def test_quantise_while_loading_equals_the_core(folder, results, kind):
    expected = velocity(load_transformer(folder / "plain.safetensors", torch.float32, quantize=kind))
    assert relative_error(results[f"{kind}/velocity"], expected) < 1e-5


@pytest.mark.parametrize("form", T5_FORMS)
def test_text_encoder_computes_what_the_file_means(folder, results, form):
    meaning = load_text_encoder(folder / "t5 meaning" / f"{form}.safetensors", trained.TOKENIZER)
    embeds, mask = meaning.encode("a red kite")
    assert relative_error(results[f"{form}/text"][mask], embeds[mask]) < 1e-4


@pytest.mark.parametrize("form", ["torch.float16", "scaled fp8", "Q4_0 gguf"])
def test_what_the_hosts_clip_save_writes_loads_again(results, form):
    """With a `logit_scale` next to the encoder."""
    assert torch.equal(results[f"{form}/saved text"], results[f"{form}/text"])


@pytest.mark.parametrize("form", VAE_FORMS)
def test_autoencoder_computes_what_the_file_means(folder, results, form):
    video, latents = passes(load_vae(folder / "vae meaning" / f"{form}.safetensors"))
    assert relative_error(results[f"{form}/decoded"], video) < 1e-5
    assert relative_error(results[f"{form}/encoded"], latents) < 1e-4


def test_a_file_that_changes_while_it_loads(results):
    assert results["change noticed"]


def test_nothing_is_missing_or_left_over(folder):
    log = (folder / "log.txt").read_text()
    assert "missing" not in log.replace("clip missing: ['logit_scale']", "")
    assert "unexpected" not in log
