import math
from itertools import pairwise

import pytest
import torch

from mochi_core import BlockCache, euler, guided, sample
from mochi_core.sampling.sample import prepared_velocities
from tests.harness.random_inputs import NOISE, SIGMAS, prompt
from tests.harness.tiny_models import random_dit


@pytest.fixture(scope="module")
def dit():
    return random_dit()


def test_euler_recovers_data_from_the_true_velocity():
    data = torch.randn_like(NOISE)
    torch.testing.assert_close(euler(lambda *_: data - NOISE, NOISE, SIGMAS), data)


def test_euler_calls_the_model_once_per_step_and_keeps_float32():
    calls = []
    result = euler(lambda x, step: (calls.append((step, x.dtype)), x.bfloat16())[1], NOISE, SIGMAS)
    assert calls == [(i, torch.float32) for i in range(5)]
    assert result.dtype == torch.float32


def test_guidance_formula_and_cost():
    counts = []

    def velocities(x, _, count):
        counts.append(count)
        return [x * 2, x * 5][:count]

    velocity = guided(velocities, [3.0, 1.0])
    torch.testing.assert_close(velocity(NOISE, 0), NOISE * (5 + 3 * (2 - 5)))
    torch.testing.assert_close(velocity(NOISE, 1), NOISE * 2)
    assert counts == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(6, 0), (16, 3), (0, 0)])
def test_a_guided_pair_equals_two_passes(lengths, dtype):
    dit = random_dit(dtype=dtype)
    noise = torch.cat((NOISE, NOISE.flip(-1)))
    conditions = [prompt(length, seed) for seed, length in enumerate(lengths)]
    pair = prepared_velocities(dit, noise, SIGMAS, conditions)(noise, 2, 2)
    for velocity, condition in zip(pair, conditions, strict=True):
        assert torch.equal(velocity, prepared_velocities(dit, noise, SIGMAS, [condition])(noise, 2, 1)[0])


def test_a_guided_step_visits_every_block_once(dit):
    visits = []
    hooks = [block.register_forward_hook(lambda *_, i=i: visits.append(i)) for i, block in enumerate(dit.blocks)]
    sample(dit, NOISE, SIGMAS[:2], prompt(6), prompt(2))
    assert visits == [0, 0, 1, 1, 2, 2]
    for hook in hooks:
        hook.remove()


def test_sample_equals_the_plain_loop(dit):
    cond, uncond = prompt(6), prompt(0)
    x = NOISE
    for here, after in pairwise(SIGMAS):
        positive, negative = (dit(x, here.view(1), *condition) for condition in (cond, uncond))
        x = x + (here - after) * (negative + 4.5 * (positive - negative))
    torch.testing.assert_close(sample(dit, NOISE, SIGMAS, cond, uncond), x, rtol=1e-4, atol=1e-4)


def test_guidance_may_change_per_step(dit):
    cond, uncond = prompt(6), prompt(2, seed=1)
    constant = sample(dit, NOISE, SIGMAS, cond, uncond, 3.0)
    assert torch.equal(sample(dit, NOISE, SIGMAS, cond, uncond, [3.0] * 5), constant)
    assert not torch.equal(sample(dit, NOISE, SIGMAS, cond, uncond, [3.0, 3.0, 1.0, 1.0, 1.0]), constant)


def test_without_guidance_no_negative_prompt_is_needed(dit):
    cond = prompt(6)
    velocities = prepared_velocities(dit, NOISE, SIGMAS, [cond])
    expected = euler(lambda latents, step: velocities(latents, step, 1)[0], NOISE, SIGMAS)
    torch.testing.assert_close(sample(dit, NOISE, SIGMAS, cond, None, 1.0), expected)
    with pytest.raises(ValueError, match="negative prompt"):
        sample(dit, NOISE, SIGMAS, cond, None, 2.0)


def test_one_prompt_serves_a_batch(dit):
    noise = torch.cat((NOISE, NOISE.flip(-1)))
    together = sample(dit, noise, SIGMAS, prompt(6), prompt(0))
    for i in range(2):
        alone = sample(dit, noise[i : i + 1], SIGMAS, prompt(6), prompt(0))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_prompt_count_must_fit(dit):
    with pytest.raises(ValueError, match="prompts for 2 videos, but noise for 3"):
        sample(dit, NOISE.repeat(3, 1, 1, 1, 1), SIGMAS, prompt(6, batch=2), None, 1.0)


def test_scale_count_must_fit(dit):
    with pytest.raises(ValueError, match="2 entries; 5 steps"):
        sample(dit, NOISE, SIGMAS, prompt(6), prompt(0), [1.0, 2.0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigmas": SIGMAS[:0]}, r"sigmas have shape \(0,\), but must be one-dimensional"),
        ({"sigmas": SIGMAS[:1]}, r"sigmas have shape \(1,\), but must be one-dimensional"),
        ({"sigmas": torch.tensor([1.0, math.nan, 0.0])}, r"sigmas\[1\] is nan"),
        ({"sigmas": torch.tensor([1.0, 0.0, 0.5])}, r"sigmas\[2\] is 0.5 after 0, but .* levels must fall"),
        ({"sigmas": torch.tensor([14.6, 3.0, 0.0])}, r"sigmas\[0\] is 14.6, but noise levels go from 1"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_scale": [4.5, 4.5, 4.5, 4.5, math.inf]}, "guidance_scale is inf"),
        ({"noise": NOISE[:0]}, r"latents have shape \(0, 12, "),
        ({"noise": NOISE[..., :0, :]}, "with at least one of each"),
        ({"noise": NOISE[:, :4]}, r"Mochi's are \(batch, 12, T, H, W\)"),
        ({"noise": NOISE.long()}, "latents are int64, but must be floating point"),
        ({"noise": NOISE * math.nan}, "infinite or NaN values out of"),
        ({"cache": {"threshold": math.inf}}, "threshold is inf"),
        ({"cache": {"threshold": 0.1, "start": math.nan}}, "start is nan"),
    ],
)
def test_no_run_without_steps_and_numbers(dit, wrong, message):
    right = {"noise": NOISE, "sigmas": SIGMAS, "cond": prompt(6), "uncond": prompt(0)}
    with pytest.raises(ValueError, match=message):
        cache = {"cache": BlockCache("teacache", **wrong["cache"])} if "cache" in wrong else {}
        sample(dit, **{**right, **wrong, **cache})


def test_on_step_sees_every_step_and_can_stop(dit):
    seen = []
    full = sample(dit, NOISE, SIGMAS, prompt(6), None, 1.0, on_step=lambda i, x: seen.append((i, x.clone())))
    assert [i for i, _ in seen] == list(range(5))
    assert torch.equal(seen[-1][1], full)
    stopped = sample(dit, NOISE, SIGMAS, prompt(6), None, 1.0, on_step=lambda i, _: i == 2)
    assert torch.equal(stopped, seen[2][1])


def test_inputs_are_left_alone(dit):
    noise, (embeds, mask) = NOISE.clone(), prompt(6)
    before = embeds.clone()
    sample(dit, noise, SIGMAS, (embeds, mask), prompt(0))
    assert torch.equal(noise, NOISE)
    assert torch.equal(embeds, before)
