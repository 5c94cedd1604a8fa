"""The report as data: every probe by name, with what it found or its problem. `text.render` makes text of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import checks, machine
from .attempt import attempt
from .needs import file_needs

MACHINE = {
    "versions": machine.versions,
    "system": machine.system,
    "driver": machine.driver,
    "devices": machine.devices,
}
CHECKS = {
    "kernels": checks.kernels,
    "networks": checks.networks,
    "attention": checks.attention,
    "products": checks.products,
}
"""Functions of the device that models would work on."""


def examine(device: torch.device | str, files: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Look at the machine and at the headers of model files; plain data that JSON can hold, and never an error.

    A probe that fails, and a file that cannot be read, is {"problem": a sentence}.
    """
    found: dict[str, Any] = {"device": str(device)}
    found |= {name: attempt(probe) for name, probe in MACHINE.items()}
    found |= {name: attempt(_on, device, check) for name, check in CHECKS.items()}
    return found | {"files": [{"file": Path(file).name, **attempt(_on, device, file_needs, file)} for file in files]}


def _on(device: torch.device | str, function: Any, *arguments: Any) -> Any:
    return function(*arguments, torch.device(device))
