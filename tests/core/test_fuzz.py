"""Files broken at random: loaded, or refused in one line; a sample by default, 10,000 with `--all`."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import fuzz

ROOT = Path(__file__).parents[2]
SAMPLE, MANY = 156, 10_008
"""Number of files, the same for every kind."""
PATIENCE, MEGABYTES = 60.0, 500.0
"""CPU seconds and memory for one file of the sample, generous because slow machines are not the subject."""


def test_a_sample_of_broken_files():
    tallies = fuzz.run(SAMPLE, 1, (PATIENCE, MEGABYTES))
    assert [fault for tally in tallies.values() for fault in tally.faults] == []
    assert all(tally.refused for tally in tallies.values())
    assert any(tally.loaded for tally in tallies.values())


@pytest.mark.usefixtures("with_all")
def test_ten_thousand_broken_files():
    """In its own process, which a file may end; docs/reliability.md shows its table."""
    command = [sys.executable, "-m", "tests.harness.fuzz", str(MANY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def faults_of(monkeypatch, read):
    tally = fuzz.Tally()
    monkeypatch.setitem(fuzz.KINDS, "YAML", (fuzz.yaml_file, (read,)))
    fuzz.try_one("YAML", "x", tally, (PATIENCE, 50))
    return tally.faults


def take(size):
    """Use new memory: the allocator may already hold this much freed memory, which was counted before."""
    memory = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1


@pytest.mark.skipif(sys.platform == "win32", reason="has a clock only")
def test_a_file_that_hangs_ends_the_process_and_one_that_waits_for_the_processor_does_not():
    code = """
import time
from tests.harness.fuzz import watch_for_hang
watch_for_hang(0.2)
time.sleep(1)
print("waited", flush=True)
while True: pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert done.stdout == "waited\n"
    assert 'File "<string>", line 7' in done.stderr


def refuse(message):
    def read(_):
        raise ValueError(message)

    return read


def test_the_harness_finds_what_it_looks_for(monkeypatch):
    assert faults_of(monkeypatch, refuse("It is no file.")) == []
    assert "not printable" in faults_of(monkeypatch, refuse("two\nlines"))[0]
    assert "long" in faults_of(monkeypatch, refuse("x" * 5000))[0]
    assert "advice" in faults_of(monkeypatch, refuse("set weights_only=False"))[0]
    assert "KeyError" in faults_of(monkeypatch, lambda _: {}["x"])[0]
    assert not Path("/proc/self/clear_refs").exists() or "MB" in faults_of(monkeypatch, lambda _: take(200 * 2**20))[0]
