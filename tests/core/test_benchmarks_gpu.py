"""The ten-minute GPU run: resumable, most important parts first, and complete even if a part fails."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import MINUTES, run_parts
from benchmarks.gpu_results import STOPPED, Part, Results, write_page
from benchmarks.measure import MEDIAN, OUT_OF_MEMORY

HERE = "A card, Driver: 1.2."
ABOUT = {"commit": "abc1234", "machine": HERE}
RUN = {"seconds": [1.5]}
SLEEPER = """
import subprocess, sys, tempfile
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({!r}, "w").write(tempfile.mkdtemp() + " " + str(sleeper.pid))
sleeper.wait()
"""


def python(code):
    return [sys.executable, "-c", code]


def part(title="Part", seconds=60, contenders=("ours", "peer")):
    return Part(title, seconds, [("small", {"size": title}, contenders)], [MEDIAN])


def adds(results, unit, run=RUN):
    """A command that writes a result like a part does, and a mark for each run."""
    line = json.dumps({"unit": unit.key, "run": run, **ABOUT}) + "\n"
    return f"open({str(results)!r}, 'a').write({line!r}); open({str(results)!r} + '.ran', 'a').write({unit.case['size']!r});"


def test_each_contender_and_case_is_kept_and_not_measured_again(tmp_path, monkeypatch):
    results, ran, one = Results(tmp_path / "r.jsonl"), [], part(contenders=["ours", "peer", "large", "last"])
    failures = {"peer": "ValueError: no kernel", "large": OUT_OF_MEMORY}

    def run(unit):
        ran.append(unit.contender)
        if unit.contender == "last":
            raise KeyboardInterrupt  # equivalent to being killed
        return {"failure": failures[unit.contender]} if unit.contender in failures else RUN

    monkeypatch.setattr(gpu_parts, "run", run)
    for expected in (["ours", "peer", "large", "last"], ["peer", "last"]):
        with pytest.raises(KeyboardInterrupt):
            gpu_parts.measure(one, results, ABOUT)
        assert ran == expected
        ran.clear()
    page = write_page({"a": one}, HERE, results)
    rows = [
        "ours | 1.500 | abc1234",
        "peer | ValueError: no kernel | ",
        f"large | {OUT_OF_MEMORY} | ",
        f"last | {STOPPED} | ",
    ]
    assert all(f"| small | {row} |" in page for row in rows), page
    assert "| Part | 2 of 4 |" in page
    failures["last"] = failures.pop("peer")
    monkeypatch.setattr(gpu_parts, "run", lambda _: RUN)
    gpu_parts.measure(one, results, ABOUT)
    assert results.missing(one) == []
    results.forget([unit for unit in one.units() if unit.contender == "large"])
    assert [unit.contender for unit in results.missing(one)] == ["large"]


def test_what_was_tried_in_vain_stops_nothing_else(tmp_path):
    results, one = Results(tmp_path / "r.jsonl"), part()
    ours, peer = one.units()
    results.add(ours, {"failure": STOPPED}, ABOUT)
    assert results.missing(one) == [peer, ours]
    with results.path.open("a") as file:
        file.write('{"unit": "cut o')
    assert results.missing(one) == [peer, ours]


@pytest.mark.slow
def test_a_failed_part_ends_nothing_and_is_all_that_is_repeated(tmp_path, capsys):
    page, results = tmp_path / "gpu.md", tmp_path / "gpu.jsonl"
    parts = {name: part(name, contenders=["ours"]) for name in "abc"}
    commands = {name: python(adds(results, one.units()[0])) for name, one in parts.items()}
    broken = {**commands, "b": python("import sys; sys.exit('no kernel for this card')")}
    run_parts(parts, broken, page, HERE)
    said = capsys.readouterr()
    assert "b: ended with 1, 0 of 1 measured" in said.out and "no kernel for" in said.err
    text = page.read_text()
    assert HERE in text.splitlines()
    assert [f"| {name} | {count} of 1 |" in text for name, count in zip("abc", (1, 0, 1), strict=True)] == [True] * 3
    assert "| small | ours | not measured yet |" in text
    run_parts(parts, commands, page, HERE)
    assert (tmp_path / "gpu.jsonl.ran").read_text() == "acb"
    assert "a: in gpu.jsonl already" in capsys.readouterr().out
    assert "not measured yet" not in page.read_text()


def ends(pid):
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_with_all_that_it_has_started_and_what_it_has_measured_stays(tmp_path, capsys):
    mark, page, one = tmp_path / "where", tmp_path / "gpu.md", part(seconds=3)
    code = adds(tmp_path / "gpu.jsonl", one.units()[0]) + SLEEPER.format(str(mark))
    run_parts({"a": one}, {"a": python(code)}, page, HERE)
    assert "a: stopped after 3 s, 1 of 2 measured" in capsys.readouterr().out
    assert "| small | ours | 1.500 | abc1234 |" in page.read_text()
    scratch, sleeper = mark.read_text().split()
    assert not Path(scratch).exists()
    assert ends(int(sleeper))


def test_no_part_begins_when_less_than_its_limit_is_left(tmp_path, capsys):
    page = tmp_path / "gpu.md"
    run_parts({"a": part(seconds=601)}, {"a": python("raise SystemExit(1)")}, page, HERE)
    assert not page.exists()
    assert "a: no time left" in capsys.readouterr().out


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    Results(tmp_path / "gpu.jsonl").add(part().units()[0], RUN, {**ABOUT, "machine": "Another card."})
    with pytest.raises(ValueError, match=r"other versions \(Another card\.\); use another --output"):
        run_parts({}, {}, tmp_path / "gpu.md", HERE)


@pytest.mark.parametrize("tiny", [False, True])
def test_all_limits_fit_into_one_call(tiny):
    assert sum(part.seconds for part in gpu_parts.parts(tiny).values()) <= 60 * MINUTES - 30


def test_no_part_times_the_call_in_which_kernels_are_built():
    once = [name for name, one in gpu_parts.parts(tiny=False).items() if one.columns and not one.calls]
    assert once == ["whole-run"]  # preceded by a shorter one: test_benchmarks.py


def test_parts_share_what_they_both_need():
    parts = gpu_parts.parts(tiny=False)
    keys = {name: {unit.key for unit in part.units()} for name, part in parts.items()}
    assert len(keys["forward-85"] & keys["8-bit"]) == 1


def test_a_member_attends_to_all_tokens_with_its_share_of_the_heads():
    from mochi_core import sdpa

    q, k, v = torch.randn(3, 1, 8, 5, 4)
    shapes = []

    def attention(q, k, v):
        shapes.append([tensor.shape for tensor in (q, k, v)])
        return sdpa(q, k, v)

    assert gpu_parts.null_exchange(attention, 4)(q, k, v).shape == q.shape
    assert shapes == [[(1, 2, 20, 4)] * 3]
    torch.testing.assert_close(gpu_parts.null_exchange(sdpa, 1)(q, k, v), sdpa(q, k, v))


@pytest.mark.slow
def test_a_real_part_runs_without_a_gpu(tmp_path):
    """Runs the part of the tests, which are all skipped; the others take minutes: --device cpu --tiny."""
    results = Results(tmp_path / "gpu.jsonl")
    gpu_parts.measure(gpu_parts.parts(tiny=True)["tests"], results, ABOUT)
    (line,) = results.read().values()
    assert "failure" not in line["run"], line
    assert "skipped" in line["run"]["said"] or "passed" in line["run"]["said"]


def test_the_commit_and_the_machine_are_known():
    about = gpu_parts.about("cpu")
    assert about["commit"] and "torch" in about["machine"] and "Driver" in about["machine"]


def test_without_a_gpu_the_command_says_what_to_do(monkeypatch):
    monkeypatch.setattr(gpu_parts, "DEVICE", "cpu")
    with pytest.raises(SystemExit, match="There is no GPU here; --device cpu --tiny"):
        gpu_parts.about("cuda")
    hidden = gpu.environment("cpu")
    assert hidden["CUDA_VISIBLE_DEVICES"] == hidden["HIP_VISIBLE_DEVICES"] == ""
    assert gpu.environment("cuda") == dict(gpu.os.environ)
