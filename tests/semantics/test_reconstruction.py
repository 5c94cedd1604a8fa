"""The trained tiny autoencoder on clips that it has never seen."""

import numpy as np
import pytest
import torch

from mochi_core import denormalize_latents, load_vae, normalize_latents
from mochi_core.autoencoder.decoder import DecoderStage
from mochi_core.train.tiny import vae as tiny_vae
from mochi_core.train.tiny.shapes import draw, random_clip
from tests.harness import trained

CLIPS = 32


@pytest.fixture(scope="module")
def vae():
    return load_vae(trained.VAE)


@pytest.fixture(scope="module")
def video():
    """The clips, (32, 3, 13, 64, 64) in [-1, 1]."""
    scenes = [random_clip(np.random.default_rng([2, seed]))[0] for seed in range(CLIPS)]
    return tiny_vae.to_video([draw(scene, 13, 64, 64) for scene in scenes])


@pytest.fixture(scope="module")
def latents(vae, video):
    return vae.encode(video).mode()


def psnr(decoded, video):
    """Peak signal-to-noise ratio of all clips together, in dB."""
    return 10 * torch.log10(4 / (decoded.clamp(-1, 1) - video).square().mean())


def test_held_out_clips_are_reconstructed(vae, video, latents):
    quality = psnr(vae.decode(latents), video)
    print(f"{quality:.1f} dB")
    assert quality >= 28


@torch.no_grad()
def test_streaming_equals_the_plain_forward(vae, video, latents):
    torch.testing.assert_close(vae.decode(latents[:4], memory_limit=2**20), vae.decoder(latents[:4]), rtol=0, atol=1e-4)
    torch.testing.assert_close(tiny_vae.posterior_of(vae, video[:4]).mean, latents[:4], rtol=0, atol=1e-4)


def off(latents):
    """Largest deviation of means and standard deviations from 0 and 1."""
    return max(tiny_vae.channel_means(latents).abs().max(), (tiny_vae.channel_deviations(latents) - 1).abs().max())


def test_latents_have_the_statistics_of_mochi(latents):
    assert off(normalize_latents(latents)) < 0.2
    assert off(latents) > 0.3  # not scaled at all
    assert off(denormalize_latents(latents)) > 0.3  # scaled the wrong way


def test_dropping_the_wrong_frames_is_noticed(vae, video, latents, monkeypatch):
    def drops_the_last(stage, x):
        x = stage.unfold(stage.blocks(x))
        return x[:, :, : x.shape[2] - stage.surplus]

    monkeypatch.setattr(DecoderStage, "forward", drops_the_last)
    with torch.no_grad():
        decoded = vae.decoder(latents)
    assert decoded.shape == video.shape
    assert psnr(decoded, video) < 28 - 3
