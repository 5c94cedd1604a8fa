"""Skipping blocks: exact if no change is allowed, less work if some is, and each video independent of the others."""

import gc

import pytest
import torch

from mochi_core import BlockCache, VideoSize, euler, guidance_schedule, linear_quadratic_schedule, sample
from mochi_core.__main__ import main
from mochi_core.choices import CACHE_METHODS
from mochi_core.pipeline import initial_noise
from mochi_core.sampling.block_cache import LARGEST_FITTED, CacheState, output_change
from mochi_core.sampling.sample import prepared_velocities
from mochi_core.transformer.offload import stream_blocks
from tests.harness import trained

LOOSE = {"teacache": 0.085, "first_block": 0.04}
STEPS = 24
SIGMAS = linear_quadratic_schedule(STEPS)
NOISE = initial_noise(VideoSize(64, 64, 7).latent_shape(2), seed=0)


@pytest.fixture(scope="module")
def dit():
    return trained.denoiser()


def prompts(dit, *lengths):
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(len(lengths), 16, dit.config.text_width, generator=generator)
    return embeds, torch.arange(16) < torch.tensor(lengths)[:, None]


def one(condition, i):
    return condition[0][i : i + 1], condition[1][i : i + 1]


@pytest.fixture
def block_calls(dit):
    """Number of videos that each block has processed."""
    calls = [0] * dit.config.depth
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs, i=i: calls.__setitem__(i, calls[i] + len(inputs[0])))
        for i, block in enumerate(dit.blocks)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("method", CACHE_METHODS)
def test_threshold_0_changes_nothing(dit, method):
    cond, uncond = prompts(dit, 6, 3), prompts(dit, 0)
    cache = BlockCache(method, 0)
    assert torch.equal(sample(dit, NOISE, SIGMAS, cond, uncond, cache=cache), sample(dit, NOISE, SIGMAS, cond, uncond))
    assert (cache.forwards, cache.hits) == (4 * STEPS, 0)


