"""Files from which training resumes: its state, and the log of its steps."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..output_files import replacing

LOG_HEAD = ("step", "loss", "learning_rate", "seconds")

Parameters = dict[str, torch.nn.Parameter]
Settings = dict[str, str]


def save_state(
    path: Path, step: int, parameters: Parameters, optimizer: torch.optim.Optimizer, settings: Settings
) -> None:
    """Write the trained parameters, the optimizer's state, the step and the fixed settings to one file."""
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    optimized = optimizer.state_dict()["state"]
    replace_state(path, {"step": step, "weights": weights, "optimizer": optimized, "settings": settings})


def replace_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state file; an older one is kept until the new one is complete."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)  # not by path: PyTorch's own writer does not report a full disk
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the cause, masked by an error on closing the archive
                raise error.__context__ from None
            raise


def load_state(path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer, settings: Settings) -> int:
    """Load a saved state into `parameters` and `optimizer`, and return its step; 0 if there is no file.

    Raises:
        ValueError: it is damaged, or from a training with other parameters or settings.
    """
    if not path.exists():
        return 0
    try:
        state = torch.load(path, "cpu", weights_only=True)
        weights, before = state["weights"], state["settings"]
    except (RuntimeError, EOFError, KeyError, TypeError, UnpicklingError):
        # Without the cause, whose text is PyTorch's advice to turn its check off.
        raise ValueError(f"{path} cannot be read; delete it to start from the beginning.") from None
    if {name: value.shape for name, value in weights.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(
            f"{path} is from a training with other layers or ranks; choose another output, or delete it to start over."
        )
    if changed := [key for key, value in settings.items() if before.get(key) != value]:
        key = changed[0]
        raise ValueError(
            f"{path} is from a training with {key} {before.get(key)}, but now it is {settings[key]}; set it back, choose another "
            "output, or delete the state to start over."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    optimizer.load_state_dict({"state": state["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"]


@contextmanager
def step_log(path: Path, step: int, *, enabled: bool) -> Iterator[Callable[[int, float, float, float], None]]:
    """Open the CSV log of a training that resumes after `step`; drops lines of later steps, which will be repeated."""
    if not enabled:
        yield lambda *_: None
        return
    lines: list[Sequence[Any]] = [LOG_HEAD]
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            lines += [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows(lines)

        def log(step: int, loss: float, rate: float, seconds: float) -> None:
            writer.writerow((step, f"{loss:.6g}", f"{rate:.6g}", f"{seconds:.3f}"))
            file.flush()

        yield log
