"""Who may import whom, and that importing does nothing else."""

import graphlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mochi_core
from mochi_core import packages
from tests.harness.architecture import imports, module_graph

ROOT = Path(__file__).parents[2]
CORE = ROOT / "mochi_core"
# From the bottom up: each room may use the rooms in the lines above it.
FLOORS = (
    (
        "choices",
        "config",
        "dtypes",
        "geometry",
        "interrupts",
        "kernels",
        "mapped_files",
        "ops",
        "output_files",
        "shown",
    ),
    ("devices", "quantization", "packages"),
    ("transformer", "autoencoder"),
    ("parallel",),
    ("sampling", "checkpoints"),
    ("lora", "text_encoder", "io", "doctor"),
    ("pipeline",),
    ("rounds", "options"),
    ("generate",),
    ("farm", "edit_video"),
    ("commands",),
    ("__init__", "__main__"),
    ("train",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "node_helpers", "nodes"}
PURE_IMPORT = """
import logging, sys, threading
sys.path.append({root!r})
for name in {blocked!r}:
    sys.modules[name] = None
handlers, threads = list(logging.getLogger().handlers), threading.active_count()
import torch, mochi_core
for name in mochi_core.__all__:
    getattr(mochi_core, name)
assert not torch.cuda.is_initialized()
assert logging.getLogger().handlers == handlers
assert threading.active_count() == threads
assert not any(name in sys.modules for name in ("transformers", "accelerate", "mochi_core.train"))
"""


def test_importing_the_core_needs_no_host_and_has_no_side_effect():
    code = PURE_IMPORT.format(root=str(ROOT), blocked=sorted(HOST | {"diffusers"}))
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_ask_for_all_packages_that_the_extra_installs():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^standalone = (\[.*\])$", project, re.M)
    names = [re.split("[<>=~]", name)[0] for name in json.loads(line)]
    installed = {"PIL" if name == "pillow" else name for name in names}
    assert installed == {*packages.NEEDED, *packages.FOR_VIDEOS}
    assert installed >= {name for needed in packages.NEEDED_BY.values() for name in needed}
    assert all(importlib.util.find_spec(name) for name in (*installed, *packages.TRAINING))


@pytest.mark.parametrize(
    ("command", "hidden", "extra"),
    [
        ("mochi_core decode x.latent --vae none --device cpu", "av", "standalone"),
        ("mochi_core.train lora x.yaml", "pydantic", "train"),
        ("mochi_core inspect README.md", "av", None),
    ],
)
def test_a_package_that_is_missing_is_reported_before_an_hour_of_work(tmp_path, command, hidden, extra):
    """`sitecustomize` hides the package."""
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda *a: None if a == ({!r},) else find(*a)"
    (tmp_path / "sitecustomize.py").write_text(hide.format(hidden), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", *command.split()]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    if extra is None:
        assert done.stderr.startswith("error: README.md is not a safetensors file")
    else:
        assert done.stderr.startswith(
            f"error: {sys.executable} has no {hidden}; run the command in the folder of the pack"
        )
        assert done.stderr.endswith(f'python -m pip install -e ".[{extra}]"\n')


@pytest.mark.parametrize("module", ["mochi_core", "mochi_core.train"])
def test_a_command_in_a_python_without_pytorch_says_which_python_to_take(module):
    command = [sys.executable, "-E", "-S", "-m", module, "doctor"]  # -S: installed packages are not found
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"error: {sys.executable} has no torch, ")
    assert r"..\..\..\python_embeded\python.exe -m mochi_core doctor" in sentence


@pytest.mark.parametrize(
    "command", ["mochi_core inspect x", "mochi_core.train plot x -o x.png", "mochi_core.train.tiny"]
)
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal to a single process there")
def test_an_interrupted_import_of_a_command_shows_no_code(command):
    words = [sys.executable, "-X", "importtime", "-m", *command.split()]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while "torch" not in running.stderr.readline():  # lists modules as they are imported
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGINT
    assert output == ""
    assert all(line.startswith("import time:") for line in errors.splitlines())


@pytest.mark.parametrize(
    ("arguments", "status", "about"),
    [
        ("mochi_core --help", 0, ""),
        ("mochi_core generate --help", 0, ""),
        ("mochi_core generate --prompt x", 2, "--transformer"),
        ("mochi_core decode x --vae x --dtype bf16", 2, "--dtype"),
        ("mochi_core convert x y --to genmo", 2, "--to"),
        ("mochi_core edit --guidance high", 2, "argument --guidance"),
        ("mochi_core generate --cache teacache:-1", 2, "argument --cache"),
        ("mochi_core generate --parallel rings=2", 2, "argument --parallel"),
        ("mochi_core.train prepare", 2, "--vae"),
    ],
)
def test_arguments_are_read_before_anything_that_takes_seconds_is_imported(arguments, status, about):
    command = [sys.executable, "-X", "importtime", "-m", *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert about in done.stderr.splitlines()[-1]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "safetensors", "tqdm", "transformers"}


def test_names_for_type_checkers_are_those_that_are_imported_when_they_are_used():
    found = {target: tuple(names) for dots, target, names in imports(CORE / "__init__.py") if dots and target}
    assert found == mochi_core._NAMES
    assert sorted(mochi_core._MODULES) == sorted(mochi_core.__all__)


def test_core_never_names_host_or_peers():
    for path in [*CORE.rglob("*.py"), *(ROOT / "migrate").rglob("*.py")]:
        absolute = {module.split(".")[0] for dots, module, _ in imports(path) if dots == 0}
        assert not absolute & (HOST | {"diffusers"}), path


@pytest.mark.parametrize("package", ["mochi_core", "migrate", "nodes"])
def test_no_circles(package):
    """Between modules, even within a package; an import inside a function counts like any other."""
    list(graphlib.TopologicalSorter(module_graph(package)).static_order())  # CycleError names the cycle


def test_rooms_only_look_down():
    for module, targets in module_graph("mochi_core").items():
        room = [*module.split("."), "__init__"][1]
        for target in targets:
            used = [*target.split("."), "__init__"][1]
            assert target.startswith("mochi_core"), f"{module} imports {target}"
            assert used == room or FLOOR[used] < FLOOR[room], f"{module} imports {target}"


def test_migrate_stands_alone():
    assert all(target.startswith("migrate") for targets in module_graph("migrate").values() for target in targets)


def test_only_the_bridge_knows_both_worlds():
    models = (
        "mochi_core.transformer.model",
        "mochi_core.autoencoder.model",
        "mochi_core.text_encoder",
        "mochi_core.pipeline",
    )
    for module, targets in module_graph("nodes").items():
        if not module.startswith("nodes.bridge"):
            assert not targets & set(models), module


def test_names_of_tensors_do_not_depend_on_file_formats():
    for module, targets in module_graph("mochi_core").items():
        if module.startswith("mochi_core.checkpoints.names"):
            assert not any(target.startswith("mochi_core.checkpoints.formats") for target in targets), module
