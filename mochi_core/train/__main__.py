"""`python -m mochi_core.train prepare | lora | full | plot`: from a folder of videos to a LoRA or full weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..options import DEVICE
from .config import read_size

DTYPE_CHOICES = ("bf16", "fp32")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns 0 on success, 2 with one sentence on stderr if the user has to change something."""
    options = _parser().parse_args(arguments)
    from .commands import run  # imports PyTorch, which takes seconds: argument errors have been reported by now

    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mochi_core.train", description="Train LoRAs for Mochi 1.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare | lora | full | plot")
    _add_prepare(commands.add_parser("prepare", help="encode a folder of videos and captions"))
    for name, what in (("lora", "train a LoRA"), ("full", "train all weights of a small transformer")):
        command = commands.add_parser(name, help=what)
        command.add_argument("config", type=Path, help="YAML file, see docs/train.md")
    command = commands.add_parser("plot", help="plot the losses of training runs")
    command.add_argument("logs", type=Path, nargs="+", help="log.csv of a training run")
    command.add_argument("-o", "--output", required=True, type=Path, help="image file")
    return parser


def _add_prepare(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("videos", type=Path, help="folder with name.mp4 and name.txt for each clip")
    add("--vae", required=True, type=Path, nargs="+", help="e.g. mochi_vae.safetensors, or encoder.safetensors")
    add("--t5", required=True, type=Path, help="e.g. t5xxl_fp16.safetensors, or a text_encoder folder")
    add("--tokenizer", type=Path, help="folder with T5's tokenizer.json (default: searched for next to --t5)")
    add("-o", "--output", required=True, type=Path, help="folder for the clips")
    add("--frames", type=int, default=37, help="6k + 1, at 30 per second (default: %(default)s)")
    add("--size", type=size_option, default=(848, 480), metavar="WxH", help="pixels (default: 848x480)")
    add("--vae-dtype", choices=DTYPE_CHOICES, default="fp32", help="(default: %(default)s)")
    add("--t5-dtype", choices=DTYPE_CHOICES, default="fp32", help="(default: %(default)s)")
    add("--device", help=DEVICE)


def size_option(text: str) -> tuple[int, int]:
    """Parse a size such as "848x480" to (width, height) for argparse."""
    try:
        return read_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a width and height, such as 848x480.") from error


if __name__ == "__main__":
    sys.exit(main())
