"""Options are checked without importing what they are for; progress bars and lines of the commands."""

from mochi_core import choices
from mochi_core.checkpoints.convert import TARGET_DTYPES
from mochi_core.checkpoints.names.detect import FRAME_LEVELS_CHOICES, PARTS
from mochi_core.dtypes import DTYPES
from mochi_core.generate import Bars
from mochi_core.quantization.weights import QUANTIZERS
from mochi_core.transformer.attention import ATTENTIONS


def test_choices_are_the_names_in_the_tables():
    assert choices.ATTENTIONS == ATTENTIONS
    for names, table in (
        (choices.DTYPE_NAMES, DTYPES),
        (choices.QUANTIZER_NAMES, QUANTIZERS),
        (choices.FRAME_LEVELS, FRAME_LEVELS_CHOICES),
        (choices.PART_NAMES, PARTS),
        (choices.TARGET_DTYPE_NAMES, TARGET_DTYPES),
    ):
        assert names == tuple(table)


def test_frames_are_counted_below_the_steps_and_only_those_of_the_last_round_stay(capsys):
    shown = []
    with Bars(2) as bars:
        for frames in (7, 13):
            bars.step()
            for done in (0, frames, frames):
                bars.frames(done, frames)
            shown.append(bars.coding)
    assert [(bar.n, bar.leave) for bar in shown] == [(7, False), (13, True)]
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.splitlines()]
    assert any("2/2" in line and "step/s" in line for line in lines)
    assert any("13/13" in line for line in lines)


def test_members_that_are_not_the_first_show_no_bars(capsys):
    with Bars(1, disable=True) as bars:
        bars.step()
        bars.frames(7, 7)
    assert capsys.readouterr().err == ""
