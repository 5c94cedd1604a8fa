"""Check that the packages the commands need are installed, and report missing ones without a traceback."""

from __future__ import annotations

import importlib.util
import sys

from . import interrupts

NEEDED = ("torch", "safetensors", "einops", "numpy", "tqdm")
"""Modules that every command needs."""
FOR_VIDEOS = ("psutil", "transformers", "tokenizers", "av", "PIL")
"""The others that the extra `standalone` of pyproject.toml installs."""
NEEDED_BY = {**dict.fromkeys(("generate", "edit", "farm", "prepare"), FOR_VIDEOS), "decode": ("psutil", "av")}
"""Further modules needed by single commands."""
TRAINING = ("pydantic", "yaml")
"""Further modules needed to read a training configuration; `accelerate` and `matplotlib` are checked on use."""
REMEDY = (
    "run the command in the folder of the pack with ComfyUI's Python (in the portable version "
    r"..\..\..\python_embeded\python.exe -m mochi_core doctor), or install what it needs: "
    'python -m pip install -e ".[{extra}]"'
)


def check(needed: tuple[str, ...] = NEEDED, extra: str = "standalone") -> None:
    """Exit with a one-sentence error and status 2 if this program is one of our commands and this Python lacks a package."""
    if interrupts.is_command() and (problem := _problem(needed, extra)):
        sys.stderr.write(f"error: {problem}\n")
        raise SystemExit(2)


def require(command: str) -> None:
    """Raise a ValueError if this Python lacks a package that a command needs in the end, such as one that writes videos."""
    if problem := _problem(NEEDED_BY.get(command, ()), "standalone"):
        raise ValueError(problem)


def _problem(needed: tuple[str, ...], extra: str) -> str | None:
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{sys.executable} has no {', '.join(missing)}; {REMEDY.format(extra=extra)}" if missing else None
