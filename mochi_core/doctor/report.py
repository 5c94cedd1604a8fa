"""The report as data: every probe by name, with its finding or problem. `text.render` formats it as text."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import checks, machine
from .attempt import attempt
from .machine import ROOT
from .needs import file_needs

MACHINE = {
    "versions": machine.versions,
    "system": machine.system,
    "driver": machine.driver,
}
CHECKS = {
    "devices": machine.devices,
    "kernels": checks.kernels,
    "convolutions": checks.convolutions,
    "networks": checks.networks,
    "attention": checks.attention,
    "products": checks.products,
}
"""Functions of the device that models would run on."""


def examine(device: torch.device | str, files: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Examine the machine and the headers of model files; returns JSON-serialisable data and never raises.

    A failed probe or an unreadable file becomes {"problem": a sentence}.
    """
    found: dict[str, Any] = {"device": str(device)}
    found |= {name: attempt(probe) for name, probe in MACHINE.items()}
    found |= {name: attempt(_on, device, check) for name, check in CHECKS.items()}
    found["files"] = [{"file": Path(file).name, **attempt(_on, device, file_needs, file)} for file in files]
    private = {str(Path(file).parent) + os.sep: "" for file in files if Path(file).parent != Path()}
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises an error for a user without one
    private |= {str(ROOT): "<pack>", tempfile.gettempdir(): "<temporary>", home: "~"}
    private.pop(Path(home).anchor, None)  # "/" is the home of an unnamed user in a container, and of nobody
    return without_folders(found, private)


def without_folders(found: Any, folders: dict[str, str]) -> Any:
    """Replace these folders, some of which contain user names, in all strings of the data."""
    if isinstance(found, dict):
        return {key: without_folders(value, folders) for key, value in found.items()}
    if isinstance(found, list):
        return [without_folders(value, folders) for value in found]
    if isinstance(found, str):
        for folder, name in folders.items():
            found = found.replace(folder, name)
    return found


def _on(device: torch.device | str, function: Any, *arguments: Any) -> Any:
    return function(*arguments, torch.device(device))
