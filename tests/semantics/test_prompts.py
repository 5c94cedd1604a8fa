"""Whether videos of the trained tiny model show what their prompts say, and whether mistakes would be noticed."""

from itertools import combinations

import numpy as np
import pytest
import torch

from mochi_core import MochiPipeline, load_transformer, normalize_latents
from mochi_core.train.tiny.shapes import COLORS
from tests.harness import trained
from tests.harness.semantics import (
    CASES,
    CLEAN,
    FEW,
    STEPS,
    main_color,
    main_shape,
    scores,
    scores_of,
    shown_colors,
    videos,
)

SAME_LATENTS = 0.165
PROMPTS = [prompt for *_, prompt in CASES]


@pytest.fixture(scope="module")
def seeds(pytestconfig):
    """The seeds: with `--all` two, as in the table in docs/train.md."""
    return (0, 1) if pytestconfig.getoption("--all") else (0,)


def of_all_cases(pipe, seeds, **arguments):
    return [frames for seed in seeds for frames in videos(pipe, PROMPTS, seed, **arguments)]


@pytest.fixture(scope="module")
def guided(pipe, seeds):
    return of_all_cases(pipe, seeds)


def test_colors_and_directions_are_those_of_the_prompts(guided, seeds):
    colors, ways, dirt = scores(guided, CASES * len(seeds))
    print(f"right colour in {colors:.0%}, direction in {ways:.0%} of {len(guided)} videos, {dirt:.3f} astray")
    assert colors >= 0.9
    assert ways >= 0.85
    assert dirt < CLEAN


def right_shapes(made):
    """Share of videos with the prompt's shape."""
    cases = CASES * (len(made) // len(CASES))
    return np.mean([str(main_shape(f, color)) in prompt for f, (color, _, prompt) in zip(made, cases, strict=True)])


def test_without_guidance_prompts_are_followed_less(pipe, guided, seeds):
    with_guidance, without = right_shapes(guided), right_shapes(of_all_cases(pipe, seeds, guidance_scale=1.0))
    print(f"right shape in {with_guidance:.0%} with guidance, in {without:.0%} without")
    assert with_guidance >= 0.9
    assert without < with_guidance - 0.1


def test_two_shapes_in_one_prompt(pipe):
    pairs = list(combinations(COLORS, 2))
    prompts = [f"a {first} circle moving left and a {second} square rising" for first, second in pairs]
    seen = [set(shown_colors(frames)) >= set(pair) for frames, pair in zip(videos(pipe, prompts), pairs, strict=True)]
    print(f"both colours in {np.mean(seen):.0%} of {len(pairs)} videos")
    assert np.mean(seen) >= 0.7


def test_an_empty_prompt_has_no_color_of_its_own(pipe):
    found = {main_color(frames) for frames in videos(pipe, [""] * 8, guidance_scale=1.0)}
    assert len(found - {None}) >= 3


def test_a_flipped_velocity_is_noticed(pipe):
    dit = load_transformer(trained.TRANSFORMER, torch.float32)
    for parameter in dit.final_layer.linear.parameters():
        parameter.neg_()
    colors, ways, _ = scores_of(MochiPipeline(dit, pipe.vae, pipe.text_encoder), FEW)
    assert colors < 0.5
    assert ways < 0.5


def test_a_schedule_without_its_high_levels_is_noticed(pipe):
    low = torch.cat((torch.ones(1), torch.linspace(0.2, 0, STEPS)))
    dirt = scores_of(pipe, FEW, sigmas=low)[2]
    print(f"schedule without high levels: {dirt:.3f} astray")
    assert dirt > CLEAN


def test_wrong_latent_statistics_are_noticed(pipe):
    steps = []
    video = videos(pipe, PROMPTS[:6], on_step=lambda _, latents: steps.append(latents))
    made = steps[-1]

    def mismatch(video):
        """Relative distance of the re-encoded video from the latents that the denoiser made."""
        return ((normalize_latents(pipe.vae.encode(video).mode()) - made).norm() / made.norm()).item()

    assert mismatch(torch.from_numpy(video).movedim(-1, 1) * 2 - 1) < SAME_LATENTS
    for wrong in (lambda latents: latents, normalize_latents):
        assert mismatch(pipe.vae.decode(wrong(made)).clamp(-1, 1)) > SAME_LATENTS
