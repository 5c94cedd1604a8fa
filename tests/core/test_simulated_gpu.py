"""The load of every form of the model on a simulated GPU: nothing waits, and little is started, moved and held.

Fake tensors refuse operations across devices, so each test also shows that nothing is on the wrong one.
"""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from benchmarks.simulated_gpu import KERNELS, GpuCounter, no_attention, simulated_gpu, text_of_lengths, using
from mochi_core import AsymmDiT, AsymmDiTConfig, AsymmVAE, linear_quadratic_schedule
from mochi_core.autoencoder import layers
from mochi_core.autoencoder.memory import decoder_memory_estimate, encoder_memory_estimate
from mochi_core.lora.files import LoraDelta
from mochi_core.lora.layers import Lora
from mochi_core.quantization import fp8
from mochi_core.quantization.weights import QUANTIZERS, QuantizedLinear
from mochi_core.sampling.block_cache import BlockCache
from mochi_core.sampling.sample import euler, guided, prepared_velocities
from mochi_core.text_encoder import TextEncoder

GIB, MIB = 2**30, 2**20
HEIGHT, WIDTH = 60, 106
"""Latent rows and columns for 848x480 pixels."""
PROMPT = 256
pytestmark = pytest.mark.slow
SCHEDULES = {steps: linear_quadratic_schedule(steps) for steps in (1, 2, 4)}
"""Made here as real tensors, because their values are read."""


class Bar(NamedTuple):
    """The maximum counts."""

    starts: float
    gigabytes: float
    """Bytes moved outside matrix products."""
    mib: float
    """Peak, without weights and what was there before."""


# Per block and condition; the ends of the network are divided among the blocks.
FORWARD = {
    ("plain", 25): Bar(76, 5.3, 560),
    ("plain", 85): Bar(98, 15.8, 1400),
    ("plain", 163): Bar(146, 29.0, 2000),  # for two blocks, the second without a text output: 147 each for 48
    ("triton", 25): Bar(26, 1.3, 560),
    ("triton", 85): Bar(31, 4.1, 1400),
    ("triton", 163): Bar(36, 7.6, 1900),
}
# Per block, with 25 frames.
FORMS = {
    ("plain", "lora"): Bar(80, 5.3, 560),
    ("plain", "int8"): Bar(92, 8.0, 560),
    ("plain", "fp8_rowwise"): Bar(150, 8.0, 700),
    ("triton", "lora"): Bar(33, 1.4, 560),
    ("triton", "int8"): Bar(46, 4.1, 560),
    ("triton", "fp8_rowwise"): Bar(34, 1.8, 560),
}
# Per frame, by GiB of the limit and frames.
DECODE = {
    ("plain", 3, 7): Bar(112, 15.0, 3 * 1024),
    ("plain", 5, 25): Bar(75, 13.0, 5 * 1024),
    ("plain", 24, 7): Bar(105, 13.6, 5 * 1024),
    ("triton", 3, 7): Bar(60, 10.4, 3 * 1024),
    ("triton", 5, 25): Bar(35, 8.6, 5 * 1024),
    ("triton", 24, 7): Bar(48, 8.9, 5 * 1024),
}
# Per frame of 7, by GiB of the limit.
ENCODE = {
    ("plain", 24): Bar(490, 15.2, 2 * 1024),
    ("triton", 1): Bar(650, 15.8, 1024),
    ("triton", 24): Bar(390, 12.8, 2 * 1024),
}
# Per layer, with two prompts.
T5 = Bar(95, 0.5, 64)


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    """Simulates a GPU with these kernels chosen."""
    # It reads once per video whether all values are finite; fake latents have none.
    monkeypatch.setattr("mochi_core.autoencoder.model.latents_problem", lambda *_: None)
    fp8._probe.cache_clear()
    with simulated_gpu(), using(request.param):
        yield request.param
    fp8._probe.cache_clear()


def check(counted, parts, bar):
    """Assert that nothing waits, and that each of `parts` parts stays within the bar."""
    found = Bar(counted.starts / parts, counted.moved.total() / parts / 1e9, counted.peak / MIB)
    print(found)
    assert counted.waits == []
    assert all(count <= most for count, most in zip(found, bar, strict=True)), (found, bar)


def build(depth=2):
    return AsymmDiT(AsymmDiTConfig(depth=depth), device="cuda", dtype=torch.bfloat16)


