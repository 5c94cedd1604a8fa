"""What the commands need to be installed: a Python without it gets a sentence instead of code."""

from __future__ import annotations

import importlib.util
import sys

from . import interrupts

NEEDED = ("torch", "numpy", "safetensors", "einops", "tqdm")
REMEDY = (
    "run the command in the folder of the pack with ComfyUI's Python (in the portable version "
    r"..\..\..\python_embeded\python.exe -m mochi_core doctor), or install what it needs: "
    'python -m pip install -e ".[standalone]"'
)


def check() -> None:
    """End this program with a sentence and status 2, if it is one of our commands and this Python lacks a package for it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None] if interrupts.is_command() else []
    if missing:
        sys.stderr.write(f"error: {sys.executable} has no {', '.join(missing)}; {REMEDY}\n")
        raise SystemExit(2)
