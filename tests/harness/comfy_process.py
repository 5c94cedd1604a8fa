"""Run code in a process of ComfyUI's, on the CPU, with the pack imported as `pack`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import importlib.util, sys
comfyui, root, *arguments = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)
from comfy.cli_args import args
args.cpu = True
import comfy.sd, comfy.utils, torch
from safetensors.torch import load_file, save_file

spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
"""


def run_in_comfyui(comfyui: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`code` finds `arguments`, as text, under that name, and `comfy`, `torch`, `load_file` and `save_file`."""
    command = [sys.executable, "-c", PREAMBLE + code, str(comfyui), str(ROOT), *map(str, arguments)]
    # Tiny models are fastest with one thread, and crawl with more than the machine has to spare.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
