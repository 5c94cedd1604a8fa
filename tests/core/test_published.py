"""Published constants by their effect: each against a formula or a figure that is repeated here."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from mochi_core import AsymmDiT, denormalize_latents, normalize_latents
from mochi_core.autoencoder.model import Posterior
from mochi_core.config import MAX_TEXT_TOKENS
from mochi_core.geometry import FPS, VideoSize
from mochi_core.quantization.ggml import BLOCK_TYPES
from mochi_core.sampling.block_cache import LARGEST_FITTED, output_change
from mochi_core.transformer import attention
from mochi_core.transformer.layers import FinalLayer, TimestepEmbedder, gated_residual, modulated_norm, rms_norm
from mochi_core.transformer.rope import axis_positions
from tests.harness.tiny_models import DIT

SMALL = 1e-3
"""A magnitude of x whose square equals eps, so that eps affects a norm's result."""


def small_values(*shape, seed=0):
    return SMALL * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact_rms_norm(x, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def assert_equal(result, expected):
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


# github.com/genmoai/mochi, src/genmo/mochi_preview/vae/vae_stats.py
MEAN = [
    -0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561, 0.012767231469026969,
    -0.04703542746246419, 0.043896967884726704, -0.09346305707025976, -0.09918314763016893, -0.008729793427399178,
    -0.011931556316503654, -0.0321993391887285,
]  # fmt: skip
STD = [
    0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592, 0.8244560132752793,
    0.917259975397747, 0.9294154431013696, 1.3720942357788521, 0.881393668867029, 0.9168315692124348,
    0.9185249279345552, 0.9274757570805041,
]  # fmt: skip


def test_mean_and_std_of_the_latents():
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 12, 1, 1, 1) for values in (MEAN, STD))
    latents = torch.randn(1, 12, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(denormalize_latents(latents), latents * std + mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(normalize_latents(latents), (latents - mean) / std, rtol=0, atol=1e-15)


def test_a_posterior_is_drawn_with_its_standard_deviation():
    generator = torch.Generator().manual_seed(0)
    drawn = Posterior(torch.full((100_000,), 3.0), torch.full((100_000,), 0.25).log()).sample(generator)
    assert drawn.mean() == pytest.approx(3, abs=0.01)
    assert drawn.std() == pytest.approx(0.5, abs=0.01)  # the variance is 0.25


@pytest.mark.parametrize(
    ("logvar", "deviation"), [(-100.0, torch.tensor(-15.0).exp()), (100.0, torch.tensor(10.0).exp())]
)
def test_log_variances_are_cut(logvar, deviation):
    """At -30 and 20, as in latent diffusion's Gaussian."""
    drawn = Posterior(torch.zeros(1000), torch.full((1000,), logvar)).sample(torch.Generator().manual_seed(0))
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, noise * deviation)


@pytest.mark.parametrize("name", ["q_norm_x", "k_norm_x", "q_norm_y", "k_norm_y"])
def test_eps_of_q_and_k_is_1e_5(name):
    norm = getattr(AsymmDiT(DIT).blocks[0].attn, name)
    x = small_values(4, DIT.head_dim)
    assert_equal(norm(x), exact_rms_norm(x, 1e-5) * norm.weight.double())


def test_eps_of_all_other_norms_of_the_denoiser_is_1e_6():
    x, branch = small_values(2, 5, 48), small_values(2, 5, 48, seed=1)
    scale, gate = torch.randn(2, 2, 48, generator=torch.Generator().manual_seed(2))
    normed = exact_rms_norm(x, 1e-6)
    assert_equal(rms_norm(x), normed)
    assert_equal(modulated_norm(x, scale), normed * (1 + scale.double()[:, None]))
    gated = exact_rms_norm(branch, 1e-6) * gate.double().tanh()[:, None]
    assert_equal(gated_residual(x, branch, gate), x.double() + gated)


def test_eps_of_the_final_layer_is_1e_6():
    layer = FinalLayer(48, 48, ops=nn)
    layer.linear = nn.Identity()
    x, (shift, scale) = small_values(2, 5, 48), torch.randn(2, 2, 48, generator=torch.Generator().manual_seed(3))
    centred = x.double() - x.double().mean(-1, keepdim=True)
    expected = exact_rms_norm(centred, 1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    assert_equal(layer(x, torch.cat((shift, scale), dim=-1)), expected)


def test_timesteps_are_counted_up_to_1000():
    """The angles of a noise level are (1 - sigma) * 1000 times 10000 ** -(i / features)."""
    embedder = TimestepEmbedder(8, 8, ops=nn)
    embedder.mlp = nn.Identity()
    sigma = torch.tensor([1.0, 0.75, 0.001, 0.0])
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    angles = (1 - sigma.double())[:, None] * 1000 * frequencies
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1)
    torch.testing.assert_close(embedder(sigma, torch.float32).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(30, 53), (4, 6), (192, 192)])
