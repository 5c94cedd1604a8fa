"""Triton kernels: when they are chosen, when they are refused, and builds for every card.

Their results are tested in interpreted_kernels.py, which this module runs.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mochi_core import AsymmDiT, AsymmDiTConfig, kernels
from mochi_core.kernels import choice
from mochi_core.transformer.conditioning import TextConditioning
from mochi_core.transformer.layers import modulated_norm
from tests.harness import triton_builds

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
# Turing, Ampere, Ada, Hopper and Blackwell, of which 86, 89 and 120 are consumer cards; AMD's RX 7900 and MI300.
TARGETS = [("cuda", 75), ("cuda", 80), ("cuda", 86), ("cuda", 89), ("cuda", 90), ("cuda", 100), ("cuda", 120)]
TARGETS += [("hip", "gfx1100"), ("hip", "gfx942")]
WAVES = {"gfx942": 64}  # lanes of a warp, elsewhere 32


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_cpu_takes_plain_kernels():
    assert kernels.chosen(CPU) == "plain"
    assert kernels.reason(CPU) == "the Triton kernels are for CUDA and ROCm, not for cpu"
    assert not kernels.fused(torch.ones(1))


def test_triton_on_a_cpu_is_refused():
    with (
        kernels.using("triton"),
        pytest.raises(ValueError, match="do not run on cpu; choose auto or plain, or set TRI"),
    ):
        modulated_norm(torch.ones(1, 1, 8), torch.ones(1, 8))


def test_choices_hold_for_the_duration_and_for_one_thread():
    seen = []
    with kernels.using("triton"):
        assert kernels.chosen(CUDA) == "triton"
        assert kernels.reason(CUDA) is None
        with kernels.using("plain"):
            assert kernels.reason(CUDA) == "plain kernels were requested"
        thread = threading.Thread(target=lambda: seen.append(kernels.chosen(CPU)))
        thread.start()
        thread.join()
        assert kernels.chosen(CUDA) == "triton"
    assert seen == ["plain"]


def test_the_default_of_the_process():
    kernels.set_default("triton")
    try:
        assert kernels.chosen(CUDA) == "triton"
        with kernels.using("plain"):
            assert kernels.chosen(CUDA) == "plain"
    finally:
        kernels.set_default("auto")


@pytest.mark.parametrize("choose", [kernels.set_default, lambda name: kernels.using(name).__enter__()])
def test_unknown_choices_are_refused(choose):
    with pytest.raises(ValueError, match="one of auto, triton, plain, not 'fast'"):
        choose("fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_that_cannot_run_them_takes_plain_kernels():
    assert kernels.chosen(CUDA) == "plain"
    assert kernels.reason(CUDA) in ("there is no such device", "Triton is not installed")


@pytest.mark.parametrize(
    ("capability", "triton", "needed"),
    [
        ((6, 1), "3.8.0", "a card of compute capability 7.5"),
        ((7, 5), "3.2.0", "Triton 3.3"),
        ((8, 9), "3.1.0", "Triton 3.2"),
        ((12, 0), "3.2.0", "Triton 3.3"),
    ],
)
def test_cards_and_compilers_that_could_end_the_process_are_not_tried(monkeypatch, capability, triton, needed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(choice.importlib.metadata, "version", lambda _: triton)
    monkeypatch.setattr(choice, "probe", lambda *_: pytest.fail("it was tried"))
    device = torch.device("cuda", 7)
    assert needed in choice._tried(device, torch.bfloat16)[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "for tests" in choice._tried(device, torch.bfloat16)[0]


def test_only_verdicts_that_last_are_remembered(monkeypatch):
    answers = [torch.OutOfMemoryError("full"), OSError("no space"), RuntimeError("refused\nin detail"), None]

    def answer(*_):
        error = answers.pop(0)
        raise error

    monkeypatch.setattr(choice, "_verdicts", {})
    monkeypatch.setattr(choice, "_unsuited", lambda _: None)
    monkeypatch.setattr(choice, "probe", answer)
    device = torch.device("cuda", 7)
    reasons = [kernels.reason(device) for _ in range(4)]
    assert reasons == ["OutOfMemoryError: full", "OSError: no space", "RuntimeError: refused", "RuntimeError: refused"]


class Operations(TorchDispatchMode):
    """Counts the calls of each of our operators."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mochi":
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def test_a_simulated_gpu_takes_the_operators():
    """A block's operators, counted by name; none are called with other kernels or with gradients."""

    def counts(choice, gradients):
        with FakeTensorMode(), kernels.using(choice), torch.set_grad_enabled(gradients), Operations() as operations:
            dit = AsymmDiT(AsymmDiTConfig(depth=2, hidden_size_x=384, num_heads=3), device="cuda", dtype=torch.bfloat16)
            latents, tokens, pooled = (
                torch.ones(1, *shape, device="cuda", dtype=torch.bfloat16)
                for shape in ((12, 2, 4, 4), (4, 1536), (384,))
            )
            text = TextConditioning(tokens, (4,), pooled)
            modulation = dit.modulation(torch.ones(1, device="cuda"), text.pooled)
            dit.denoise(latents, text, modulation, dit.rope(latents.shape, latents.device))
        return operations.counts

    once = {
        "modulated_norm": 4,
        "joint_heads": 2,
        "gated_residual_norm": 3,
        "swiglu": 3,
        "gated_residual": 3,
        "final_norm": 1,
    }
    assert counts("triton", gradients=False) == once
    assert counts("plain", gradients=False) == {}
    assert counts("triton", gradients=True) == {}