@pytest.mark.parametrize("method", CACHE_METHODS)
def test_a_loose_threshold_skips_the_blocks_that_it_reports(dit, block_calls, method):
    cond, uncond = prompts(dit, 6, 3), prompts(dit, 0)
    exact = sample(dit, NOISE, SIGMAS, cond, uncond)
    assert block_calls == [4 * STEPS] * dit.config.depth
    block_calls[:] = [0] * dit.config.depth
    cache = BlockCache(method, LOOSE[method])
    cached = sample(dit, NOISE, SIGMAS, cond, uncond, cache=cache)
    left = 4 * STEPS - cache.hits
    assert block_calls == [left if method == "teacache" else 4 * STEPS] + [left] * (dit.config.depth - 1)
    assert 0.1 < cache.hit_rate < 0.6
    assert f"{cache.hits} of {4 * STEPS}" in cache.report()
    assert 0 < (cached - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("method", CACHE_METHODS)
def test_each_video_of_a_batch_decides_for_itself(dit, method):
    noise = torch.cat((NOISE[:1], NOISE[1:] * 0.1))
    cond, uncond = prompts(dit, 9, 0), prompts(dit, 0, 4)
    together, rates = BlockCache(method, LOOSE[method]), []
    batch = sample(dit, noise, SIGMAS, cond, uncond, cache=together)
    for i in range(2):
        alone = BlockCache(method, LOOSE[method])
        result = sample(dit, noise[i : i + 1], SIGMAS, one(cond, i), one(uncond, i), cache=alone)
        torch.testing.assert_close(batch[i : i + 1], result, rtol=1e-3, atol=1e-3)
        rates.append(alone.hits)
    assert together.hits == sum(rates)
    assert rates[0] != rates[1], "no step had one video computed and the other not"


@pytest.mark.parametrize("method", CACHE_METHODS)
def test_one_prompt_serves_a_batch(dit, method):
    cond = prompts(dit, 6)
    batch = sample(dit, NOISE, SIGMAS, cond, guidance_scale=1, cache=BlockCache(method, LOOSE[method]))
    alone = sample(dit, NOISE[1:], SIGMAS, cond, guidance_scale=1, cache=BlockCache(method, LOOSE[method]))
    torch.testing.assert_close(batch[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", CACHE_METHODS)
def test_first_and_last_step_and_those_outside_of_the_range_are_computed(dit, method):
    computed = []

    def recorded(**step_range):
        cache = BlockCache(method, 1e6, **step_range)
        velocities = prepared_velocities(dit, NOISE[:1], SIGMAS, [prompts(dit, 6)], cache=cache)

        def record(latents, step):
            before = cache.hits
            (result,) = velocities(latents, step, 1)
            if cache.hits == before:
                computed.append(step)
            return result

        computed.clear()
        with torch.no_grad():
            euler(record, NOISE[:1], SIGMAS)
        return computed

    assert recorded() == [0, STEPS - 1]
    assert recorded(start=0.25, end=0.75) == [*range(6), *range(18, 24)]


def test_a_run_leaves_nothing_behind(dit):
    cond, uncond = prompts(dit, 6), prompts(dit, 0)
    cache = BlockCache("teacache", 0.09)
    first = sample(dit, NOISE[:1], SIGMAS, cond, uncond, cache=cache)
    hits = cache.hits
    assert torch.equal(sample(dit, NOISE[:1], SIGMAS, cond, uncond, cache=cache), first)
    assert cache.hits == 2 * hits
    assert not [found for found in gc.get_objects() if type(found) is CacheState]


def test_a_condition_that_was_not_asked_for_compares_with_its_own_last_step(dit):
    cond, uncond = prompts(dit, 6), prompts(dit, 0)
    scales = guidance_schedule(STEPS, 4.5, start=0.25, end=0.75)
    cache = BlockCache("teacache", 0)
    exact = sample(dit, NOISE[:1], SIGMAS, cond, uncond, scales)
    assert torch.equal(sample(dit, NOISE[:1], SIGMAS, cond, uncond, scales, cache=cache), exact)
    assert cache.forwards == STEPS + 12


def test_streamed_blocks_may_be_skipped(dit):
    arguments = dit, NOISE[:1], SIGMAS, prompts(dit, 6), prompts(dit, 0)
    here = sample(*arguments, cache=BlockCache("first_block", 0.03))
    with stream_blocks(dit, "cpu"):
        assert torch.equal(sample(*arguments, cache=BlockCache("first_block", 0.03)), here)


def test_teacaches_polynomial():
    assert output_change(0.0) == pytest.approx(3.05291719e-3)
    x = 0.05
    expected = -3.51241319e3 * x**4 + 8.11675948e2 * x**3 - 6.09400215e1 * x**2 + 2.42429681 * x + 3.05291719e-3
    assert output_change(x) == pytest.approx(expected)
    values = [output_change(LARGEST_FITTED * i / 100) for i in range(400)]
    assert values == sorted(values), "a larger change of the input never counts as a smaller one of the output"
    assert values[0] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fora", 0.1), "method is 'fora'; use one of teacache, first_block"),
        (("teacache", -1), r"threshold is -1; use 0 \(off\) or more"),
        (("teacache", float("nan")), "threshold is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockCache(*arguments)


def test_shell(tmp_path, capsys):
    arguments = [
        "generate", "--transformer", trained.TRANSFORMER, "--t5", trained.T5, "--vae", trained.VAE,
        "--prompt", "a red star", "--height", 64, "--width", 64, "--frames", 7, "--steps", 12, "--dtype", "fp32",
        "-o", tmp_path / "out.latent", "--device", "cpu",
    ]  # fmt: skip
    assert main([*map(str, arguments), "--cache", "teacache:0.09"]) == 0
    assert "teacache with threshold 0.09 skipped blocks in " in capsys.readouterr().err
    for given, message in {
        "teacache": "argument --cache: teacache is not METHOD:THRESHOLD; use e.g. teacache:0.06 or first_block:0.1.",
        "fora:0.1": "argument --cache: fora:0.1: The cache method is 'fora'; use one of teacache, first_block.",
    }.items():
        with pytest.raises(SystemExit):
            main([*map(str, arguments), "--cache", given])
        assert message in capsys.readouterr().err
