"""The denoiser against diffusers' and ComfyUI's own."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch

from mochi_core import AsymmDiT, AsymmDiTConfig
from tests.harness.numbers import relative_error
from tests.harness.peers import comfy_dit, diffusers_dit, from_comfyui, from_diffusers, inputs, prefix_mask
from tests.harness.tiny_models import DIT, random_dit

FULL_WIDTH = AsymmDiTConfig(depth=2)
FEW = (2, 8, 10)
"""Latents with few tokens: many are slow at full width, and the comparison does not depend on their number."""
GRID = (1, 20, 36)
"""A ninth of the tokens of 848x480 over the same range of positions, which are scaled so that every grid covers the same area."""


@pytest.fixture(scope="module")
def model():
    return random_dit(FULL_WIDTH)


@pytest.fixture(scope="module")
def ours(model):
    """(inputs, our model's outputs) by the number of valid tokens."""

    @cache
    def by_length(valid):
        arguments = *inputs(model.config.text_width, FEW), prefix_mask(valid)
        return arguments, model(*arguments)

    return by_length


@pytest.fixture(scope="module")
def diffusers_peer(model):
    return diffusers_dit(model)


@pytest.fixture(scope="module")
def comfy_peer(model, comfyui):  # noqa: ARG001 - ComfyUI's class only accepts the released width
    return comfy_dit(model)


@pytest.mark.parametrize("valid", [0, 1, 20, 256])
def test_tiny_model_equals_diffusers(valid):
    model = random_dit(DIT)
    latents, sigma, embeds = inputs(model.config.text_width)
    mask = prefix_mask(valid)
    expected = from_diffusers(diffusers_dit(model), latents, sigma, embeds, mask)
    assert relative_error(model(latents, sigma, embeds, mask), expected) <= 1e-5


def test_more_tokens_than_are_normed_at_a_time_equal_diffusers():
    model = random_dit(DIT)
    latents, sigma, embeds = inputs(model.config.text_width, (2, 60, 106))
    mask = prefix_mask(20)
    expected = from_diffusers(diffusers_dit(model), latents, sigma, embeds, mask)
    assert relative_error(model(latents, sigma, embeds, mask), expected) <= 1e-5


@pytest.mark.parametrize("valid", [0, 20, 256])
def test_equals_diffusers(ours, diffusers_peer, valid):
    arguments, velocity = ours(valid)
    assert relative_error(velocity, from_diffusers(diffusers_peer, *arguments)) <= 1e-5


@pytest.mark.parametrize("valid", [1, 20, 256])
def test_equals_comfyui(ours, comfy_peer, valid):
    arguments, velocity = ours(valid)
    assert relative_error(velocity, from_comfyui(comfy_peer, *arguments)) <= 1e-5


def test_empty_prompt_follows_genmo_where_comfyui_keeps_one_token(ours, comfy_peer):
    arguments, velocity = ours(0)
    assert relative_error(from_comfyui(comfy_peer, *arguments), velocity) > 1e-3


def test_unequal_prompts_in_a_batch_where_comfyui_attends_to_padding(model, diffusers_peer, comfy_peer):
    latents, sigma, embeds = inputs(model.config.text_width, FEW, batch=2)
    mask = prefix_mask(77, 20)
    ours = model(latents, sigma, embeds, mask)
    assert relative_error(ours, from_diffusers(diffusers_peer, latents, sigma, embeds, mask)) <= 1e-5
    theirs = -comfy_peer(latents, sigma, embeds, mask, 77)
    assert relative_error(theirs[0], ours[0]) <= 1e-5
    assert relative_error(theirs[1], ours[1]) > 1e-3


@pytest.fixture(scope="module")
def default_initialised_dit():
    """PyTorch's own initialisation, norm weights 1, frequencies up to 1 radian per position."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        dit = AsymmDiT(replace(FULL_WIDTH, depth=1))
        dit.pos_frequencies.uniform_()
    return dit.requires_grad_(False).eval()


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("sharpness", [1, 3])
def test_bf16_error_over_the_real_range_of_positions_is_the_smallest(default_initialised_dit, comfyui, sharpness):  # noqa: ARG001
    """Errors of bf16 models against one float32 model; sharper q/k norms make attention less forgiving."""
    exact = default_initialised_dit
    for block in exact.joint_blocks():
        for norm in (block.attn.q_norm_x, block.attn.k_norm_x, block.attn.q_norm_y, block.attn.k_norm_y):
            norm.weight.fill_(sharpness)
    latents, sigma, embeds = inputs(4096, GRID)
    mask = prefix_mask(77)
    expected = exact(latents, sigma, embeds, mask)

    ours = deepcopy(exact).to(torch.bfloat16)
    error = relative_error(ours(latents, sigma, embeds, mask), expected)
    half = diffusers_dit(exact).to(torch.bfloat16)
    diffusers_error = relative_error(from_diffusers(half, latents, sigma, embeds, mask), expected)
    del half
    comfyui_error = relative_error(from_comfyui(comfy_dit(ours), latents, sigma, embeds, mask), expected)
    print(f"bf16 error x{sharpness}: ours {error:.2e}, diffusers {diffusers_error:.2e}, ComfyUI {comfyui_error:.2e}")
    assert error <= 0.0075
    assert error <= min(diffusers_error, comfyui_error)
