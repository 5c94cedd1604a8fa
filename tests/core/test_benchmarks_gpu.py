"""The ten minutes on a GPU: resumed, in order of importance, and whole although a part fails."""

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import NAMES, Part, read_page, run_parts, write_page

HEAD = "A card, Driver: 1.2."
SLEEPER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"


def part(name, code, limit=60):
    return Part(name, f"Part {name}", [sys.executable, "-c", code], limit)


def counting(path, name):
    """A part that leaves a mark for each time that it ran."""
    return part(name, f"print('| {name} |'); open({str(path)!r}, 'a').write({name!r})")


@pytest.mark.slow
def test_a_failed_part_ends_nothing_and_is_all_that_is_repeated(tmp_path, capsys):
    page, ran = tmp_path / "gpu.md", tmp_path / "ran"
    broken = part("b", "import sys; print('half'); sys.exit('no kernel for this card')")
    parts = [counting(ran, "a"), broken, counting(ran, "c")]
    results = run_parts(parts, page, HEAD, 60)
    assert [results[name].ok for name in "abc"] == [True, False, True]
    text = page.read_text()
    assert HEAD in text.splitlines()
    for line in (
        "| Part a | ok | 0 |",
        "| Part b | failed |",
        "## Part c",
        "| c |",
        "It ended with 1:",
        "no kernel for",
    ):
        assert line in text
    assert "half" in text
    assert read_page(page, HEAD) == results

    run_parts([parts[0], counting(ran, "b"), parts[2]], page, HEAD, 60)
    assert ran.read_text() == "acb"
    assert "| failed |" not in page.read_text()
    assert "a: in gpu.md already" in capsys.readouterr().out
    kept = read_page(page, HEAD)
    run_parts(parts, page, HEAD, 60, again=True, only=["a"])
    assert ran.read_text() == "acba"
    assert {name: result for name, result in read_page(page, HEAD).items() if name != "a"} == {
        name: result for name, result in kept.items() if name != "a"
    }


@pytest.mark.slow
def test_what_a_killed_part_leaves_is_removed(tmp_path):
    mark = tmp_path / "where"
    code = f"import tempfile, time; open({str(mark)!r}, 'w').write(tempfile.mkdtemp()); time.sleep(60)"
    run_parts([part("a", code, limit=3)], tmp_path / "gpu.md", HEAD, 60)
    assert not Path(mark.read_text()).exists()


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_with_all_that_it_has_started(tmp_path):
    began = time.monotonic()
    results = run_parts([part("a", SLEEPER, limit=2)], tmp_path / "gpu.md", HEAD, 60)
    assert not results["a"].ok
    assert "It stopped after 2 s:" in results["a"].text
    assert time.monotonic() - began < 100  # the output's other end is closed, so no process holds it


def test_what_has_no_time_left_waits_for_the_next_call(tmp_path, capsys):
    page = tmp_path / "gpu.md"
    assert run_parts([part("a", "")], page, HEAD, seconds=1) == {}
    assert not page.exists()
    assert "a: no time left" in capsys.readouterr().out
    assert "| Part a | not run yet |  |" in write_page([part("a", "")], HEAD, {})


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text(write_page([], "Another card.", {}))
    with pytest.raises(ValueError, match="made on another machine or with other versions; use another --output"):
        run_parts([part("a", "")], page, HEAD, 60)


def test_the_parts_are_those_that_there_are_and_fit_into_ten_minutes_one_by_one():
    from benchmarks import gpu_parts

    assert list(NAMES) == list(gpu_parts.PARTS)
    assert all(limit < 600 for _, limit in NAMES.values())


def test_a_member_attends_to_all_tokens_with_its_share_of_the_heads():
    from benchmarks.gpu_parts import null_exchange
    from mochi_core import sdpa

    q, k, v = torch.randn(3, 1, 8, 5, 4)
    shapes = []

    def attention(q, k, v):
        shapes.append([tensor.shape for tensor in (q, k, v)])
        return sdpa(q, k, v)

    assert null_exchange(attention, 4)(q, k, v).shape == q.shape
    assert shapes == [[(1, 2, 20, 4)] * 3]
    torch.testing.assert_close(null_exchange(sdpa, 1)(q, k, v), sdpa(q, k, v))


@pytest.mark.slow
def test_a_real_part_runs_without_a_gpu(tmp_path):
    """That of the tests, which all skip; the others take minutes: --device cpu --tiny."""
    command = [sys.executable, "-m", "benchmarks.gpu_parts", "tests"]
    results = run_parts([Part("tests", "Tests", command, 300)], tmp_path / "gpu.md", HEAD, 300)
    assert results["tests"].ok, results["tests"].text
    assert "skipped" in results["tests"].text or "passed" in results["tests"].text


def test_without_a_gpu_the_command_says_what_to_do(monkeypatch):
    from benchmarks import gpu_parts

    monkeypatch.setattr(gpu_parts, "DEVICE", "cpu")
    with pytest.raises(SystemExit, match="There is no GPU here; --device cpu --tiny"):
        gpu_parts.head("cuda")
    hidden = gpu.environment("cpu")
    assert hidden["CUDA_VISIBLE_DEVICES"] == hidden["HIP_VISIBLE_DEVICES"] == ""
    assert gpu.environment("cuda") == dict(gpu.os.environ)