def test_positions_cover_192_by_192(rows, columns):
    frames, height, width = axis_positions(3, rows, columns)
    assert frames.tolist() == [0, 1, 2]
    steps = [(axis[1] - axis[0]).item() for axis in (height, width)]
    assert steps[0] == pytest.approx(steps[1])
    assert steps[0] * rows * steps[1] * columns == pytest.approx(192 * 192)
    assert height.sum().item() == pytest.approx(0, abs=1e-9)
    assert width.sum().item() == pytest.approx(0, abs=1e-9)


def test_sizes():
    """The published demonstration has 163 frames of 848 x 480, 30 a second, 44,520 tokens, 256 tokens of text."""
    size = VideoSize()
    assert (size.width, size.height, size.num_frames, FPS, MAX_TEXT_TOKENS) == (848, 480, 163, 30, 256)
    assert (size.latent_shape(), size.num_tokens) == ((1, 12, 28, 60, 106), 44520)


# github.com/ali-vilab/TeaCache, TeaCache4Mochi/teacache_mochi.py: 4th power first
@pytest.mark.parametrize(
    ("change", "expected"), [(0.0, 3.05291719e-3), (0.01, 2.19784350e-2), (0.05, 5.14246150e-2), (0.1, 9.65170122e-2)]
)
def test_teacaches_polynomial_for_mochi(change, expected):
    by_powers = (
        -3512.41319 * change**4 + 811.675948 * change**3 - 60.9400215 * change**2 + 2.42429681 * change + 0.00305291719
    )
    assert by_powers == pytest.approx(expected, rel=1e-6)
    assert output_change(change) == pytest.approx(expected, rel=1e-6)


def test_teacaches_polynomial_is_used_up_to_where_it_falls():
    step = 1e-3
    rising = [output_change(i * step) for i in range(108)]
    assert LARGEST_FITTED == 0.108
    assert rising[-1] > rising[-2]
    assert output_change(0.5) == output_change(0.108)


# Weights and bytes of a block: github.com/ggml-org/ggml, src/ggml-common.h
BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17),
}  # fmt: skip


def test_sizes_of_ggml_blocks():
    assert {name: (block.weights, block.bytes) for name, block in BLOCK_TYPES.items()} == BLOCKS


# As in docs/performance.md: cuDNN first on Hopper and on Blackwell in data centres, flash attention first elsewhere.
PREFERENCES = {
    (7, 5): ["flash", "cudnn", "efficient", "math"],
    (8, 0): ["flash", "cudnn", "efficient", "math"],
    (8, 9): ["flash", "cudnn", "efficient", "math"],
    (9, 0): ["cudnn", "flash", "efficient", "math"],
    (10, 0): ["cudnn", "flash", "efficient", "math"],
    (10, 3): ["cudnn", "flash", "efficient", "math"],
    (11, 0): ["flash", "cudnn", "efficient", "math"],
    (12, 0): ["flash", "cudnn", "efficient", "math"],
}
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_cudnn_is_for_nvidia(monkeypatch, hip):
    """An MI300 has the numbers of a Hopper, by PyTorch's count."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
    assert attention._order(torch.device("cuda")) == (attention.FLASH_FIRST if hip else attention.CUDNN_FIRST)


@pytest.mark.parametrize(("capability", "order"), PREFERENCES.items(), ids=str)
def test_attention_preferred_by_architecture(monkeypatch, capability, order):
    """On a GPU of that compute capability, with more and more of the kernels failing."""
    failing, asked = set(), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    for name in KERNELS:

        def run(q, _k, _v, name=name):
            if name in failing:
                raise RuntimeError(name)
            return q

        monkeypatch.setitem(attention.BACKENDS, name, replace(attention.BACKENDS[name], run=run))
    for name in order:
        with FakeTensorMode():
            choice = attention.choose_attention("auto", "cuda", torch.bfloat16)
        assert choice.name == name
        failing.add(name)

    original = attention.sdpa_kernel

    def recording(backends, **options):
        asked.append((backends, options))
        return original(SDPBackend.MATH)

    monkeypatch.setattr(attention, "sdpa_kernel", recording)
    choice.run(*torch.ones(3, 1, 1, 2, 4))
    assert asked == [([KERNELS[name] for name in order], {"set_priority": True})]
