"""The commands: `python -m migrate` converts a file, `python -m mochi_core migrate` says that it does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from migrate import migrate
from migrate.__main__ import main
from migrate.account import add_account
from mochi_core.__main__ import main as core

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "data" / "old_workflows" / "api.json"
MOVED = "error: Workflows are converted by the node pack: run `python -m migrate old.json` in its folder.\n"


def test_python_m_migrate_in_the_packs_folder(tmp_path):
    output = tmp_path / "new.json"
    command = [sys.executable, "-m", "migrate", str(OLD), "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    expected = migrate(json.loads(OLD.read_text(encoding="utf-8")))
    assert json.loads(output.read_text(encoding="utf-8")) == expected.workflow
    assert done.stderr.splitlines() == expected.notes


def test_the_command_writes_the_account_as_the_server_does(tmp_path):
    output, real = tmp_path / ("x" * 244 + ".json"), tmp_path / "real.json"
    output.symlink_to(real)
    assert main([str(OLD.with_name("text_to_video.json")), "-o", str(output)]) == 0
    written = json.loads(real.read_text(encoding="utf-8"))
    expected = migrate(json.loads(OLD.with_name("text_to_video.json").read_text(encoding="utf-8")))
    add_account(expected.workflow, expected.notes)
    assert written == expected.workflow
    assert written["nodes"][-1]["title"] == "Converted to Mochi Nodes"
    assert output.is_symlink()
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    "arguments", ["", "old.json", "old.json --force", "--force old.json", "--stock -o new.json old.json", "-h", "-- x"]
)
def test_the_cores_command_says_where_it_went(capsys, arguments):
    assert core(["migrate", *arguments.split()]) == 2
    assert capsys.readouterr() == ("", MOVED)
