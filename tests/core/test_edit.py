"""FlowEdit and RF inversion: exact cases, formulas and cost."""

import argparse
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mochi_core import geometry, linear_quadratic_schedule, save_video
from mochi_core.__main__ import main
from mochi_core.edit_video import edit_file
from mochi_core.io.read_frames import read_frames
from mochi_core.options import add_edit
from mochi_core.sampling.edit import TRENDS, edit, edit_by_inversion, flow_edit, fresh_noise, invert, pulls, rf_edit
from mochi_core.sampling.sample import prepared_velocities
from mochi_core.sampling.schedule import schedule_below
from tests.harness import trained
from tests.harness.random_inputs import NOISE, prompt
from tests.harness.tiny_models import random_dit

CLEAN = torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(11))
FALLING = schedule_below(0.9, 6)
RISING = linear_quadratic_schedule(6).flip(0)


@pytest.fixture(scope="module")
def dit():
    return random_dit()


def curved(shift):
    """A velocity with curved paths that depends on the prompt through `shift`."""
    return lambda x, step: torch.sin(x * 1.7 + shift) - 0.1 * step


def test_equal_velocities_leave_the_video_bit_for_bit():
    assert torch.equal(flow_edit(curved(0.3), curved(0.3), CLEAN, FALLING, fresh_noise(CLEAN, 1)), CLEAN)
    other = flow_edit(curved(0.3), curved(0.4), CLEAN, FALLING, fresh_noise(CLEAN, 1))
    assert (other - CLEAN).norm() / CLEAN.norm() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_prompts_and_scales_leave_the_video_bit_for_bit(dtype):
    dit, negative = random_dit(dtype=dtype), prompt(2, seed=1)

    def edited(target, source_scale, scale):
        return edit(dit, CLEAN, FALLING, prompt(6), target, negative, source_scale, scale, seed=5)

    assert torch.equal(edited(prompt(6), 3.0, 3.0), CLEAN)
    assert not torch.equal(edited(prompt(6), 3.0, 3.5), CLEAN)
    assert not torch.equal(edited(prompt(7), 3.0, 3.0), CLEAN)


def test_flow_edit_is_the_published_loop():
    found = flow_edit(curved(0.0), curved(0.5), CLEAN, FALLING, fresh_noise(CLEAN, 3))
    generator, z = torch.Generator().manual_seed(3), CLEAN.double()
    for step, (now, after) in enumerate(pairwise(FALLING.double().tolist())):
        noised = (1 - now) * CLEAN + now * torch.randn(CLEAN.shape, generator=generator)
        z = z + (now - after) * (curved(0.5)(z + noised - CLEAN, step) - curved(0.0)(noised, step))
    torch.testing.assert_close(found.double(), z, rtol=1e-5, atol=1e-5)


def test_an_edit_costs_four_forwards_a_step_in_two_passes(dit):
    calls = []
    hook = dit.blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    embedded = dit.x_embedder.register_forward_hook(lambda *_: calls.append("pass"))
    seen = []
    edit(dit, CLEAN, FALLING, prompt(6), prompt(7), prompt(0), on_step=lambda step, _: seen.append(step))
    assert calls == ["pass", "block", "block"] * 2 * 6
    assert seen == list(range(6))
    hook.remove()
    embedded.remove()


def test_an_edit_can_be_stopped(dit):
    seen = []
    found = edit(dit, CLEAN, FALLING, prompt(6), prompt(7), prompt(0), on_step=lambda i, x: (seen.append(x), i == 1)[1])
    assert len(seen) == 2
    assert torch.equal(found, seen[-1])


