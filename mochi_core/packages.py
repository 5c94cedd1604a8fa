"""Check that the packages the commands need are installed, and report missing ones without a traceback."""

from __future__ import annotations

import importlib.util
import sys

from . import interrupts

NEEDED = ("torch", "safetensors", "einops", "numpy", "psutil", "tqdm", "transformers", "tokenizers", "av", "PIL")
"""Modules that the extra `standalone` of pyproject.toml installs."""
TRAINING = ("pydantic", "yaml")
"""Further modules needed to read a training configuration; `accelerate` and `matplotlib` are checked on use."""
REMEDY = (
    "run the command in the folder of the pack with ComfyUI's Python (in the portable version "
    r"..\..\..\python_embeded\python.exe -m mochi_core doctor), or install what it needs: "
    'python -m pip install -e ".[{extra}]"'
)


def check(needed: tuple[str, ...] = NEEDED, extra: str = "standalone") -> None:
    """Exit with a one-sentence error and status 2 if this program is one of our commands and this Python lacks a package."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None] if interrupts.is_command() else []
    if missing:
        sys.stderr.write(f"error: {sys.executable} has no {', '.join(missing)}; {REMEDY.format(extra=extra)}\n")
        raise SystemExit(2)
