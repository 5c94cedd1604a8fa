"""T5 Encode on ComfyUI's own Mochi CLIP, in a process of its own: only code can make that one small."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.harness.tiny_models import T5_HEADS, TEXT_WIDTH, random_t5

ROOT = Path(__file__).parents[2]
SCRIPT = """
import importlib.util, sys
comfyui, root, weights, result = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)
from comfy.cli_args import args
args.cpu = True
import comfy.sd, comfy.text_encoders.genmo, comfy.utils, torch
from comfy.supported_models_base import ClipTarget
from safetensors.torch import save_file

spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from pack.nodes.bridge.text import encode_prompt, load_clip

config = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 2 * WIDTH, "num_heads": HEADS}
target = ClipTarget(comfy.text_encoders.genmo.MochiT5Tokenizer, comfy.text_encoders.genmo.mochi_te(torch.float16))
options = {"t5xxl_model_config": config}
stock = comfy.sd.CLIP(target, state_dict=[comfy.utils.load_torch_file(weights)], model_options=options)
long = " ".join(f"w{i}" for i in range(200))
out = {}
for name, clip in (("stock", stock), ("ours", load_clip(weights))):
    for kind, prompt in (("text", "a (blue:1.5) kite"), ("empty", ""), ("long", long)):
        (embeds, extra), = encode_prompt(clip, prompt)
        out[f"{name} {kind}"], out[f"{name} {kind} mask"] = embeds.contiguous(), extra["attention_mask"].contiguous()
save_file(out, result)
"""


def test_stock_clip_and_ours_condition_alike(comfy_path, tmp_path):
    weights, result = tmp_path / "t5.safetensors", tmp_path / "out.safetensors"
    save_file({name: tensor.half() for name, tensor in random_t5().items()}, weights)
    code = SCRIPT.replace("WIDTH", str(TEXT_WIDTH)).replace("HEADS", str(T5_HEADS))
    command = [sys.executable, "-c", code, str(comfy_path), str(ROOT), str(weights), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Mochi reads 256; cut off" in done.stdout + done.stderr
    out = load_file(result)
    for kind, valid in (("text", None), ("empty", 0), ("long", 256)):
        ours, theirs = out[f"ours {kind}"], out[f"stock {kind}"]
        assert ours.shape == (1, 256, TEXT_WIDTH)
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(out[f"ours {kind} mask"], out[f"stock {kind} mask"])
        if valid is not None:
            assert out[f"ours {kind} mask"].sum() == valid
    assert not out["ours empty"].any()
