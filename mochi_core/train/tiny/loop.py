"""The training loop of the tiny model's recipe: any module, any loss, a running average of the weights.

`train/loop.py` is the one for users: prepared clips, a YAML file, several processes, samples. Both can be stopped at any
time and resume with the same steps in the same order, and both log each step to a CSV file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..state import replace_state, step_log

SAVE_EVERY = 200

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TrainLoop:
    """Length, learning rate and random numbers of one training stage."""

    name: str
    steps: int
    learning_rate: float
    average: float
    """Decay of the weights' running average, which is the result."""
    warmup: int = 100
    seed: int = 1

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warmup times cosine decay to zero."""
        rise = min(1.0, (step + 1) / self.warmup)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def rng(self, step: int) -> np.random.Generator:
        """Random numbers that depend only on the seed, the name and the step."""
        return np.random.default_rng([self.seed, *self.name.encode(), step])

    def run(self, model: Model, loss_at: Callable[[int], Tensor], folder: Path) -> Model:
        """Train `model`, resuming if possible, and return it with averaged weights; `loss_at(step)` is the loss of a step."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(self.average)
        averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
        parts = {"model": model, "optimizer": optimizer, "averaged": averaged}
        state = folder / f"{self.name}.state"
        first = _restore(parts, state)
        with step_log(folder / f"{self.name}.csv", first, enabled=first < self.steps) as log:
            for step in tqdm(range(first, self.steps), initial=first, total=self.steps, desc=self.name):
                start, rate = time.monotonic(), self.rate(step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = loss_at(step)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                averaged.update_parameters(model)
                log(step + 1, loss.item(), rate, time.monotonic() - start)
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == self.steps:
                    replace_state(
                        state, {"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}
                    )
        return cast(Model, averaged.module.eval().requires_grad_(False))


def _restore(parts: dict[str, Any], state: Path) -> int:
    """Load the saved state of every part and return its step; 0 if there is no state."""
    if not state.is_file():
        return 0
    saved = torch.load(state, weights_only=True, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]