def test_inversion_of_a_straight_flow_gives_its_noise_and_back():
    straight = lambda *_: CLEAN - NOISE  # noqa: E731
    noise = invert(straight, CLEAN, RISING)
    torch.testing.assert_close(noise, NOISE, rtol=1e-5, atol=1e-5)
    back = rf_edit(straight, noise, torch.zeros_like(CLEAN), RISING.flip(0), [0.0] * 6)
    torch.testing.assert_close(back, CLEAN, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_inversion_is_the_published_loop(gamma):
    found, x = invert(curved(0.2), CLEAN, RISING, gamma, NOISE), CLEAN.double()
    for step, (now, after) in enumerate(pairwise(RISING.double().tolist())):
        upwards = -curved(0.2)(x, step)
        x = x + (after - now) * (upwards + gamma * ((NOISE - x) / (1 - now) - upwards))
    torch.testing.assert_close(found.double(), x, rtol=1e-5, atol=1e-5)
    if gamma == 1:
        torch.testing.assert_close(found, NOISE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [(1.0, 0.8), (0.99, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("trend", TRENDS)
def test_rf_edit_is_the_published_loop(trend, window):
    sigmas = linear_quadratic_schedule(9)
    etas = pulls(sigmas, 0.7, *window, trend)
    found, x = rf_edit(curved(0.2), NOISE, CLEAN, sigmas, etas), NOISE.double()
    inside = [i for i, sigma in enumerate(sigmas[:-1].tolist()) if window[1] <= sigma <= window[0]]
    for step, (now, after) in enumerate(pairwise(sigmas.double().tolist())):
        velocity, eta = curved(0.2)(x, step), 0.0
        if step in inside:
            progress = inside.index(step) / (len(inside) - 1)
            eta = 0.7 * {"constant": 1, "linear_decrease": 1 - progress, "linear_increase": progress}[trend]
        x = x + (now - after) * (velocity + eta * ((CLEAN - x) / now - velocity))
    torch.testing.assert_close(found.double(), x, rtol=1e-5, atol=1e-5)


def test_eta_1_to_the_end_gives_the_given_video(dit):
    sigmas = linear_quadratic_schedule(12)
    velocities = prepared_velocities(dit, NOISE, sigmas, [prompt(6)])
    velocity = lambda x, step: velocities(x, step, 1)[0]  # noqa: E731
    found = rf_edit(velocity, NOISE, CLEAN, sigmas, pulls(sigmas, 1.0, 0.9, 0.0))
    torch.testing.assert_close(found, CLEAN, rtol=1e-5, atol=1e-5)
    shorter = rf_edit(velocity, NOISE, CLEAN, sigmas, pulls(sigmas, 1.0, 1.0, 0.9))
    assert (shorter - CLEAN).norm() / CLEAN.norm() > 0.1


@pytest.mark.parametrize("start", [1.0, 0.9, 0.3, 0.01])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_a_schedule_from_any_level(start, steps):
    sigmas = schedule_below(start, steps)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == torch.tensor(start)
    assert sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    if start == 1:
        assert torch.equal(sigmas, linear_quadratic_schedule(steps))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule_below(0.0, 4), "starting noise level is 0.0; use a level"),
        (lambda: schedule_below(math.nan, 4), "starting noise level is nan"),
        (lambda: schedule_below(0.9, 0), "needs at least 1 step"),
        (lambda: schedule_below(1e-9, 4), "4 steps from noise level 1e-09 are too many; start from a higher level"),
        (lambda: rf_edit(curved(0), CLEAN, CLEAN, RISING, [0.0] * 9), "levels must fall; reverse the schedule"),
        (lambda: invert(curved(0), CLEAN, FALLING), "must rise; reverse the schedule"),
        (lambda: invert(curved(0), CLEAN, RISING[:1]), r"give steps \+ 1 noise levels"),
        (lambda: invert(curved(0), CLEAN, torch.tensor([0.5, 1.001])), "from 0.5 to 1.001, but pure noise is level 1"),
        (lambda: invert(curved(0), CLEAN, torch.tensor([0.5, 1, 1.000001])), "from 1 to 1.000001, but pure noise"),
        (lambda: pulls(FALLING, math.inf, 1, 0), "eta is inf"),
        (lambda: pulls(FALLING, 1.1, 1, 0), "eta is 1.1, but must be from 0"),
        (lambda: pulls(FALLING, 0.5, 1, 1.5), "down to noise level 1.5; use a level from 0 to 1"),
        (lambda: pulls(FALLING, 0.5, math.nan, 0), "from noise level nan"),
        (lambda: pulls(FALLING, 0.5, 0.2, 0.9), "start is 0.2, below the end 0.9"),
        (lambda: pulls(FALLING, 0.5, 1, 0, "cosine"), "trend is 'cosine'; use one of constant"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_shifted_schedule_that_rounds_to_more_than_1_is_noise_alone():
    """ModelSamplingSD3's formula in float32, with shift 1.57."""
    levels = torch.arange(4, -1, -1) / 4
    sigmas = 1.57 * levels / (1 + (1.57 - 1) * levels)
    assert sigmas[0] > 1
    straight = lambda *_: CLEAN - NOISE  # noqa: E731
    noise = invert(straight, CLEAN, sigmas.flip(0), 0.5, NOISE)
    torch.testing.assert_close(noise, NOISE, rtol=1e-5, atol=1e-5)
    assert pulls(sigmas, 0.7, 1.0, 0.8) == [0.7, 0.7, 0.0, 0.0]


@pytest.mark.parametrize("last", [1, 3, 6])
def test_an_edit_by_inversion_can_be_stopped_on_both_ways(dit, last):
    """Step 3 of 4 is the last on the way up; stopped there, the way back does not begin."""
    seen = []
    found = edit_by_inversion(
        dit, CLEAN, linear_quadratic_schedule(4), prompt(6), prompt(7), prompt(0),
        on_step=lambda step, latents: (seen.append(latents), step == last)[1],
    )  # fmt: skip
    assert len(seen) == last + 1
    assert torch.equal(found, seen[-1])


@pytest.mark.parametrize(
    ("clean", "sigmas", "scale", "message"),
    [
        (torch.zeros(1, 11, 2, 4, 4), FALLING, 5.5, r"latents have shape \(1, 11, 2, 4, 4\)"),
        (CLEAN * math.nan, FALLING, 5.5, "latents"),
        (CLEAN, FALLING, math.nan, "^scale is nan"),
        (CLEAN, RISING, 5.5, r"sigmas\[1\] is .* after .*, but from noise to a video, levels must fall"),
    ],
)
def test_what_cannot_be_edited_is_refused(dit, clean, sigmas, scale, message):
    with pytest.raises(ValueError, match=message):
        edit(dit, clean, sigmas, prompt(3), prompt(4), prompt(0), scale=scale)


def test_inversion_and_the_way_back_cost_three_forwards_a_step(dit):
    calls, seen = [], []
    hook = dit.blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    sigmas, prompts = linear_quadratic_schedule(5), (prompt(6), prompt(7), prompt(0))
    found = edit_by_inversion(dit, CLEAN, sigmas, *prompts, eta=0.0, on_step=lambda step, _: seen.append(step))
    assert (len(calls), seen) == (3 * 5, list(range(10)))
    hook.remove()
    pulled = edit_by_inversion(dit, CLEAN, sigmas, *prompts, eta=1.0, end=0.0)
    torch.testing.assert_close(pulled, CLEAN, rtol=1e-5, atol=1e-5)
    assert (found - CLEAN).norm() > 0.1 * CLEAN.norm()


FILES = ["--transformer", str(trained.TRANSFORMER), "--t5", str(trained.T5), "--vae", str(trained.VAE)]
ASKED = ["--source-prompt", "a red square moving to the right", "--prompt", "a blue square moving to the right"]
TINY = ["--height", "64", "--width", "64", "--steps", "4", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def source(tmp_path):
    """A red square that moves to the right over 15 frames, as a file."""
    frames = np.zeros((15, 64, 64, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[20:44, 4 + 2 * i : 28 + 2 * i] = 230, 25, 25
    save_video(frames, tmp_path / "source.mp4")
    return tmp_path / "source.mp4"


def edited(source, *options):
    made = source.with_name("edited.mp4")
    assert main(["edit", *FILES, *ASKED, *TINY, "--video", str(source), *options, "-o", str(made)]) == 0
    return read_frames(made, 64, 64).astype(int)


@pytest.mark.parametrize(
    "nothing",
    [
        ["--prompt", ASKED[1], "--guidance", "2", "--source-guidance", "2", "--offload"],
        ["--inversion", "--eta", "1", "--pull-until", "0"],
    ],
)
def test_command_line_gives_the_video_back_where_nothing_is_changed(source, nothing):
    before, after = read_frames(source, 64, 64, 13).astype(int), edited(source, *nothing)
    assert after.shape == before.shape
    assert np.abs(after - before).mean() < 8, "the autoencoder and two files are between them"


def test_command_line_edits_the_first_frames(source, capsys):
    before, after = read_frames(source, 64, 64, 7).astype(int), edited(source, "--frames", "7")
    assert after.shape == before.shape
    inside = before[..., 0] > 150
    red, blue = (after[inside][:, channel].mean() for channel in (0, 2))
    assert blue > red, "the square is blue"
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(source.with_name("edited.mp4"))]
    assert said.err.count("loading the ") == 3
    assert said.err.index("part/s") < said.err.index("4/4") < said.err.index("7/7"), "encoding, steps, decoding"
    other = edited(source, "--frames", "7", "--inversion", "--pull-until", "0.98")
    assert np.abs(other - after).mean() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "none.mp4"], "none.mp4 cannot be used: there is no such file"),
        (["--video", "."], ". cannot be used: it is a folder; choose a file."),
        (["--frames", "8"], "num_frames is 8, but Mochi needs 6k + 1 frames"),
        (["--frames", "0"], "num_frames is 0, but Mochi needs 6k + 1 frames"),
        (["--start-noise", "0"], "The starting noise level is 0.0; use a level"),
        (["--guidance", "nan"], "guidance is nan, but must be finite"),
        (["--inversion", "--eta", "5"], "eta is 5, but must be from 0"),
        (["--inversion", "--pull-until", "1.5"], "The pull is down to noise level 1.5; use a level from 0 to 1"),
    ],
)
def test_command_line_refuses_before_models_are_loaded(source, capsys, options, message):
    models = ["--transformer", "none", "--t5", "none", "--vae", "none", "-o", str(source.with_name("x.mp4"))]
    assert main(["edit", *models, *ASKED, "--video", str(source), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_video_that_is_too_long_is_refused_and_not_cut(source, capsys, monkeypatch):
    """13 of the video's 15 frames are used (6k + 1): three latents of 16 tokens."""
    models = ["--transformer", "none", "--t5", "none", "--vae", "none", "-o", str(source.with_name("x.mp4"))]
    for most, refused in ((47, True), (48, False)):
        monkeypatch.setattr(geometry, "MAX_VIDEO_TOKENS", most)
        assert main(["edit", *models, *ASKED, *TINY, "--video", str(source)]) == 2
        sentence = f"A video of 13 frames of 64 x 64 pixels would exceed the limit of {most} tokens at once"
        assert (sentence in capsys.readouterr().err) == refused


@pytest.mark.parametrize(("way", "expected"), [([], (30, 5.5)), (["--inversion"], (50, 4.5))])
def test_steps_and_guidance_that_are_not_given_are_those_of_the_nodes(source, way, expected):
    parser = argparse.ArgumentParser()
    add_edit(parser)
    models = ["--transformer", "none", "--t5", "none", "--vae", "none"]
    options = parser.parse_args([*models, *ASKED, "--video", str(source.with_name("none.mp4")), *way])
    options.output = source.with_name("x.mp4")
    with pytest.raises(ValueError, match="there is no such file"):
        edit_file(options)
    assert (options.steps, options.guidance) == expected
