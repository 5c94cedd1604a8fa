import math

import pytest
import torch

from mochi_core import VideoSize, denormalize_latents, normalize_latents
from mochi_core.geometry import frames_problem, frames_to_latents, latents_to_frames, seconds_to_frames


def test_released_size():
    size = VideoSize(480, 848, 163)
    assert size.latent_shape(2) == (2, 12, 28, 60, 106)
    assert size.num_tokens == 44520


@pytest.mark.parametrize("num_latents", range(1, 41))
def test_frames_round_trip(num_latents):
    assert frames_to_latents(latents_to_frames(num_latents)) == num_latents


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((470, 848, 25), "height is 470.* 464 or 480"),
        ((480, 850, 25), "width is 850.* 848 or 864"),
        ((480, 7, 25), "width is 7.* use 16"),
        ((-3, 848, 25), "height is -3.* use 16"),
        ((480, 848, 24), "num_frames is 24.* 19 or 25"),
        ((480, 848, 0), "num_frames is 0.* use 1"),
        (
            (1_600_000_000, 848, 163),
            "limit of 16,777,216 tokens at once; make it smaller or shorter",
        ),
        ((480, 848, seconds_to_frames(1e12)), "A video of 30000000000001 frames of 848 x 480 pixels would exceed"),
    ],
)
def test_invalid_sizes_name_the_nearest_valid_ones(size, message):
    with pytest.raises(ValueError, match=message):
        VideoSize(*size)


def test_half_an_hour_is_made_at_once_and_a_thousand_videos_are_not():
    size = VideoSize(480, 848, seconds_to_frames(2000))
    assert size.latent_shape() == (1, 12, 10_001, 60, 106)
    assert VideoSize(480, 848, size.most_frames).num_latents == 10_551  # of 1,590 tokens each
    with pytest.raises(ValueError, match="the limit of 16,777,216 tokens"):
        VideoSize(480, 848, size.most_frames + 6)
    with pytest.raises(ValueError, match="1000 videos of 163 frames of 848 x 480 pixels would exceed"):
        VideoSize().latent_shape(1000)


def test_latent_spaces_round_trip():
    latents = torch.randn(2, 12, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(denormalize_latents(normalize_latents(latents)), latents)
    zero = denormalize_latents(torch.zeros(1, 12, 1, 1, 1))
    assert zero[0, 7, 0, 0, 0] == pytest.approx(-0.09346305707025976)


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [(0, 1), (0.2, 7), (1, 31), (5.4, 163), (5.45, 163), (5.55, 169), (0.5, 19), (0.9, 31), (1.3, 43), (-3, 1)],
)
def test_seconds_become_frames_that_mochi_makes(seconds, frames):
    assert seconds_to_frames(seconds) == frames
    assert frames_problem(frames) is None


@pytest.mark.parametrize("seconds", [math.inf, -math.inf, math.nan])
def test_endless_seconds_are_refused(seconds):
    with pytest.raises(ValueError, match=f"seconds is {seconds}, but must be finite"):
        seconds_to_frames(seconds)


def test_every_size_that_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"height is 50, .* width is 100, .* num_frames is 24, "):
        VideoSize(50, 100, 24)