@pytest.mark.slow
def test_in_tritons_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, cwd=INTERPRETED.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr


def released_launches(monkeypatch, dtype):
    """Every kernel launch of a block of the released size, for few tokens."""
    launches = []
    for module in ("denoiser", "autoencoder"):
        monkeypatch.setattr(f"mochi_core.kernels.{module}.launch", triton_builds.recorder(launches))
    x, y = torch.ones(1, 6, 3072, dtype=dtype), torch.ones(1, 4, 1536, dtype=dtype)
    for stream in (x, y):
        scale, gate, shift, _ = torch.ones(1, 4 * stream.shape[-1], dtype=dtype).chunk(4, dim=-1)
        kernels.modulated_norm(stream, scale, 1e-6)
        kernels.gated_residual(stream, stream, gate, 1e-6)
        kernels.gated_residual_norm(stream, stream, gate, scale, 1e-6)
        kernels.final_norm(stream, shift, scale, 1e-6)
    kernels.swiglu(torch.ones(1, 6, 16384, dtype=dtype))
    kernels.quantize_rows(torch.ones(6, 8192, dtype=dtype))
    packed, weight, turns = torch.ones(1, 6, 9216, dtype=dtype), torch.ones(128), torch.ones(2, 24, 64, 2)
    kernels.joint_heads(packed, packed, *[weight] * 4, turns, torch.ones(3, 24, 64, 2), 1e-5)
    frames, vector = torch.ones(1, 128, 3, 8, 848, dtype=dtype), torch.ones(128, dtype=dtype)
    kernels.merge_sums(kernels.frame_sums(frames), 32, 8 * 848)
    statistics = torch.ones(1, 32, 3), torch.ones(1, 32, 3), vector, vector, 1e-5
    for past in (None, frames[:, :, :2]):
        kernels.norm_silu_pad(frames, past, *statistics, True, False, torch.ones(1, 128, 2, 7, 848, dtype=dtype))
    return launches


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_kernels_can_be_built_for_cards_that_are_not_here(target, monkeypatch, tmp_path):
    """In bf16, even for the oldest cards, and in fp32 for one; none spills registers."""
    compiler = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtypes = [torch.bfloat16, torch.float32] if target == ("cuda", 89) else [torch.bfloat16]
    for dtype in dtypes:
        for launch in released_launches(monkeypatch, dtype):
            gpu = compiler.GPUTarget(*target, WAVES.get(target[1], 32))
            compiled = triton_builds.build(launch, gpu)
            assert triton_builds.spilled_bytes(compiled, tmp_path) == 0, launch.kernel
