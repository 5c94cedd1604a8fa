"""Devices by name: the default, and whether this machine has a given one."""

from __future__ import annotations

import torch

from .shown import shown

KINDS = ("cpu", "cuda", "mps", "xpu")
"""Devices that an error lists if the machine has them; any other PyTorch backend is accepted, too."""


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def named_device(name: torch.device | str | int) -> torch.device:
    """The device of that name, whether or not this machine has it; ValueError for an invalid name."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device is {shown(str(name))}, which is not a device; use cpu, cuda, cuda:1 or mps."
        ) from None


def check_device(name: torch.device | str | int | None) -> None:
    """Raise a ValueError if this machine lacks a device; a number is a card, as PyTorch counts them, None the default device."""
    if name is None:
        return
    device = named_device(name)
    # The index can be negative: PyTorch stores it in 8 signed bits.
    if not 0 <= (device.index or 0) < _count(device.type):
        there = ", ".join(kind for kind in KINDS if _count(kind))
        raise ValueError(
            f"device is {shown(str(name))}, which this machine does not have or cannot compute on; it has {there}."
        )


def _count(kind: str) -> int:
    """Number of devices of a kind; 0 for kinds that are not real devices, such as meta."""
    try:
        return torch.get_device_module(kind).device_count()
    except (RuntimeError, AttributeError):
        return 0
