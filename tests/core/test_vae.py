"""AsymmVAE: streaming equals one pass, the past never sees the future, float32 pixels stay float32."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mochi_core import AsymmVAE, AsymmVAEConfig
from mochi_core.autoencoder import layers
from mochi_core.autoencoder.encoder import fourier_features
from mochi_core.autoencoder.model import Posterior
from tests.harness.tiny_models import VAE, random_vae


@pytest.fixture(scope="module")
def vae():
    return random_vae(dtype=torch.float64)


def latents(num_latents, height=4, width=6, batch=1):
    generator = torch.Generator().manual_seed(num_latents)
    return torch.randn(batch, 12, num_latents, height, width, generator=generator, dtype=torch.float64)


def pixels(frames=13, height=16, width=24):
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(1, 3, frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def test_default_configuration_is_released_mochi():
    vae = AsymmVAE(device="meta")
    decoder = sum(p.numel() for p in vae.decoder.parameters())
    encoder = sum(p.numel() for p in vae.encoder.parameters())
    assert (round(decoder / 1e6, 1), round(encoder / 1e6, 1)) == (362.5, 97.2)


@pytest.mark.parametrize("num_latents", range(1, 41))
def test_number_of_frames(vae, num_latents):
    video = vae.decode(latents(num_latents, 2, 1))
    assert video.shape == (1, 3, 6 * (num_latents - 1) + 1, 16, 8)


def test_decoder_is_causal(vae):
    z = latents(4)
    changed = z.clone()
    changed[:, :, 2:] += 1
    a, b = vae.decode(z), vae.decode(changed)
    assert torch.equal(a[:, :, :7], b[:, :, :7])
    assert not torch.equal(a[:, :, 7:], b[:, :, 7:])


def test_latent_does_not_know_later_frames(vae):
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 19, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    whole = vae.encode(video).mean
    assert whole.shape == (1, 12, 4, 2, 2)
    for num_latents in (1, 2, 3):
        alone = vae.encode(video[:, :, : 6 * (num_latents - 1) + 1]).mean
        torch.testing.assert_close(alone, whole[:, :, :num_latents], rtol=1e-12, atol=1e-12)


def test_plain_forward_has_the_gradients_of_its_parameters():
    """Compared with the change of the result along a random direction for each parameter."""
    vae, video = random_vae(dtype=torch.float64).requires_grad_(True), pixels()
    (vae(video) * torch.cos(video)).sum().backward()
    generator = torch.Generator().manual_seed(2)
    parameters = list(vae.parameters())
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    step, slopes = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2, 1):  # forwards, back beyond the start, and back to the start
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(sign * step * direction)
            slopes.append((vae(video) * torch.cos(video)).sum())
    expected = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
    torch.testing.assert_close((slopes[0] - slopes[1]) / (2 * step), expected, rtol=1e-5, atol=0)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_model_works_as_one_made_in_that_dtype(dtype):
    converted, made = random_vae().to(dtype), AsymmVAE(VAE, dtype=dtype)
    made.load_state_dict(converted.state_dict())
    assert converted.dtype == dtype
    z, video = latents(2, 2, 2).float(), pixels(7, 16, 16).float()
    decoded = converted.decode(z)
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, made.decode(z))
    torch.testing.assert_close(converted.encode(video).mean, made.encode(video).mean)
    assert converted(video).dtype == dtype
    again = converted.float().decode(z)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, decoded.float(), rtol=0.05, atol=0.05)


def test_attention_takes_some_pixels_at_a_time(vae, monkeypatch):
    """CUDA cannot take more than 2**16 at once; a plain pass over a frame of 848x480 has 101,760."""
    video = pixels(7)
    with torch.no_grad():
        expected = vae(video)
        monkeypatch.setattr(layers, "MAX_ATTENTION_BATCH", 5)
        monkeypatch.setattr(
            layers.F, "scaled_dot_product_attention", (attention := Recorder(F.scaled_dot_product_attention))
        )
        torch.testing.assert_close(vae(video), expected)
    assert max(attention.batches) == 5


class Recorder:
    """An attention that records the number of sequences in each call."""

    def __init__(self, attention):
        self.attention, self.batches = attention, []

    def __call__(self, q, *arguments, **options):
        self.batches.append(len(q))
        return self.attention(q, *arguments, **options)


def test_a_host_may_store_weights_in_one_dtype_and_compute_in_another():
    class Linear(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))

    class Conv3d(nn.Conv3d):
        def forward(self, x):
            return self._conv_forward(x, self.weight.to(x), self.bias.to(x))

    class GroupNorm(nn.GroupNorm):
        def forward(self, x):
            return F.group_norm(x, self.num_groups, self.weight.to(x), self.bias.to(x), self.eps)

    class ComputesInFloat32(AsymmVAE):
        dtype = torch.float32

    ops = SimpleNamespace(Linear=Linear, Conv3d=Conv3d, GroupNorm=GroupNorm)
    stored, expected = ComputesInFloat32(VAE, ops=ops, dtype=torch.bfloat16), random_vae()
    stored.load_state_dict(expected.state_dict())
    expected.load_state_dict(stored.state_dict())
    assert stored.encoder.output_proj.weight.dtype == torch.bfloat16
    z, video = latents(2, 2, 2).float(), pixels(7, 16, 16).float()
    torch.testing.assert_close(stored.decode(z, memory_limit=1), expected.decode(z))
    torch.testing.assert_close(stored.encode(video, memory_limit=1).mean, expected.encode(video).mean)


def test_fourier_features_of_a_bf16_model_are_computed_in_float32():
    video = torch.rand(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = fourier_features(video)
    assert features.dtype == torch.float32
    exact = video.double()
    angles = [exact[:, c] * 2 * math.pi * frequency for c in range(3) for frequency in (64, 128)]
    expected = torch.cat(
        (exact, torch.stack([a.sin() for a in angles], 1), torch.stack([a.cos() for a in angles], 1)), 1
    )
    assert (features - expected).abs().max() < 1e-4


def test_bf16_encoder_sees_unrounded_pixels():
    vae, half = random_vae(), random_vae(dtype=torch.bfloat16)
    video = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected, mean = vae.encode(video).mean, half.encode(video).mean.float()
    rounded = half.encode(video.bfloat16().float()).mean.float()
    assert (mean - expected).norm() < 0.05 * expected.norm()
    assert (rounded - expected).norm() > 0.2 * expected.norm()


def test_posterior(vae):
    posterior = vae.encode(torch.zeros(1, 3, 7, 16, 16, dtype=torch.float64))
    assert posterior.mode() is posterior.mean
    state = torch.get_rng_state()
    a, b = (posterior.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    spread = ((a - posterior.mean) / (0.5 * posterior.logvar).exp()).std()
    assert spread == pytest.approx(1, abs=0.3)
    wide = Posterior(torch.zeros(10_000), torch.full((10_000,), math.log(9)))
    assert wide.sample(torch.Generator().manual_seed(0)).std() == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 6, 16, 16), "6 frames.*6k \\+ 1"),
        ((1, 3, 7, 16, 20), "20 x 16 pixels.*multiples of 8"),
        ((1, 4, 7, 16, 16), "\\(1, 4, 7, 16, 16\\)"),
    ],
)
def test_encoder_refuses_what_it_cannot_hold(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


def test_decoder_refuses_other_latents(vae):
    with pytest.raises(ValueError, match="are \\(batch, 12"):
        vae.decode(torch.zeros(1, 16, 2, 4, 4))


def test_half_a_model_says_what_is_missing():
    decoder_only = AsymmVAE(VAE, encoder=False, device="meta")
    with pytest.raises(ValueError, match="no encoder"):
        decoder_only.encode(torch.zeros(1, 3, 7, 16, 16))
    with pytest.raises(ValueError, match="no decoder"):
        AsymmVAE(VAE, decoder=False, device="meta").decode(latents(1))


def test_other_shapes_of_model():
    config = AsymmVAEConfig(
        decoder_channels=(64, 32, 32),
        decoder_blocks=(2, 1, 0, 1),
        temporal_expansions=(2, 1),
        spatial_expansions=(2, 2),
    )
    video = AsymmVAE(config, encoder=False).decode(torch.randn(1, 12, 3, 2, 2))
    assert video.shape == (1, 3, 5, 8, 8)


def test_convolutions_by_frames_are_those_in_three_dimensions(monkeypatch, vae):
    """As in the decoder, in one pass and streamed, where PyTorch would unfold its input."""
    z, calls = latents(2), []
    expected = vae.decoder(z), vae.decode(z)
    monkeypatch.setattr(layers, "unfolds_conv3d", lambda x: calls.append(x.ndim) or True)
    found = vae.decoder(z), vae.decode(z)
    assert set(calls) == {5}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("release", "cudnn", "hip", "left_out"),
    [
        ("2.8.0", 91002, None, False),
        ("2.9.0+cu128", 91002, None, True),
        ("2.9.0+cu128", 91700, None, True),
        ("2.9.1", 91300, None, True),
        ("2.9.1", 91500, None, False),
        ("2.10.0a0+git1", 91002, None, True),
        ("2.14.1+cu130", 92400, None, False),
        ("2.9.0+rocm6.4", 91002, "6.4", False),
        ("2.9.0+cpu", None, None, False),
    ],
)
def test_which_pytorch_leaves_out_cudnn(monkeypatch, release, cudnn, hip, left_out):
    monkeypatch.setattr(torch, "__version__", release)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    layers.leaves_out_cudnn.cache_clear()
    try:
        assert layers.leaves_out_cudnn() == left_out
    finally:
        layers.leaves_out_cudnn.cache_clear()
    assert not layers.unfolds_conv3d(torch.zeros(1))
