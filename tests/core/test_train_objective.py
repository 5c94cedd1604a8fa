"""The training objective: its definition, and that checkpointing does not change gradients."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mochi_core.train.objective import velocity_loss
from mochi_core.train.tiny.dit import Clips, TinyMochi, level_weights, loss
from tests.harness import trained
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
    by_frame = weights[:, None].expand(-1, latents.shape[2])
    levels = sigma[:, None].expand_as(by_frame)
    torch.testing.assert_close(velocity_loss(dit, latents, embeds, mask, levels, noise, weights=by_frame), expected)


def test_weights_bring_usual_errors_to_one_size():
    weights = level_weights(torch.tensor([[0.15, 0.85], [0.9, 1.0]]))  # between 0.123 and 0.0735, 0.074 and 0.178
    expected = torch.tensor([[0.12 / 0.09825 / 2, 0.12 / 0.126], [0.12 / 0.178, 0.12 / 0.717]])
    torch.testing.assert_close(weights, expected)


def test_details_are_learned_with_levels_by_frame_too():
    """Untrained, errors are about equal at every noise level, and most levels have a weight above 1."""
    captions = ["a red star rising"] * 2
    clips = Clips(torch.randn(2, 12, 3, 4, 4), captions, torch.tensor([6, 6]))
    tiny, tokenizer = TinyMochi(), AutoTokenizer.from_pretrained(trained.TOKENIZER, local_files_only=True)
    plain, details = (
        loss(tiny, tokenizer, clips, np.random.default_rng(0), 1.0, details=details) for details in (False, True)
    )
    assert 0 < plain < details


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
    # The last block does not use the queries of its text tokens.
    assert {name for name, gradient in gradients[0].items() if not gradient.any()} == {"blocks.2.attn.q_norm_y.weight"}
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)
