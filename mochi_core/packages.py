"""What the commands need to be installed: a Python without it gets a sentence instead of code."""

from __future__ import annotations

import importlib.util
import sys

from . import interrupts

NEEDED = ("torch", "safetensors", "einops", "numpy", "psutil", "tqdm", "transformers", "tokenizers", "av", "PIL")
"""Names that the extra `standalone` of pyproject.toml makes importable."""
TRAINING = ("pydantic", "yaml")
"""What reading a training's file needs besides; `accelerate` and `matplotlib` are asked for when they are used."""
REMEDY = (
    "run the command in the folder of the pack with ComfyUI's Python (in the portable version "
    r"..\..\..\python_embeded\python.exe -m mochi_core doctor), or install what it needs: "
    'python -m pip install -e ".[{extra}]"'
)


def check(needed: tuple[str, ...] = NEEDED, extra: str = "standalone") -> None:
    """End this program with a sentence and status 2, if it is one of our commands and this Python lacks a package for it."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None] if interrupts.is_command() else []
    if missing:
        sys.stderr.write(f"error: {sys.executable} has no {', '.join(missing)}; {REMEDY.format(extra=extra)}\n")
        raise SystemExit(2)
