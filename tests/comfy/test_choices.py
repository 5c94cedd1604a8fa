"""The console says what was chosen for the machine, and why."""

import pytest

from tests.harness.comfy_process import run_in_comfyui
from tests.harness.graphs import DECODE, MODEL, T5, VAE, node, prompt


def test_every_loader_and_the_decoder_say_what_they_chose(said):
    graph = prompt()
    graph[MODEL]["inputs"]["weight_dtype"] = "bf16"
    graph[T5]["inputs"]["dtype"] = "bf16"
    graph[VAE]["inputs"]["dtype"] = "fp32"
    graph[DECODE]["inputs"]["memory"] = 0.25
    lines = said(graph)
    transformer, t5, vae, decode = (
        next(line for line in lines if line.startswith(what)) for what in ("transformer", "T5", "VAE", "decode")
    )
    kernels = "kernels plain (the Triton kernels are for CUDA and ROCm, not for cpu)"
    attention = "attention sdpa (PyTorch's own on cpu; the server's is sub_quad)."
    assert transformer == f"transformer: weights bf16, as requested; arithmetic fp32 on cpu; {kernels}; {attention}"
    assert t5 == "T5: weights bf16, as requested; arithmetic fp32 on cpu."
    assert vae == "VAE: weights fp32, as requested; arithmetic fp32 on cpu."
    assert decode.endswith("0.25 GiB are allowed.")


def test_unasked_the_reason_is_the_file_or_the_device(said, comfy_client):
    # Loaders that have already run are cached, so they get something new to load.
    comfy_client.post("/free", {"unload_models": True, "free_memory": True})
    lines = said({**prompt(), "see": node("PreviewAny", source=["1", 0])})
    assert any(line.startswith("transformer: weights fp32, which suits cpu best;") for line in lines)
    assert any(line.startswith("T5: weights fp16, as in the file;") for line in lines)


CHOICE = """
from pack.nodes.bridge.model import load_model
import comfy.model_management as mm

mm.get_free_memory = lambda *_: 1
model = load_model(arguments[0])
print("optimized_attention_override" in model.model_options["transformer_options"], model.model.get_dtype())
"""


@pytest.mark.parametrize(("flag", "overridden"), [("", True), ("use_quad_cross_attention", False)])
def test_flags_are_obeyed_and_what_does_not_fit_keeps_its_precision(comfy_path, comfy_server, flag, overridden):
    code = f"args.{flag} = True\n{CHOICE}" if flag else CHOICE
    file = comfy_server.base / "models" / "diffusion_models" / "mochi_preview_bf16.safetensors"
    assert run_in_comfyui(comfy_path, code, file).stdout.split() == [str(overridden), "torch.bfloat16"]
