"""Every path that only a GPU has, against the plain one: `pytest -m gpu`, or the same code on the CPU.

Attention by name is in tests/core/test_attention.py, with the same mark.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mochi_core import MochiPipeline, load_lora, load_text_encoder, load_transformer, load_vae, sample
from mochi_core.autoencoder.plan import CPU, GIB, MIB, Plan
from mochi_core.autoencoder.steps import decoder_steps
from mochi_core.autoencoder.streaming import OomRetry, OutOfMemory, stream
from mochi_core.doctor import checks
from mochi_core.quantization.fp8 import linear_rowwise, quantize_rows, unsupported_reason
from mochi_core.quantization.weights import QUANTIZERS
from mochi_core.sampling.sample import prepared_velocities
from mochi_core.transformer.offload import offload_modulation, stream_blocks
from tests.harness.devices import DEVICES
from tests.harness.lora_files import random_adapter, write_adapter
from tests.harness.numbers import relative_error
from tests.harness.random_inputs import NOISE, SIGMAS, gaussian, inputs, prompt
from tests.harness.tiny_models import random_dit, random_vae

MODELS = Path(__file__).parents[2] / "models"
FORMS = [None, "fp8", "fp8_rowwise", "int8", "q4_0"]
CONDITIONS = prompt(6), prompt(0)
# cuDNN's convolutions compute float32 as TF32, with ten bits.
NEAR = 5e-3
ONE_PIECE = 2**60


def to(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def sampled(dit, device):
    """A guided run with an empty negative prompt."""
    return sample(dit, NOISE.to(device), SIGMAS, *(to(device, *one) for one in CONDITIONS)).cpu()


def latents(frames=3, height=6, width=10):
    return torch.randn(1, 12, frames, height, width, generator=torch.Generator().manual_seed(0))


def test_the_denoiser_is_that_of_the_cpu(device):
    dit = random_dit()
    expected = sampled(dit, "cpu")
    assert relative_error(sampled(dit.to(device), device), expected) < NEAR
    arguments = inputs((16, 5, 0))
    batch = dit.to("cpu")(*arguments)
    assert relative_error(dit.to(device)(*to(device, *arguments)).cpu(), batch) < NEAR


class MochiOperators(TorchDispatchMode):
    """Records calls of our custom operators."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mochi":
            self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_give_what_plain_ones_give_and_all_of_them_run(device, dtype):
    kernels = pytest.importorskip("mochi_core.kernels")
    dit, vae = random_dit(dtype=dtype).to(device), random_vae(dtype=dtype).to(device)
    z, rows = latents().to(device, dtype), gaussian(5, 96).to(device, dtype)

    def results():
        values, scale = quantize_rows(rows)
        return sampled(dit, device), vae.decode(z), values.float() * scale

    with kernels.using("plain"):
        expected = results()
    with kernels.using("auto"):
        assert kernels.chosen(device) == ("triton" if device.type == "cuda" else "plain"), kernels.reason(device)
        with MochiOperators() as operators:
            found = results()
    for result, plain in zip(found, expected, strict=True):
        assert relative_error(result, plain) < (1e-4 if dtype == torch.float32 else 0.03)
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mochi::")}
    assert operators.seen == (registered if device.type == "cuda" else set())


@pytest.mark.parametrize("offload", [offload_modulation, stream_blocks])
@pytest.mark.parametrize("quantize", FORMS)
def test_offloaded_weights_give_what_resident_ones_give(device, tmp_path, offload, quantize):
    """With a LoRA as well; on a GPU through a separate stream, from pinned memory."""
    save_file(random_dit().state_dict(), tmp_path / "dit.safetensors")
    dit = load_transformer(tmp_path / "dit.safetensors", torch.float32, quantize=quantize)
    load_lora(dit, write_adapter(tmp_path / "a.safetensors", random_adapter(random_dit().state_dict()), "comfyui"), 0.5)
    expected = sampled(dit.to(device), device)
    dit.to("cpu")
    for _ in range(2):
        with offload(dit, device):
            found = sampled(dit, device)
        assert torch.equal(found, expected)
    assert {tensor.device for tensor in (*dit.parameters(), *dit.buffers())} == {CPU}
    if offload is stream_blocks:
        assert dit.blocks[1].attn.proj_x.bias.is_pinned() == (device.type == "cuda")


@pytest.mark.parametrize("kind", FORMS[1:])
def test_quantised_layers(device, kind):
    found = checks._product(kind, device)
    if not found["works"]:
        pytest.skip(found["reason"])
    assert found["ok"], found


