"""Losses as a picture."""

import pytest

from mochi_core.train.__main__ import main
from mochi_core.train.plot import POINTS, averaged, read_losses


def test_logs_become_a_picture(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("step,loss,learning_rate,seconds\n" + "".join(f"{i},{1 / i},0.1,1\n" for i in range(1, 500)))
    assert main(["plot", str(log), str(log), "-o", str(tmp_path / "loss.png")]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps, losses = averaged(*read_losses(log))
    assert len(steps) == len(losses) == POINTS
    assert sum(losses) / POINTS == pytest.approx(sum(1 / i for i in range(1, 500)) / 499, rel=0.2)


def test_other_files_are_refused_with_a_sentence(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    assert main(["plot", str(tmp_path / "a.csv"), "-o", str(tmp_path / "loss.png")]) == 2
    assert "a.csv is not a training log; give a log.csv." in capsys.readouterr().err
