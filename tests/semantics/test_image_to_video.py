"""Videos from a first image and from the end of a clip, with weights that take a single noise level for all frames: held in time.

The position of a shape is only in the given frames, never in the prompt.
"""

import numpy as np
import pytest

from tests.harness.semantics import CASES, centers, direction, drawn, main_color, psnr, videos

CHOSEN = CASES[1::3]
AWAY = 0.12
"""How far a shape is off-centre, perpendicular to its path, in frame heights."""


@pytest.fixture(scope="module")
def clips():
    """Clips of the prompts with the shape off-centre, (13, 64, 64, 3) uint8 each."""
    return [drawn(case, AWAY if i % 2 else -AWAY, 13) for i, case in enumerate(CHOSEN)]


def measured(made, clips, seam):
    """Means over videos: PSNR of frame 0, distance from the truth in the 6 frames after the seam, right colours, directions."""
    rows = []
    for video, true, (color, way, _) in zip(made, clips, CHOSEN, strict=True):
        astray = np.linalg.norm(centers(video, color) - centers(true / 255, color), axis=1)
        quality = psnr(video[0], true[0] / 255)
        rows.append(
            (quality, np.nanmean(astray[seam : seam + 6]), main_color(video) == color, direction(video, color) == way)
        )
    quality, place, colors, ways = np.mean(rows, axis=0)
    print(f"first frame {quality:.1f} dB, place {place:.3f}, colour {colors:.0%}, direction {ways:.0%} of {len(rows)}")
    return quality, place, colors, ways


def one_by_one(pipe, clips, **frames):
    return [
        videos(pipe, prompt, **{name: take(true) for name, take in frames.items()})[0]
        for true, (*_, prompt) in zip(clips, CHOSEN, strict=True)
    ]


def test_a_first_image_is_kept_and_its_shape_goes_on_from_there(held, clips):
    made = one_by_one(held, clips, image=lambda true: true[0])
    quality, place, colors, ways = measured(made, clips, 1)
    _, without, *_ = measured(one_by_one(held, clips), clips, 1)
    assert quality >= 30
    assert place <= 0.05 < without
    assert (colors, ways) == (1, 1)


def test_a_clip_goes_on_without_a_jump(held, clips):
    made = one_by_one(held, clips, video=lambda true: true[:7])
    quality, place, colors, ways = measured(made, clips, 7)
    assert quality >= 30
    assert place <= 0.05
    assert (colors, ways) == (1, 1)
