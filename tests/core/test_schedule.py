import math

import pytest
import torch

from mochi_core import guidance_schedule, linear_quadratic_schedule


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 30, 64])
@pytest.mark.parametrize("threshold_noise", [0.001, 0.025, 0.1])
def test_falls_from_one_to_zero(num_steps, threshold_noise):
    sigmas = linear_quadratic_schedule(num_steps, threshold_noise)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_known_values():
    expected = torch.tensor([1, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0])
    torch.testing.assert_close(linear_quadratic_schedule(8), expected)


def test_fastmochi_values():
    expected = torch.tensor([1, 59 / 60, 29 / 30, 0.95, 14 / 15, 11 / 12, 0.9, 2 / 3, 0])
    torch.testing.assert_close(linear_quadratic_schedule(8, threshold_noise=0.1, linear_steps=6), expected)


def test_linear_part_removes_the_threshold():
    sigmas = linear_quadratic_schedule(20, threshold_noise=0.2, linear_steps=5)
    torch.testing.assert_close(sigmas[:6], 1 - torch.arange(6) * 0.04)


def test_all_steps_linear():
    torch.testing.assert_close(linear_quadratic_schedule(4, linear_steps=4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_steps is 0"),
        ((8, 0.0), "threshold_noise is 0.0"),
        ((8, 1.0), "threshold_noise is 1.0"),
        ((10**12,), "num_steps is 1000000000000, but must be at most 1,000,000"),
        ((8, 0.025, 0), "linear_steps is 0"),
        ((8, 0.025, 9), "linear_steps is 9"),
        ((8, 0.9, 2), "rise again"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_quadratic_schedule(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((math.nan,), "cfg is nan"),
        ((4.5, math.inf), "cfg_end is inf"),
        ((4.5, None, math.nan), "start is nan"),
        ((4.5, None, 0.0, math.inf), "end is inf"),
        ((4.5, None, 0.0, 1.5), "end is 1.5, but it is a fraction"),
    ],
)
def test_guidance_is_made_of_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        guidance_schedule(8, *arguments)


def test_guidance_on_all_of_the_steps_is_the_scale():
    assert guidance_schedule(5, 4.5) == [4.5] * 5


def test_guidance_on_a_share_of_the_steps_is_off_outside():
    assert guidance_schedule(10, 6.0, start=0.2, end=0.5) == [1, 1, 6, 6, 6, 1, 1, 1, 1, 1]
    assert guidance_schedule(100, 6.0, start=0.55)[54:56] == [1, 6]
    assert guidance_schedule(4, 6.0, start=0.9) == guidance_schedule(4, 6.0, start=0.5, end=0.5) == [1] * 4


def test_guidance_moves_by_equal_differences():
    assert guidance_schedule(6, 6.0, 3.0, end=0.7) == pytest.approx([6, 5.25, 4.5, 3.75, 3, 1])
    assert guidance_schedule(3, 6.0, 2.0, start=0.5) == [1, 1, 6]
