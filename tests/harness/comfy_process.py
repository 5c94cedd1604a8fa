"""Run code in a ComfyUI process, on the CPU, with the pack imported as `pack`.

ComfyUI's imports take ten seconds, so one process does them and forks for each piece of code; where forking is not safe, each
piece gets a process that imports everything again.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import importlib.util, json, os, sys, traceback
comfyui, root, *arguments = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)
from comfy.cli_args import args
args.cpu = True
import comfy.sample, comfy.sd, comfy.utils, torch
from safetensors.torch import load_file, save_file

spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
import pack.nodes.bridge.model
"""
# For each line of JSON on stdin, fork a process that runs its code, and print that process's exit status.
FORK = """
names = dict(globals())
for line in sys.stdin:
    code, arguments, *outputs = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    try:
        exec(code, names | {"arguments": arguments})
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
"""
# Apple's libraries do not work in a forked process; Windows has no fork.
CAN_FORK = sys.platform == "linux"


def run_in_comfyui(comfyui: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `code` with `arguments` (as text), `comfy`, `torch`, `load_file` and `save_file` in scope."""
    if CAN_FORK:
        done = _run_forked(comfyui, code, [*map(str, arguments)])
    else:
        command = [*_command(PREAMBLE + code, comfyui), *map(str, arguments)]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def _run_forked(comfyui: Path, code: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    process = _forking_process(comfyui)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        print(json.dumps([code, arguments, *map(str, outputs)]), file=process.stdin, flush=True)
        status = process.stdout.readline()
        assert status, "the process that has imported ComfyUI has ended"
        return subprocess.CompletedProcess(arguments, int(status), *(path.read_text("utf-8") for path in outputs))


@functools.cache
def _forking_process(comfyui: Path) -> subprocess.Popen[str]:
    """A process that has imported ComfyUI and the pack; it ends with this one, which keeps its stdin open."""
    command = _command(PREAMBLE + FORK, comfyui)
    return subprocess.Popen(command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _command(code: str, comfyui: Path) -> list[str]:
    return [sys.executable, "-c", code, str(comfyui), str(ROOT)]


def _environment() -> dict[str, str]:
    """Tiny models are fastest with one thread, and very slow with more threads than idle cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
