"""Plot the losses of training runs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

POINTS = 200
"""Most points of a curve."""


def plot(logs: Sequence[Path], image: Path) -> None:
    """Plot the losses of several logs side by side, each averaged to at most `POINTS` points.

    Raises:
        ValueError: matplotlib is not installed, or a file is not a log.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Plots need matplotlib; get it with: python -m pip install matplotlib") from error

    figure = Figure(figsize=(4 * len(logs), 3), layout="constrained")
    for axes, log in zip(np.atleast_1d(figure.subplots(1, len(logs))), logs, strict=True):
        axes.plot(*averaged(*read_losses(log)))
        axes.set(title=log.parent.name if log.stem == "log" else log.stem, xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(image, dpi=120)


def read_losses(log: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a log.csv; ValueError if it is not one."""
    with log.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{log} is not a training log; give a log.csv.") from error


def averaged(steps: Sequence[int], losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of steps and losses over equal parts: `POINTS` of them, or one per step if there are fewer."""
    parts = min(POINTS, max(1, len(steps)))
    return tuple([float(np.mean(part)) for part in np.array_split(values, parts)] for values in (steps, losses))  # pyright: ignore[reportReturnType]
