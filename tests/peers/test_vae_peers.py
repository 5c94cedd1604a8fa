"""The autoencoder against diffusers' and ComfyUI's own, at the released sizes."""

import pytest
import torch

from tests.harness.numbers import relative_error
from tests.harness.peers import comfy_vae, diffusers_vae
from tests.harness.tiny_models import AsymmVAEConfig, random_vae


@pytest.fixture(scope="module")
def vae():
    return random_vae(AsymmVAEConfig())


@pytest.fixture(scope="module")
def comfy_peer(vae, comfyui):  # noqa: ARG001
    return comfy_vae(vae)


@pytest.fixture(scope="module")
def diffusers_peer(vae):
    return diffusers_vae(vae)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 12, 3, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ours(vae, latents):
    return vae.decode(latents)


@pytest.fixture(scope="module")
def expected(comfy_peer, latents):
    with torch.no_grad():
        return comfy_peer.decode(latents)


@pytest.fixture(scope="module")
def video():
    return torch.rand(1, 3, 7, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_decoder_equals_comfyui(ours, expected):
    assert relative_error(ours, expected) <= 1e-4


def test_decoder_follows_genmo_where_diffusers_drops_frames_too_late(ours, expected, diffusers_peer, latents):
    theirs = diffusers_peer.decode(latents, return_dict=False)[0]
    assert theirs.shape == ours.shape
    assert relative_error(ours[:, :, 0], expected[:, :, 0]) <= 1e-4
    assert relative_error(theirs[:, :, 0], expected[:, :, 0]) > 0.1


def test_encoder_equals_diffusers(vae, diffusers_peer, video):
    posterior = diffusers_peer.encode(video).latent_dist
    ours = vae.encode(video)
    assert relative_error(ours.mean, posterior.mean) <= 1e-4
    assert relative_error(ours.logvar, posterior.logvar) <= 1e-4


def test_encoder_follows_genmo_where_comfyui_lets_the_future_in(vae, comfy_peer, video):
    first_frame = vae.encode(video[:, :, :1]).mean[:, :, 0]
    assert relative_error(vae.encode(video).mean[:, :, 0], first_frame) <= 1e-5
    assert relative_error(comfy_peer.encode(video)[:, :, 0], first_frame) > 0.01
