"""Loading needs memory for the model and one tensor; a forward, a decode and an encode hold only what they need."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mochi_core import AsymmVAE
from tests.harness.memory import SLACK, in_a_process, needs_proc, write_large

pytestmark = pytest.mark.slow


@needs_proc
@pytest.mark.parametrize("layout", ["canonical", "diffusers"])
def test_loading_in_another_dtype_on_a_device(tmp_path, layout):
    path, size, largest = write_large(tmp_path, layout)
    assert largest > 50e6
    code = """
empty_transformer(open_part(sys.argv[1], "transformer"))  # libraries are there
_, peak, _ = peak_of(lambda: load_transformer(sys.argv[1], torch.float32, torch.device("cpu")))
print(peak)
"""
    assert size <= in_a_process(code, path) < size + largest + SLACK


@needs_proc
@pytest.mark.parametrize("conditions", [1, 2])
def test_a_forward_of_163_frames_holds_less_than_eight_residual_streams(conditions):
    """At the released width in bf16 these are 2 GiB; here all is an eighth as wide, in float32, which is fast on every CPU.

    A second condition adds its own stream.
    """
    code = """
import torch
from mochi_core import AsymmDiT, AsymmDiTConfig
config = AsymmDiTConfig(
    depth=1, hidden_size_x=384, hidden_size_y=192, num_heads=3, text_width=64, mlp_size_x=1024, mlp_size_y=512)
dit = AsymmDiT(config).requires_grad_(False)
for parameter in dit.parameters():
    parameter.fill_(0.01)
latents, count = torch.zeros(1, 12, 28, 60, 106), int(sys.argv[1])
def forward():
    text = dit.prepare_text(torch.ones(1, 256, 64), torch.ones(1, 256, dtype=torch.bool))
    condition = text, dit.modulation(torch.ones(1), text.pooled)
    rope = dit.rope(latents.shape, latents.device)
    # As kernels of attention do, it holds nothing but its output; 44,520 tokens would take too long here.
    dit.denoise_each(latents, [condition] * count, rope, attend=lambda q, k, v: q + v)
_, peak, _ = peak_of(forward)
print(peak / (44520 * 384 * 4))
"""
    streams = in_a_process(code, conditions)
    print(f"{conditions} conditions: {streams:.2f} residual streams")
    assert conditions + 5 < streams < conditions + 6.8


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors made within it; memory that the allocator keeps is not counted."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(out) if torch.is_tensor(tensor)):
            if id(storage) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, id(storage))
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize(
    ("half", "shape", "most"),
    [("decode", (12, 1, 16, 16), 140), ("encode", (3, 7, 64, 64), 23)],
    ids=["decode", "encode"],
)
def test_what_the_autoencoder_holds_on_a_cpu(monkeypatch, half, shape, most):
    """In MiB, at the released size in bf16; counted, because a process's memory depends on the allocator."""
    monkeypatch.setattr("mochi_core.autoencoder.model.latents_problem", lambda *_: None)  # it reads values
    with FakeTensorMode(), torch.no_grad():
        vae = AsymmVAE(dtype=torch.bfloat16)
        with LiveBytes() as live:
            getattr(vae, half)(torch.empty(1, *shape), 2**30)
    print(f"{live.peak / 2**20:.1f} MiB")
    assert 0.9 * most < live.peak / 2**20 < most
