"""`python -m mochi_core.train prepare | lora | full | plot`: from a folder of videos to a LoRA or to other weights."""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from .. import interrupts
from ..autoencoder.streaming import OutOfMemory
from ..checkpoints import load_vae
from ..dtypes import DTYPES
from ..geometry import VideoSize
from ..shown import sentence
from ..text_encoder import load_text_encoder
from .config import read_config, read_size
from .loop import new_accelerator, train
from .plot import plot
from .prepare import encode_captions, encode_videos, find_sources, fingerprint, other_clips
from .samples import prepare_samples
from .weights import full_model, lora_model

DTYPE_CHOICES = ("bf16", "fp32")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 with one sentence on stderr if the person has to change something."""
    interrupts.raise_again()
    warnings.showwarning = lambda message, *_, **__: tqdm.write(f"warning: {sentence(message)}", file=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except torch.OutOfMemoryError as error:
        asked = str(error).split(". ")[0]
        print(f"error: {asked}; see gradient_checkpointing, quantize and batch_size in docs/train.md.", file=sys.stderr)
        return 2
    except (ValueError, OSError, SafetensorError, OutOfMemory) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def prepare(options: argparse.Namespace) -> int:
    """Encode the videos and captions that are new, and say how many clips there are; 0 if there is any."""
    (width, height), device = options.size, options.device
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
        del text_encoder  # the two need not fit on the device together
        options.output.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(sources), initial=len(sources) - len(new), unit="clip") as bar:
            encode_videos(new, features, vae.to(device), size, bar.update)
    for path in other_clips(options.output, sources):
        warnings.warn(
            f"{path.name} is in {options.output}, but not of these videos; delete it if it is old.", stacklevel=1
        )
    done = sum(source.is_done for source in sources)
    print(f"{done} of {len(sources)} clips are in {options.output}; {len(sources) - len(new)} were there before.")
    return 0 if done else 2


def run_training(options: argparse.Namespace, *, full: bool) -> int:
    """Train a LoRA, or all weights if `full`, as the YAML file says; 0 at the last step, 130 after Ctrl+C."""
    config = read_config(options.config, full=full)
    accelerator = new_accelerator()
    samples = config.sample and prepare_samples(config.sample)
    model = (full_model if full else lora_model)(config, accelerator.device)
    step = train(config, model, accelerator, samples)
    accelerator.end_training()
    if step < config.steps:
        accelerator.print(f"Stopped after step {step} of {config.steps}; the same command goes on from there.")
        return 130
    accelerator.print(f"{config.steps} steps are done; see {config.output}.")
    return 0


def draw_losses(options: argparse.Namespace) -> int:
    """Draw the losses of logs into an image file."""
    plot(options.logs, options.output)
    print(f"The losses are drawn in {options.output}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mochi_core.train", description="Train LoRAs for Mochi 1.")
    commands = parser.add_subparsers(required=True, metavar="prepare | lora | full | plot")
    _add_prepare(commands.add_parser("prepare", help="encode a folder of videos and captions"))
    for name, full, what in (
        ("lora", False, "train a LoRA"),
        ("full", True, "train all weights of a small transformer"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("config", type=Path, help="YAML file, see docs/train.md")
        command.set_defaults(run=partial(run_training, full=full))
    command = commands.add_parser("plot", help="draw the losses of trainings")
    command.add_argument("logs", type=Path, nargs="+", help="log.csv of a training")
    command.add_argument("-o", "--output", required=True, type=Path, help="image file")
    command.set_defaults(run=draw_losses)
    return parser


def _add_prepare(command: argparse.ArgumentParser) -> None:
    device, add = "cuda" if torch.cuda.is_available() else "cpu", command.add_argument
    command.set_defaults(run=prepare)
    add("videos", type=Path, help="folder with name.mp4 and name.txt for each clip")
    add("--vae", required=True, type=Path, nargs="+", help="e.g. mochi_vae.safetensors, or encoder.safetensors")
    add("--t5", required=True, type=Path, help="e.g. t5xxl_fp16.safetensors, or a text_encoder folder")
    add("--tokenizer", type=Path, help="folder with T5's tokenizer.json (default: looked for beside --t5)")
    add("-o", "--output", required=True, type=Path, help="folder for the clips")
    add("--frames", type=int, default=37, help="6k + 1, at 30 per second (default: %(default)s)")
    add("--size", type=size_option, default=(848, 480), metavar="WxH", help="pixels (default: 848x480)")
    add("--vae-dtype", choices=DTYPE_CHOICES, default="fp32", help="(default: %(default)s)")
    add("--t5-dtype", choices=DTYPE_CHOICES, default="fp32", help="(default: %(default)s)")
    add("--device", default=device, help="(default: %(default)s)")


def size_option(text: str) -> tuple[int, int]:
    """(width, height) of "848x480" for argparse."""
    try:
        return read_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no width and height, such as 848x480.") from error


if __name__ == "__main__":
    sys.exit(main())