def noise(frames, batch=1):
    return torch.empty(batch, 12, (frames + 5) // 6, HEIGHT, WIDTH, device="cuda")


def count_forward(dit, frames, levels=()):
    """`levels` are the axes of the noise levels besides that of the samples."""
    latents, text = noise(frames).to(dit.dtype), text_of_lengths(dit, PROMPT)
    modulation, rope = (
        dit.modulation(torch.ones(1, *levels, device="cuda"), text.pooled),
        dit.rope(latents.shape, latents.device),
    )
    with GpuCounter() as counted:
        velocity = dit.denoise(latents, text, modulation, rope, attend=no_attention)
    assert (velocity.shape, velocity.device, velocity.dtype) == (latents.shape, latents.device, dit.dtype)
    return counted


@pytest.mark.parametrize("frames", [25, 85, 163])
def test_a_forward(kernels, frames):
    check(count_forward(build(), frames), 2, FORWARD[kernels, frames])


def test_a_forward_with_a_noise_level_of_each_frame(kernels):
    starts, gigabytes, mib = FORWARD[kernels, 25]
    # Without Triton, a modulation of several samples cannot be a norm's weight.
    check(count_forward(build(), 25, levels=[5]), 2, Bar(starts, gigabytes * (1.2 if kernels == "plain" else 1), mib))


@pytest.mark.parametrize("kernels", KERNELS[:1], indirect=True)
def test_a_forward_of_released_depth(kernels):
    check(count_forward(build(48), 25), 48, FORWARD[kernels, 25])


def add_lora(dit):
    def delta(layer, rows, columns):
        return LoraDelta(layer, (0, rows), torch.empty(16, columns), torch.empty(rows, 16), 1.0, None)

    layers = [
        (name, layer) for name, layer in dit.blocks.named_modules(prefix="blocks") if isinstance(layer, nn.Linear)
    ]
    Lora(dit, [delta(name, *layer.weight.shape) for name, layer in layers if "attn" in name], strength=0.8)


def quantize(dit, kind):
    for name, layer in list(dit.blocks.named_modules()):
        if isinstance(layer, nn.Linear) and "mod_" not in name:
            dit.blocks.set_submodule(name, QuantizedLinear(QUANTIZERS[kind](layer.weight), layer.bias))


CHANGES = {
    "lora": add_lora,
    "int8": partial(quantize, kind="int8"),
    "fp8_rowwise": partial(quantize, kind="fp8_rowwise"),
}


@pytest.mark.parametrize("form", CHANGES)
def test_a_forward_in_other_forms(kernels, form):
    dit = build()
    CHANGES[form](dit)
    check(count_forward(dit, 25), 2, FORMS[kernels, form])


def guided_run(dit, state, lengths, steps, cache=None):
    """Prepare a guided run with prompts of these lengths, per condition and video; returns the function for its steps."""
    texts = iter([text_of_lengths(dit, *each) for each in lengths])
    dit.prepare_text = lambda *_: next(texts)
    conditions = [(torch.empty(len(each), 1, 1), torch.empty(len(each), 1)) for each in lengths]
    sigmas = SCHEDULES[steps]
    velocities = prepared_velocities(dit, state, sigmas, conditions, no_attention, cache)
    return lambda: euler(guided(velocities, [4.5] * steps), state, sigmas)


def test_guided_steps(kernels):
    dit, state = build(), noise(25)
    run = guided_run(dit, state, [[PROMPT], [0]], steps=2)
    with GpuCounter() as counted:
        assert run().device == state.device
    starts, gigabytes, mib = FORWARD[kernels, 25]
    # Besides the network: operations on the latents, and the second condition's stream.
    check(counted, 2 * 2 * 2, Bar(starts + 3, gigabytes + 0.01, mib + 50))


@pytest.mark.parametrize("lengths", [[[256], [77]], [[256, 77], [12, 0]], [[0, 0], [0, 0]]], ids=str)
def test_prompts_of_any_lengths_wait_for_nothing(kernels, lengths):
    dit, state = build(), noise(7, batch=len(lengths[0]))
    run = guided_run(dit, state, lengths, steps=1)
    with GpuCounter() as counted:
        assert run().device == state.device
    assert counted.waits == []
    assert counted.starts <= 4 * len(state) * FORWARD[kernels, 25].starts


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("changes", [[0.0] * 8, [0.0, 1.0] * 4], ids=["both videos", "one of two videos"])
@pytest.mark.parametrize("method", ["teacache", "first_block"])
def test_a_cache_waits_for_nothing_but_the_changes_that_it_decides_by(method, changes):
    dit, cache = build(), BlockCache(method, threshold=0.06)
    run = guided_run(dit, noise(1, batch=2), [[256, 77], [12, 0]], 4, cache)
    with GpuCounter(changes) as counted:
        run()
    assert cache.hits == changes.count(0.0)
    # One for each video and condition, in both steps that may skip blocks.
    assert len(counted.waits) == len(changes)
    assert all("_local_scalar_dense" in wait and "block_cache.py" in wait for wait in counted.waits), counted.waits


@pytest.mark.parametrize(("limit", "frames"), [(3, 7), (5, 25), (24, 7)])
def test_a_decode_stays_within_its_limit(kernels, limit, frames):
    vae = AsymmVAE(device="cuda", dtype=torch.bfloat16, encoder=False)
    latents = noise(frames).to(vae.dtype)
    with GpuCounter() as counted:
        assert vae.decode(latents, limit * GIB).device == latents.device
    plan = decoder_memory_estimate(vae.config, HEIGHT, WIDTH, vae.dtype.itemsize).choose_plan(
        limit * GIB, latents.device
    )
    assert plan.cache_device.type == ("cpu" if limit == 3 else "cuda")
    check(counted, frames, DECODE[kernels, limit, frames])


@pytest.mark.parametrize("kernels", KERNELS[:1], indirect=True)
@pytest.mark.usefixtures("kernels")
def test_a_decode_without_cudnn_for_three_dimensions_takes_no_more_memory(monkeypatch):
    vae = AsymmVAE(device="cuda", dtype=torch.bfloat16, encoder=False)
    monkeypatch.setattr(layers, "leaves_out_cudnn", lambda: True)
    with GpuCounter() as counted:
        vae.decode(noise(7).to(vae.dtype), 5 * GIB)
    assert counted.waits == []
    assert counted.peak <= 5 * GIB


@pytest.mark.parametrize(
    ("kernels", "limit"), [(KERNELS[0], 1), *((kernels, 24) for kernels in KERNELS)], indirect=["kernels"]
)
def test_an_encode_stays_within_its_limit(kernels, limit):
    """With 163 frames, which take minutes to count, 3 and 5 GiB put the caches in main memory, as 1 GiB does here."""
    vae = AsymmVAE(device="cuda", dtype=torch.bfloat16, decoder=False)
    video = torch.empty(1, 3, 7, 8 * HEIGHT, 8 * WIDTH, device="cuda")
    with GpuCounter() as counted:
        assert vae.encode(video, limit * GIB).mean.device == video.device
    # A clip gathered in main memory is read and written with waits.
    clips = [wait for wait in counted.waits if "copy" in wait]
    assert bool(clips) == (limit == 1)
    counted.waits = [wait for wait in counted.waits if wait not in clips]
    check(counted, 7, ENCODE[kernels, limit])
    long = encoder_memory_estimate(vae.config, 163, *video.shape[3:], vae.dtype.itemsize)
    caches = [long.choose_plan(gib * GIB, video.device).cache_device.type for gib in (3, 5, 24)]
    assert caches == ["cpu", "cpu", "cuda"]


@pytest.mark.parametrize("kernels", KERNELS[:1], indirect=True)
@pytest.mark.usefixtures("kernels")
def test_t5_waits_for_nothing_but_its_tokens():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=4, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128
    )
    with torch.device("cuda"):
        model = transformers.T5EncoderModel(config).eval()
    encoder = TextEncoder(model, lambda _, **_options: SimpleNamespace(input_ids=list(range(77))))
    with GpuCounter() as counted:
        embeds, mask = encoder.encode(["a prompt", "another", ""])
    assert embeds.shape == (3, 256, 4096)
    assert embeds.is_cuda and mask.is_cuda
    waits, counted.waits = counted.waits, []
    assert len(waits) == 2
    assert all("aten._to_copy" in wait and "text_encoder.py" in wait for wait in waits), waits
    check(counted, config.num_layers, T5)
