"""Run probes that may fail in any way, and measure the error of a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def attempt(probe: Callable[..., Any], *arguments: Any) -> Any:
    """Return `probe(*arguments)`, or {"problem": its error on one line}."""
    try:
        return probe(*arguments)
    except Exception as error:  # drivers and packages on unknown machines can raise anything
        return {"problem": one_line(error)}


def one_line(error: Exception) -> str:
    """The message of an error on one line, preceded by its class unless the message is written for users."""
    said = " ".join(str(error).split())
    return said if isinstance(error, ValueError | OSError) and said else f"{type(error).__name__}: {said}"


def compared(actual: Tensor, exact: Tensor, tolerance: float) -> dict[str, Any]:
    """Largest difference relative to the largest magnitude of `exact`, and whether it is within `tolerance`; NaN never is."""
    difference = (actual.detach().cpu().double() - exact.detach().cpu().double()).abs().max()
    error = float(difference / exact.abs().max())
    return {"works": True, "error": error, "ok": error <= tolerance}
