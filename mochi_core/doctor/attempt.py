"""Probes that may fail in any way, and a measure of how wrong a result is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def attempt(probe: Callable[..., Any], *arguments: Any) -> Any:
    """What `probe(*arguments)` returns, or {"problem": its error in one line}."""
    try:
        return probe(*arguments)
    except Exception as error:  # drivers and packages of strange machines fail in any way they like
        return {"problem": one_line(error)}


def one_line(error: Exception) -> str:
    """The sentence of an error that is meant for people; of others the class, too."""
    said = " ".join(str(error).split())
    return said if isinstance(error, ValueError | OSError) and said else f"{type(error).__name__}: {said}"


def compared(actual: Tensor, exact: Tensor, tolerance: float) -> dict[str, Any]:
    """Largest difference, over the largest magnitude of `exact`, and whether it is within `tolerance`; NaN never is."""
    difference = (actual.detach().cpu().double() - exact.detach().cpu().double()).abs().max()
    error = float(difference / exact.abs().max())
    return {"works": True, "error": error, "ok": error <= tolerance}
