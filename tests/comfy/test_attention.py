"""The attention of a MODEL: which function is really called, in a ComfyUI process and in a real server."""

import pytest
import torch
from safetensors.torch import load_file

from tests.harness.comfy_process import run_in_comfyui
from tests.harness.graphs import MODEL, SAMPLER, node, upto_sampler

FILE = "mochi_preview_bf16.safetensors"
SCRIPT = """
import comfy.ldm.modules.attention as host
from pack.nodes.bridge.model import load_model

def attending(model):
    "Whether the host's function ran, how often the override of another pack did, and the velocity."
    ran, plain = [], host.optimized_attention.__wrapped__

    def counted(*arguments, **named):
        ran.append("host")
        return plain(*arguments, **named)

    def another(function, *arguments, **named):
        ran.append("another")
        return function(*arguments, **named)

    options = model.model_options["transformer_options"]
    if "another" in options:
        options = {**options, "optimized_attention_override": another}
    whole, host.optimized_attention = host.optimized_attention, host.wrap_attn(counted)
    generator = torch.Generator().manual_seed(1)
    latents, embeds = torch.randn(2, 12, 2, 8, 8, generator=generator), torch.randn(2, 16, 64, generator=generator)
    mask = torch.arange(16) < torch.tensor([[9], [4]])
    with torch.inference_mode():
        out = model.model.diffusion_model(
            latents, torch.tensor([0.6, 0.6]), embeds, mask, transformer_options=dict(options)
        )
    host.optimized_attention = whole
    return sorted(set(ran)), out

path, result = arguments
out = {}
for name in ("auto", "host", "flash", "math", "another"):
    model = load_model(path, torch.float32, None, "flash" if name == "another" else name)
    assert model.cached_patcher_init[0](*model.cached_patcher_init[1]) is not None
    clone = model.clone()
    if name == "another":
        clone.model_options["transformer_options"]["another"] = True
    ran, out[name] = attending(clone)
    print(name, *ran)

# A node that attends by itself, in the host's other layout and with a mask, gets what it asks for.
override = load_model(path, None, None, "math").model_options["transformer_options"]["optimized_attention_override"]
q, mask = torch.randn(1, 5, 96), torch.tensor([[0.0, 0, 0, float("-inf"), float("-inf")]])
theirs = host.attention_pytorch(q, q, q, 3, mask=mask)
ours = host.attention_pytorch(q, q, q, 3, mask=mask, transformer_options={"optimized_attention_override": override})
assert torch.equal(theirs, ours)
heads = torch.randn(1, 3, 5, 32)
shapes = {"skip_reshape": True, "skip_output_reshape": True}
masked = [
    host.attention_pytorch(heads, heads, heads, 3, mask, **shapes, transformer_options=options)
    for options in ({}, {"optimized_attention_override": override})
]
assert torch.equal(*masked)
save_file(out, result)
"""


def test_who_attends(comfy_path, comfy_server, tmp_path):
    result = tmp_path / "out.safetensors"
    file = comfy_server.base / "models" / "diffusion_models" / FILE
    lines = run_in_comfyui(comfy_path, SCRIPT, file, result).stdout.splitlines()
    assert lines == ["auto", "host host", "flash", "math", "another another host"]
    out = load_file(result)
    for name, velocity in out.items():
        torch.testing.assert_close(velocity, out["host"], rtol=1e-4, atol=1e-4, msg=name)


def test_the_choice_of_a_loader(said, latents_of):
    graph = upto_sampler()
    for name in ("host", "math"):
        graph[name] = node("Mochi1LoadTransformer", model_name=FILE, weight_dtype="auto", attention=name)
        graph[f"{name} sampled"] = node("Mochi1Sampler", **{**graph[SAMPLER]["inputs"], "model": [name, 0]})
    del graph[MODEL]["inputs"]["attention"]  # as in graphs made before the input existed
    auto, *others = latents_of(graph, [SAMPLER, 0], ["host sampled", 0], ["math sampled", 0])
    for latents in others:
        torch.testing.assert_close(latents, auto, rtol=1e-3, atol=1e-3)
    lines = said({"load": node("Mochi1LoadTransformer", model_name=FILE, weight_dtype="bf16", attention="host"),
                  "see": node("PreviewAny", source=["load", 0])})  # fmt: skip
    assert any(line.endswith("attention sub_quad (the server's).") for line in lines)


@pytest.mark.parametrize("name", ["cudnn", "sage"])
def test_what_cannot_be_used_is_an_error_that_says_why(comfy_client, name):
    graph = upto_sampler()
    graph[MODEL]["inputs"]["attention"] = name
    graph["save"] = node("SaveLatent", samples=[SAMPLER, 0], filename_prefix="t")
    run = comfy_client.run(graph)
    assert run.outcome == "execution_error"
    assert f"Attention {name} cannot be used: " in run.error
    assert "flash: can be used" in run.error
