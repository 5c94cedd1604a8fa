"""The training loop of `python -m mochi_core.train`: steps, log, saved states and samples, in one or several processes.

`tiny/loop.py` is the small loop for the recipe of the shipped model, with averaged weights and any loss.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, autocast
from tqdm import tqdm

from .config import Config
from .dataset import Clip, batch_at, example, open_dataset
from .objective import velocity_loss
from .samples import Samples, write_samples
from .state import load_state, save_state, step_log
from .weights import TrainableModel

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE, LOG, SAMPLES = "state.pt", "log.csv", "samples"
# All processes wait for the slowest to finish its sample videos; PyTorch's own limit is 10 or 30 minutes.
DDP_TIMEOUT = timedelta(hours=3)


def new_accelerator() -> Accelerator:
    """This process's device, and reductions over all processes if `accelerate launch` has started several.

    Raises:
        ValueError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise ValueError("Training needs accelerate; get it with: python -m pip install accelerate") from error
    return Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=DDP_TIMEOUT)])


@dataclass(frozen=True)
class TrainingRun:
    """What every training step needs: settings, model, data, optimizer and device."""

    config: Config
    model: TrainableModel
    clips: Sequence[Clip]
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator


def train(config: Config, model: TrainableModel, accelerator: Accelerator, samples: Samples | None = None) -> int:
    """Train from the saved state's step, if there is one, to the last step or Ctrl-C; returns the step reached.

    Everything is written to the folder `config.output`: state, log, trained weights and samples.

    Raises:
        ValueError: the dataset or the saved state does not fit, or the loss or its gradient is no longer finite.
    """
    clips = open_dataset(config.dataset, model.dit.config.text_width)
    optimizer = torch.optim.AdamW(model.parameters.values(), weight_decay=config.weight_decay)
    run = TrainingRun(config, model, clips, optimizer, accelerator)
    config.output.mkdir(parents=True, exist_ok=True)
    settings, is_main = fixed_settings(config, accelerator), accelerator.is_main_process
    step = load_state(config.output / STATE, model.parameters, optimizer, settings)
    with (
        first_interrupt_caught(accelerator) as interrupted,
        step_log(config.output / LOG, step, enabled=is_main) as log,
        tqdm(total=config.steps, initial=step, unit="step", disable=not is_main) as bar,
    ):
        stop = False
        while step < config.steps and not stop:
            began, rate = time.monotonic(), learning_rate(config, step)
            loss = take_step(run, step, rate)
            step, stop = step + 1, interrupted()
            log(step, loss, rate, time.monotonic() - began)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            last = stop or step == config.steps
            if is_main and (last or step % config.save_every == 0):
                # In this order: once the last step's state is saved, no later run would write its weights.
                model.write(step_stem(config.output, step))
                save_state(config.output / STATE, step, model.parameters, optimizer, settings)
            if samples is not None and not stop and (last or step % samples.keys.every == 0):
                make_samples(run, samples, step)
    accelerator.wait_for_everyone()  # until the files are written: a launcher ends all processes when the first one ends
    return step


def fixed_settings(config: Config, accelerator: Accelerator) -> dict[str, str]:
    """Settings that must not change when training resumes, as text."""
    keys = ("transformer", "quantize", "dtype", "seed", "batch_size", "gradient_accumulation")
    return {
        **{key: str(getattr(config, key)) for key in keys},
        "lora": repr(config.lora),  # as in the states of earlier versions
        "the number of processes": str(accelerator.num_processes),
    }


def take_step(run: TrainingRun, step: int, rate: float) -> float:
    """Update the parameters once, and return the mean loss before the update.

    Raises:
        ValueError: the loss or gradients are no longer finite; the parameters are unchanged.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad()
    count, processes = run.config.gradient_accumulation, run.accelerator.num_processes
    first = (step * count * processes) + run.accelerator.process_index
    losses = [add_gradients(run, first + i * processes) for i in range(count)]
    loss, parameters = mean_of_processes(run, torch.stack(losses).sum()), list(run.model.parameters.values())
    for parameter in parameters:
        # Not by wrapping the model in DDP, which would broadcast the frozen weights.
        parameter.grad = mean_of_processes(run, cast(Tensor, parameter.grad))
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.gradient_clip)
    if not (loss.isfinite() and norm.isfinite()):
        raise ValueError(
            f"The loss is {loss:.4g} and its gradient {norm:.4g} at step {step + 1}: training has diverged; lower "
            "learning_rate, and resume from the last saved step."
        )
    run.optimizer.step()
    return loss.item()


def add_gradients(run: TrainingRun, index: int) -> Tensor:
    """Add the contribution of the `index`-th batch to the gradients, and return its share of the loss."""
    config, dit = run.config, run.model.dit
    batch = batch_at(run.clips, config.batch_size, config.seed, index)
    tensors = example(batch, config.caption_dropout, config.seed, index, config.frame_levels)
    latents, embeds, mask, sigma, noise = (tensor.to(run.accelerator.device) for tensor in tensors)
    blocks = dit.config.depth if config.gradient_checkpointing is True else int(config.gradient_checkpointing)
    with autocast(latents.device.type, torch.bfloat16, enabled=run.model.autocast):
        loss = velocity_loss(dit, latents, embeds, mask, sigma, noise, blocks) / config.gradient_accumulation
    loss.backward()
    return loss.detach()


def mean_of_processes(run: TrainingRun, tensor: Tensor) -> Tensor:
    """Mean of a tensor over all processes; the tensor itself if there is only one."""
    return cast(Tensor, run.accelerator.reduce(tensor, "mean"))


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of a step: linear warmup over `warmup_steps`, then cosine decay to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_samples(run: TrainingRun, samples: Samples, step: int) -> None:
    """Make the sample videos of a step; every process makes its share and waits for the others."""
    folder, accelerator = run.config.output / SAMPLES, run.accelerator
    folder.mkdir(exist_ok=True)
    share = range(accelerator.process_index, len(samples.keys.prompts), accelerator.num_processes)
    write_samples(samples, run.model.dit, step_stem(folder, step), share)
    accelerator.wait_for_everyone()


def step_stem(folder: Path, step: int) -> Path:
    """Path, without suffix, of the files that belong to a step."""
    return folder / f"step_{step:06d}"


@contextmanager
def first_interrupt_caught(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Catch the first Ctrl-C: the yielded function then returns True, in every process at the same step."""
    usual = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        accelerator.set_trigger()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield accelerator.check_trigger
    finally:
        signal.signal(signal.SIGINT, usual)
