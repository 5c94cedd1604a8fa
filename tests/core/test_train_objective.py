"""The training objective: the definition, and gradients that checkpointing does not change."""

import pytest
import torch

from mochi_core.train.objective import velocity_loss
from mochi_core.train.tiny.dit import EVEN_ERROR, FAINT, USUAL_ERRORS, level_weights
from tests.harness.random_inputs import batch
from tests.harness.tiny_models import random_dit


def test_is_the_error_of_data_minus_noise():
    dit = random_dit()
    latents, embeds, mask, sigma, noise = batch()
    level = sigma[:, None, None, None, None]
    predicted = dit(level * noise + (1 - level) * latents, sigma, embeds, mask)
    expected = (predicted - (latents - noise)).square().mean()
    torch.testing.assert_close(velocity_loss(dit, *batch()), expected)


def test_frames_have_levels_of_their_own_and_those_without_noise_do_not_count():
    dit = random_dit()
    latents, embeds, mask, sigma, noise = batch()
    assert torch.equal(velocity_loss(dit, latents, embeds, mask, sigma, noise), velocity_loss(dit, *batch()))
    num_latents = latents.shape[2]
    equal = sigma[:, None].expand(-1, num_latents)
    torch.testing.assert_close(velocity_loss(dit, latents, embeds, mask, equal, noise), velocity_loss(dit, *batch()))

    levels = equal * torch.linspace(0, 1, num_latents)
    shares = levels[:, None, :, None, None]
    predicted = dit(shares * noise + (1 - shares) * latents, levels, embeds, mask)
    expected = (predicted - (latents - noise))[:, :, 1:].square().mean()
    torch.testing.assert_close(velocity_loss(dit, latents, embeds, mask, levels, noise), expected)


def test_levels_count_by_their_weights():
    dit = random_dit()
    latents, embeds, mask, sigma, noise = batch()
    parts = [
        velocity_loss(dit, latents[[i]], embeds[[i]], mask[[i]], sigma[[i]], noise[[i]]) for i in range(len(sigma))
    ]
    weights = torch.arange(1.0, len(sigma) + 1)
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True)) / len(parts)
    torch.testing.assert_close(velocity_loss(dit, latents, embeds, mask, sigma, noise, weights=weights), expected)


def test_usual_errors_of_the_tiny_model_count_as_much_at_every_level():
    levels, usual = (torch.tensor([*part]) for part in (USUAL_ERRORS, USUAL_ERRORS.values()))
    weighted = level_weights(levels) * usual
    expected = EVEN_ERROR * torch.where(levels < FAINT, levels / FAINT, 1)
    torch.testing.assert_close(weighted, expected)
    assert level_weights(torch.tensor([[0.925]])).shape == (1, 1)


def test_a_batch_without_noise_changes_nothing():
    dit = random_dit().requires_grad_(True)
    latents, embeds, mask, sigma, noise = batch()
    loss = velocity_loss(dit, latents, embeds, mask, torch.zeros_like(sigma), noise)
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in dit.parameters() if p.grad is not None)


@pytest.mark.parametrize("count", [1, 3])
def test_checkpointing_changes_no_gradient(count):
    gradients = []
    for checkpointed in (0, count):
        dit = random_dit().requires_grad_(True)
        velocity_loss(dit, *batch(), checkpointed).backward()
        gradients.append({name: parameter.grad for name, parameter in dit.named_parameters()})
    # The last block has no use for what its text tokens would ask for.
    assert {name for name, gradient in gradients[0].items() if not gradient.any()} == {"blocks.2.attn.q_norm_y.weight"}
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)
