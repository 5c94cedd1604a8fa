"""What the Comfy registry and ComfyUI-Manager require of a pack, and what would be published."""

import ast
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import yaml
from PIL import Image

from workflows.editor import VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
RAW = "https://raw.githubusercontent.com/mochi-nodes/mochi-nodes/main/"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def published():
    """The files of the archive: tracked by git and not excluded by .comfyignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("what would be published is known in a git checkout only")

    def tracked(*options):
        listed = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True, check=True)
        return set(listed.stdout.splitlines())

    return tracked() - tracked("--cached", "--ignored", "--exclude-from=.comfyignore")


def test_name_follows_the_registrys_rules():
    name = PROJECT["name"]
    assert re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])*", name)
    assert len(name) < 100
    assert "comfyui" not in name


def test_version_is_the_changelogs_newest():
    newest = re.search(r"^## \[(\S+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    assert newest[1] == PROJECT["version"]
    assert PROJECT["version"] == VERSION  # the version that the templates state


def test_nothing_is_installed_or_run_at_installation(published):
    """The Manager would install the dependencies and requirements.txt, and run install.py; ComfyUI prestartup_script.py."""
    assert PROJECT["dependencies"] == []
    assert not published & {"requirements.txt", "install.py", "prestartup_script.py"}


def test_fields_that_the_registry_shows():
    assert (ROOT / PROJECT["license"]["file"]).is_file()
    assert {"Repository", "Documentation", "Bug Tracker"} <= set(PROJECT["urls"])
    assert all(COMFY[key] for key in ("PublisherId", "DisplayName"))
    assert COMFY["requires-comfyui"] == ">=0.30.0"
    assert len(PROJECT["description"]) < 200


@pytest.mark.parametrize("key", ["Icon", "Banner"])
def test_pictures(key):
    assert COMFY[key].startswith(RAW)
    path = ROOT / COMFY[key].removeprefix(RAW)
    assert path.stat().st_size < 100_000
    with Image.open(path) as image:
        width, height = image.size
    if key == "Icon":
        assert width == height <= 400
    else:
        assert width * 9 == height * 21


def test_publishing_waits_for_the_tests():
    folder = ROOT / ".github" / "workflows"
    publish, test = (
        yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8")) for name in ("publish", "test")
    )
    # YAML 1.1 parses the key `on` as true.
    assert publish[True]["push"] == {"branches": ["main"], "paths": ["pyproject.toml"]}
    assert publish["jobs"]["publish"]["needs"] == "test"
    assert ROOT / publish["jobs"]["test"]["uses"] == folder / "test.yml"
    assert "workflow_call" in test[True]
    assert "python dev.py test" in [step.get("run") for step in test["jobs"]["test"]["steps"]]


def test_issue_forms_ask_for_what_is_needed():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    assert set(forms) == {"bug_report", "feature_request", "config"}
    asked = {field["id"]: field["attributes"] for field in forms["bug_report"]["body"]}
    assert {"workflow", "console", "version", "doctor", "files"} <= set(asked)
    assert "python -m mochi_core doctor" in asked["doctor"]["description"]


def test_archive_holds_what_users_need_and_nothing_else(published):
    tops = {PurePosixPath(name).parts[0] for name in published}
    assert {
        "__init__.py",
        "LICENSE",
        "README.md",
        "mochi_core",
        "models",
        "nodes",
        "pyproject.toml",
        "subgraphs",
        "workflows",
    } <= tops
    assert not tops & {"tests", "benchmarks", ".ci", ".github", "dev.py"}
    assert [name for name in published if name.endswith(".py") and name.startswith("workflows/")] == [
        "workflows/api/client.py"
    ]
    assert sum((ROOT / name).stat().st_size for name in published) < 40 * MEBIBYTE


def test_every_module_that_is_imported_is_in_the_archive(published):
    for name in published:
        if name.endswith(".py") and not name.startswith("workflows/"):
            for module in own_imports(name):
                assert {f"{module}.py", f"{module}/__init__.py"} & published, f"{name} imports {module}"


def own_imports(name):
    """Paths, without .py, of our modules that a file imports."""
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = PurePosixPath(name).parents[node.level - 1]
            if node.module:
                yield (package / node.module.replace(".", "/")).as_posix()
            else:
                yield from ((package / alias.name).as_posix() for alias in node.names)