@pytest.mark.parametrize("rows", [1, 77, 5000])
def test_products_in_fp8_are_those_of_the_quantised_numbers(device, rows):
    if reason := unsupported_reason(device):
        pytest.skip(reason)
    weight, x = QUANTIZERS["fp8_rowwise"](gaussian(48, 256)), gaussian(rows, 256, seed=1)
    values, scale = quantize_rows(x)
    expected = F.linear(values.float() * scale, weight.dequantized())
    found = linear_rowwise(*to(device, x, weight.values, weight.scale))
    torch.testing.assert_close(found.cpu(), expected, rtol=2**-7, atol=1e-3)


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)  # tests/core/test_compiled.py is for the CPU
@pytest.mark.parametrize("quantize", [None, "fp8_rowwise"])
def test_compiled_blocks(device, tmp_path, quantize):
    save_file(random_dit().state_dict(), tmp_path / "dit.safetensors")
    dit = load_transformer(tmp_path / "dit.safetensors", torch.float32, device, quantize)
    expected = sampled(dit, device)
    dit.compile_blocks()
    assert relative_error(sampled(dit, device), expected) < (1e-4 if quantize is None else 0.02)


@pytest.fixture(scope="module")
def vae():
    return random_vae()


@pytest.mark.parametrize("limit", [None, GIB, 24 * MIB, 1])
def test_every_plan_of_a_decode_gives_the_same(vae, device, limit):
    z = latents()
    expected = vae.to("cpu").decode(z)
    vae.to(device)
    assert relative_error(vae.decode(z.to(device), limit).cpu(), expected) < NEAR
    assert relative_error(torch.cat(list(vae.decode_stream(z, limit, device=device)), dim=2).cpu(), expected) < NEAR


@pytest.mark.parametrize("limit", [None, 1])
def test_every_plan_of_an_encode_gives_the_same(vae, device, limit):
    video = torch.rand(1, 3, 13, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = vae.to("cpu").encode(video).mean
    assert relative_error(vae.to(device).encode(video.to(device), limit).mean.cpu(), expected) < NEAR


@contextlib.contextmanager
def memory_left(device, count):
    """On a GPU, at most `count` bytes can be allocated inside."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + count) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def test_a_decode_goes_on_with_less_when_memory_runs_out(vae, device):
    size = (5, 24, 40) if device.type == "cuda" else (2, 4, 4)
    z, retry = latents(*size).to(device), OomRetry(Plan(device, device, ONE_PIECE))
    steps = decoder_steps(vae.to(device).decoder)
    expected = torch.cat([piece.cpu() for piece in stream(steps, [z], OomRetry(Plan(device, CPU, 8 * MIB)))], dim=2)
    with memory_left(device, 192 * MIB):
        found = torch.cat([piece.cpu() for piece in stream(steps, [z], retry)], dim=2)
    assert relative_error(found, expected) < NEAR
    assert (retry.plan.working_set < ONE_PIECE) == (device.type == "cuda")


def test_a_decode_that_cannot_fit_says_so_and_the_next_one_works(vae, device):
    vae.to(device)
    small, large = latents(2, 2, 2).to(device), latents(1, 96, 96 if device.type == "cuda" else 1).to(device)
    expected = vae.decode(small)
    with (
        memory_left(device, 2 * MIB),
        pytest.raises(OutOfMemory) if device.type == "cuda" else contextlib.nullcontext(),
    ):
        list(vae.decode_stream(large))
    assert relative_error(vae.decode(small), expected) < NEAR


def test_no_step_waits_for_the_device(device):
    dit, z = random_dit().to(device), NOISE.to(device)
    run = prepared_velocities(dit, z, SIGMAS, [to(device, *one) for one in CONDITIONS], F.scaled_dot_product_attention)
    expected = run(z, 1, 2)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(z, 1, 2)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_prompt_becomes_the_video_of_the_cpu_however_weights_are_held(device):
    dit = load_transformer(MODELS / "diffusion_models/mochi_tiny.safetensors", torch.float32)
    text_encoder = load_text_encoder(MODELS / "text_encoders/t5_tiny.safetensors")
    models = dit, load_vae(MODELS / "vae/mochi_tiny_vae.safetensors"), text_encoder

    def video(offload, place):
        for model in models:
            model.to("cpu" if offload else place)
        pipe = MochiPipeline(*models, offload=offload, device=place if offload else None)
        return pipe("a red star moving to the right", height=32, width=32, num_frames=7, num_inference_steps=2)

    expected = video(False, "cpu")
    for offload in (False, True, "stream"):
        found = video(offload, device)
        assert abs(found - expected).max() < 0.02
