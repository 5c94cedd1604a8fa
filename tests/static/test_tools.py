"""Linter, formatter and type checker find nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_clean(tool):
    assert_clean(TOOLS[tool])


@pytest.mark.slow
def test_types(comfy_path):
    """The core, the migration and the nodes are checked against the host's own code."""
    assert_clean(["pyright", "--pythonpath", sys.executable], PYTHONPATH=str(comfy_path))


def assert_clean(command, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["mochi-nodes", "a_module"])
def test_a_folder_of_any_name_is_clean(tmp_path, name):
    """git names the folder mochi-nodes, which is not a valid module name."""
    folder = tmp_path / name
    (folder / "nodes").mkdir(parents=True)
    for file in ("pyproject.toml", "__init__.py", "nodes/__init__.py", "nodes/category.py"):
        (folder / file).write_bytes((ROOT / file).read_bytes())
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
