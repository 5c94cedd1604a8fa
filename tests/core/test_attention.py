"""Every backend that runs here equals plain SDPA; every other one says why it does not run."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl

from mochi_core import MochiPipeline, linear_quadratic_schedule, sample
from mochi_core.__main__ import main
from mochi_core.transformer.attention import (
    ATTENTIONS,
    BACKENDS,
    HALF,
    KERNELS,
    _error_of,
    choose_attention,
    sdpa,
    unsupported_reason,
)
from tests.harness.devices import DEVICES
from tests.harness.random_inputs import NOISE, prompt
from tests.harness.tiny_models import random_dit, random_vae

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EXACT = [name for name in ATTENTIONS if name != "sage"]


def qkv(length, dtype, device, head_dim=32):
    """q, k and v as in the denoiser: the heads of a token are adjacent, so no tensor is contiguous."""
    packed = torch.randn(2, length, 3, 3, head_dim, generator=torch.Generator().manual_seed(length))
    return (t.transpose(1, 2).to(device, dtype) for t in packed.unbind(2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_equals_plain_sdpa_or_is_refused(name, dtype, device):
    try:
        choice = choose_attention(name, device, dtype, head_dim=32)
    except ValueError as error:
        assert name not in ("auto", "math"), "these always run"
        assert device == "cpu" or dtype not in HALF or name not in KERNELS, "these run on every GPU that Mochi can use"
        assert str(error).startswith(f"Attention {name} cannot be used: ")
        return
    for length in (1, 77, 128, 301):
        q, k, v = qkv(length, dtype, device)
        expected = sdpa(q.double(), k.double(), v.double())
        torch.testing.assert_close(choice.run(q, k, v).double(), expected, rtol=0, atol=TOLERANCES[dtype])


def test_what_runs_on_a_cpu():
    probe = torch.zeros(1, 1, 8, 32)
    assert [name for name in BACKENDS if unsupported_reason(name, probe) is None] == ["flash", "math"]
    automatic = choose_attention("auto", "cpu", torch.float32)
    assert (automatic.run, automatic.name, automatic.reason) == (sdpa, "sdpa", "PyTorch's own on cpu")


def test_a_refusal_says_why_and_what_else_there_is():
    with pytest.raises(ValueError, match=r"Attention cudnn cannot be used: it runs on cuda, not on cpu\.") as error:
        choose_attention("cudnn", "cpu", torch.float32)
    for text in ("flash: can be used", "fa3: the package flash_attn_interface is not installed", "math: can be used"):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="attention is 'xformers'; use one of auto, cudnn, flash,"):
        choose_attention("xformers", "cpu", torch.float32)
    assert unsupported_reason("flash", torch.zeros(1, 1, 8, 32, dtype=torch.int8)).startswith(
        "it supports torch.float16 and torch.bf"
    )


def test_what_an_attempt_raises_is_the_reason_and_leaves_no_trace():
    probe = torch.zeros(1, 1, 8, 32)
    assert _error_of(BACKENDS["efficient"].run, probe).startswith("RuntimeError: No viable backend")
    assert _error_of(BACKENDS["fa3"].run, probe) == "ModuleNotFoundError: No module named 'flash_attn_interface'"
    assert current_flash_attention_impl() is None
    assert choose_attention("auto", "cpu", torch.float32).run is sdpa
    torch.testing.assert_close(sdpa(probe, probe, probe), probe)


@pytest.mark.parametrize("name", ["flash", "math"])
def test_sampling_with_a_backend(name):
    dit, sigmas = random_dit(), linear_quadratic_schedule(3)
    plain = sample(dit, NOISE, sigmas, prompt(6), prompt(0))
    torch.testing.assert_close(
        sample(dit, NOISE, sigmas, prompt(6), prompt(0), attention=name), plain, rtol=0, atol=1e-4
    )


def test_sampler_pipeline_and_command_refuse(capsys, tmp_path):
    dit = random_dit()
    with pytest.raises(ValueError, match="Attention cudnn cannot be used"):
        sample(dit, NOISE, linear_quadratic_schedule(3), prompt(6), prompt(0), attention="cudnn")
    pipe = MochiPipeline(dit, random_vae(), FixedText(), attention="efficient")
    with pytest.raises(ValueError, match="Attention efficient cannot be used"):
        pipe("a kite", height=32, width=32, num_frames=7, num_inference_steps=2)
    models = [part for name in ("transformer", "t5", "vae") for part in (f"--{name}", str(tmp_path / "none"))]
    arguments = ["generate", *models, "--prompt", "a kite", "--device", "cpu", "--attention", "cudnn"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: Attention cudnn cannot be used: it runs on cuda, not on cpu.")


def test_threads_leave_the_kernels_of_the_process_as_they_were():
    """Threads as for several GPUs: no call may save another's temporary setting and restore it."""
    q, k, v = qkv(512, torch.float32, "cpu")  # long enough for calls to overlap
    expected, run = sdpa(q, k, v), BACKENDS["flash"].run
    with ThreadPoolExecutor(4) as threads:
        for result in threads.map(lambda _: run(q, k, v), range(200)):
            torch.testing.assert_close(result, expected)
    enabled = (getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")() for kernel in ("math", "flash", "mem_efficient"))
    assert all(enabled)


class FixedText:
    def encode(self, _):
        return prompt(6)


@pytest.mark.usefixtures("new_compiler")
def test_a_backend_compiles_as_one_graph():
    q, k, v = qkv(40, torch.float32, "cpu")
    compiled = torch.compile(BACKENDS["flash"].run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), sdpa(q, k, v))
