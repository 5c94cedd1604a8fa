"""Files that `convert` writes, in ComfyUI's own loaders, in a ComfyUI process."""

import json

import torch

from mochi_core import AsymmDiT
from mochi_core.checkpoints.convert import plan_conversion
from mochi_core.checkpoints.formats.writer import layout
from mochi_core.checkpoints.names.quantized import NOTE
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.memory import write_sparse

SCRIPT = """
import json
from comfy.quant_ops import QuantizedTensor

network = comfy.sd.load_diffusion_model(*arguments).model.diffusion_model
quantized = [name for name, p in network.named_parameters() if isinstance(p.data, QuantizedTensor)]
print(json.dumps([type(network).__name__, len(network.blocks), quantized]))
"""


def write_full_size_fp8(folder):
    """Write all names, shapes and notes of the released model after `convert --dtype fp8_scaled`, with weights of zero."""
    with torch.device("meta"):
        whole = write_sparse(folder / "bf16.safetensors", AsymmDiT().state_dict())
    plan = plan_conversion([whole], "canonical", "fp8_scaled")
    header, places = layout(plan.tensors, plan.metadata)
    path = folder / "fp8.safetensors"
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in plan.tensors.items():
            if name.endswith(NOTE):
                file.seek(len(header) + places[name])
                file.write(bytes(tensor.read().tolist()))
        file.truncate(len(header) + sum(tensor.num_bytes for tensor in plan.tensors.values()))
    return path, {name for name, tensor in plan.tensors.items() if tensor.dtype == torch.float8_e4m3fn}


def test_comfyuis_own_loader_takes_a_full_size_fp8_file(comfy_path, tmp_path):
    path, quantized = write_full_size_fp8(tmp_path)
    assert 10.0e9 < path.stat().st_size < 10.5e9
    done = run_in_comfyui(comfy_path, SCRIPT, path)
    kind, depth, theirs = json.loads(done.stdout.splitlines()[-1])
    assert (kind, depth) == ("AsymmDiTJoint", 48)
    assert set(theirs) == quantized
    for complaint in ("missing", "unexpected", "left over"):
        assert complaint not in done.stderr
