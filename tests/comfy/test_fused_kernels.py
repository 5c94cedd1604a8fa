"""Other nodes' block replacement and attention patches with fused kernels, on a simulated GPU in a ComfyUI process."""

import json

import pytest

from tests.harness.comfy_process import run_in_comfyui

SCRIPT = """
import json
sys.path.insert(0, root)
# The pack's core under the name by which the benchmarks import it: a second one would have operators of its own.
sys.modules |= {name.removeprefix("pack."): sys.modules[name] for name in [*sys.modules] if name.startswith("pack.mochi_core")}
import comfy.ops
from benchmarks.simulated_gpu import GpuCounter, simulated_gpu, text_of_lengths, using
from pack.mochi_core import AsymmDiTConfig
from pack.nodes.bridge.model import HostAsymmDiT
from pack.nodes.bridge.prepared import Conditioning

seen = set()

def replace(args, extra):
    seen.add(("replaced", args["img"].device.type, args["transformer_options"]["block_index"]))
    return extra["original_block"](args)

def after_attention(out, options):
    start, end = options["img_slice"]
    seen.add(("attention", out.device.type, end - start))
    return out

def after_block(args):
    seen.add(("block", args["img"].device.type, args["block_index"]))
    return {"img": args["img"], "txt": args["txt"]}

NODES = {
    "plain": {},
    "replaced": {"patches_replace": {"dit": {("double_block", 0): replace}}},
    "patched": {"patches": {"attn1_output_patch": [after_attention], "double_block": [after_block]}},
}
found = {}
with simulated_gpu():
    network = HostAsymmDiT(AsymmDiTConfig(depth=2), torch.bfloat16, "cuda", comfy.ops.disable_weight_init)
    x, text = torch.empty(1, 12, 2, 16, 24, device="cuda", dtype=torch.bfloat16), text_of_lengths(network, 9)
    ready = Conditioning(text, network.modulation(torch.ones(1, device="cuda"), text.pooled), network.rope(x.shape, x.device))
    for kernels in ("triton", "plain"):
        for name, options in NODES.items():
            options = {**options, "optimized_attention_override": lambda _, q, *rest, **named: torch.empty_like(q)}
            with using(kernels), GpuCounter() as counted:
                out = network._forward(x, ready, options)
            assert (out.shape, out.device.type) == (x.shape, "cuda")
            ours = {operator: moved for operator, moved in counted.moved.items() if operator.startswith("mochi.")}
            found[f"{kernels} {name}"] = ours, counted.starts, counted.waits
print(json.dumps([found, sorted(seen)]))
"""


@pytest.fixture(scope="module")
def counted(comfy_path):
    return json.loads(run_in_comfyui(comfy_path, SCRIPT).stdout.splitlines()[-1])


def test_nodes_were_called_on_the_device(counted):
    """Called for their own blocks, with 192 visual tokens before the text tokens."""
    assert counted[1] == [
        ["attention", "cuda", 192], ["block", "cuda", 0], ["block", "cuda", 1], ["replaced", "cuda", 0]
    ]  # fmt: skip


@pytest.mark.parametrize("nodes", ["replaced", "patched"])
def test_blocks_keep_their_kernels_and_wait_for_nothing(counted, nodes):
    plain, with_nodes = counted[0]["triton plain"], counted[0][f"triton {nodes}"]
    assert with_nodes == plain
    assert {name.split(".")[1] for name in plain[0]} == {
        "modulated_norm", "joint_heads", "gated_residual_norm", "gated_residual", "swiglu", "final_norm"
    }  # fmt: skip
    assert plain[2] == []
    without = counted[0][f"plain {nodes}"]
    assert (without[0], without[2]) == ({}, [])
    assert without[1] > 2 * plain[1]
