"""ComfyUI's own loader and ours on the same scaled fp8 file, in a ComfyUI process.

ComfyUI's class only supports the released width, and its loader the released depth; code makes it less deep.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import AsymmDiTConfig
from mochi_core.__main__ import main
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.numbers import relative_error
from tests.harness.quantized_files import legacy_scaled_fp8
from tests.harness.tiny_models import cast, random_dit

CONFIG = AsymmDiTConfig(depth=1)
SCRIPT = """
import comfy.model_detection, comfy.model_management, comfy.sample
from comfy.quant_ops import QuantizedTensor
from pack.nodes.bridge.model import load_model
from pack.nodes.bridge.sampling import sample

detect = comfy.model_detection.detect_unet_config
comfy.model_detection.detect_unet_config = lambda *args, **kwargs: {**detect(*args, **kwargs), "depth": 1}
path, result = arguments
generator = torch.Generator().manual_seed(0)
noise, embeds = (torch.randn(shape, generator=generator) for shape in ((1, 12, 2, 8, 8), (1, 20, 4096)))
# All tokens count: of shorter prompts, the stock model reads the padding.
prompt = [[embeds, {"attention_mask": torch.ones(1, 20, dtype=torch.long)}]]
out = {}
for name, load in (("stock", comfy.sd.load_diffusion_model), ("ours", load_model)):
    patcher = load(path)
    blocks = patcher.model.diffusion_model.blocks.parameters()
    out[f"{name} quantised"] = torch.tensor(sum(isinstance(p.data, QuantizedTensor) for p in blocks))
    arguments = (1, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(noise))
    out[name] = comfy.sample.sample(patcher, noise, *arguments, denoise=1.0)
    rising = torch.tensor([0.0001, 0.5, 1.0])
    out[f"{name} inverted"] = sample(patcher, prompt, prompt, {"samples": noise}, rising, 1.0, 0)["samples"]
save_file(out, result)
"""


@pytest.fixture(scope="module")
def weights():
    return random_dit(CONFIG).state_dict()


@pytest.mark.parametrize("generation", ["older", "newer"])
def test_same_latents_from_the_same_scaled_fp8_file(comfy_path, tmp_path, weights, generation):
    path, result = tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"
    if generation == "older":
        legacy_scaled_fp8(weights, path)
    else:
        save_file(cast(weights, torch.bfloat16), tmp_path / "bf16.safetensors")
        arguments = (tmp_path / "bf16.safetensors", path, "--to", "canonical", "--dtype", "fp8_scaled")
        assert main(["convert", *map(str, arguments)]) == 0
    done = run_in_comfyui(comfy_path, SCRIPT, path, result)
    out = load_file(result)
    assert out["ours quantised"] == out["stock quantised"] == 7
    assert relative_error(out["ours"], out["stock"]) < 1e-5
    # The host alone would divide by zero at noise level 1.
    assert relative_error(out["ours inverted"], out["stock inverted"]) < 1e-3
    for complaint in ("missing", "unexpected", "left over"):
        assert complaint not in done.stderr
