"""The training commands, once their arguments have been parsed."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from .. import interrupts, packages
from ..autoencoder.streaming import OutOfMemory, is_out_of_memory, memory_problem
from ..checkpoints import load_vae
from ..devices import default_device
from ..dtypes import DTYPES
from ..geometry import VideoSize
from ..shown import sentence
from ..text_encoder import load_text_encoder
from .config import read_config
from .loop import new_accelerator, train
from .plot import plot
from .prepare import encode_captions, encode_videos, find_sources, fingerprint, other_clips
from .samples import prepare_samples
from .weights import full_model, lora_model


def run(options: argparse.Namespace) -> int:
    """Run the command in `options` and return the exit status, as in `__main__.main`."""
    interrupts.raise_again()
    warnings.showwarning = lambda message, *_, **__: tqdm.write(f"warning: {sentence(message)}", file=sys.stderr)
    try:
        packages.require(options.command)
        # A process that waits for others runs no handlers in Python.
        with interrupts.ended_in_order() if os.environ.get("WORLD_SIZE", "1") == "1" else nullcontext():
            return COMMANDS[options.command](options)
    except (ValueError, OSError, SafetensorError, OutOfMemory) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "See gradient_checkpointing, quantize and batch_size in docs/train.md."
        print(f"error: {memory_problem(error)} {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def prepare(options: argparse.Namespace) -> int:
    """Encode new videos and captions, and print how many clips there are; returns 0 if there are any, else 2."""
    (width, height), device = options.size, options.device or default_device()
    size = VideoSize(height, width, options.frames)
    settings = {
        "size": [width, height, options.frames],
        "vae": [*map(fingerprint, options.vae), options.vae_dtype],
        "t5": [fingerprint(options.t5), options.t5_dtype],
    }
    sources = find_sources(options.videos, options.output, settings)
    new = [source for source in sources if not source.is_done]
    if new:
        vae = load_vae(options.vae, DTYPES[options.vae_dtype])
        vae.check_encoder(torch.empty(1, 3, size.num_frames, height, width, device="meta"))
        text_encoder = load_text_encoder(options.t5, options.tokenizer, DTYPES[options.t5_dtype], device)
        features = encode_captions(new, text_encoder)
        del text_encoder  # so that the two need not fit on the device together
        options.output.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(sources), initial=len(sources) - len(new), unit="clip") as bar:
            encode_videos(new, features, vae.to(device), size, bar.update)
    for path in other_clips(options.output, sources):
        warnings.warn(
            f"{path.name} is in {options.output}, but not from these videos; delete it if it is outdated.", stacklevel=1
        )
    done = sum(source.is_done for source in sources)
    print(f"{done} of {len(sources)} clips are in {options.output}; {len(sources) - len(new)} were already there.")
    return 0 if done else 2


def run_training(options: argparse.Namespace, *, full: bool) -> int:
    """Train a LoRA, or all weights if `full`, as configured in the YAML file; returns 0 at the last step, 130 after Ctrl-C."""
    config = read_config(options.config, full=full)
    accelerator = new_accelerator()
    samples = config.sample and prepare_samples(config.sample)
    model = (full_model if full else lora_model)(config, accelerator.device)
    step = train(config, model, accelerator, samples)
    accelerator.end_training()
    if step < config.steps:
        accelerator.print(f"Stopped after step {step} of {config.steps}; the same command resumes from there.")
        return 130
    accelerator.print(f"{config.steps} steps are done; see {config.output}.")
    return 0


def draw_losses(options: argparse.Namespace) -> int:
    """Plot the losses of log files to an image file."""
    plot(options.logs, options.output)
    print(f"The losses are plotted in {options.output}.")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "prepare": prepare,
    "lora": partial(run_training, full=False),
    "full": partial(run_training, full=True),
    "plot": draw_losses,
}
