"""`python -m mochi_core generate | edit | farm | decode | inspect | convert | doctor`, or `mochi ...` once installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .choices import KEEP, LAYOUTS, PARTS, TARGET_DTYPES
from .options import DEVICE, add_decoder, add_edit, add_farm, add_models, add_settings, gibibytes, parallel_option


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 with one sentence on stderr about what has to change, or 130 for Ctrl-C.

    `farm` has 1, too: some of its videos failed.
    """
    options = _parser().parse_args(arguments)
    from .commands import run  # with PyTorch, which takes seconds: an error in the arguments has been said by now

    return run(options)


def command_name() -> str:
    """The name that this program was started by: the installed command, or the module."""
    return "mochi" if Path(sys.argv[0]).stem == "mochi" else "python -m mochi_core"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command_name(), description="Mochi 1 text to video.")
    names = "generate | edit | farm | decode | inspect | convert | doctor"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    _add_generate(commands.add_parser("generate", help="make a video from a prompt"))
    _add_edit(commands.add_parser("edit", help="change a video by a prompt"))
    add_farm(commands.add_parser("farm", help="make the videos of a file of prompts on several GPUs or machines"))
    _add_decode(commands.add_parser("decode", help="make a video from latents"))
    command = commands.add_parser("inspect", help="say what a model file is")
    command.add_argument("file", type=Path, help="weights file or folder")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_convert(commands.add_parser("convert", help="rewrite a model in another layout or dtype"))
    command = commands.add_parser("doctor", help="say what works on this machine, for a bug report")
    command.add_argument("files", type=Path, nargs="*", help="model files, to say what they would need here")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--device", help=DEVICE)
    # No argument starts with NUL: whatever options follow are positional, and get the sentence, too.
    moved = "moved: python -m migrate, in the folder of the node pack"
    command = commands.add_parser("migrate", help=moved, prefix_chars="\0", add_help=False)
    command.add_argument("arguments", nargs="*")
    return parser


def _add_convert(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", type=Path, nargs="+", help="weights file or folder; or an encoder's and a decoder's file")
    add("destination", type=Path, help=".safetensors file; or, for diffusers, a folder")
    add("--to", choices=LAYOUTS, required=True, help="canonical: the names of Genmo and ComfyUI")
    add("--dtype", choices=TARGET_DTYPES, default=KEEP, help="fp8_scaled is for ComfyUI (default: %(default)s)")
    add("--part", choices=PARTS, help="which one, of a file that holds several")
    add("--force", action="store_true", help="overwrite the destination")


def _add_generate(command: argparse.ArgumentParser) -> None:
    add_models(command)
    command.add_argument("--prompt", required=True)
    add_settings(command)
    parallel = "share the video with the other processes of torchrun, a GPU each; auto, or such as guidance=2,ulysses=4 or ring=2"
    command.add_argument("--parallel", type=parallel_option, metavar="PLAN", help=parallel)
    add_decoder(command)
    _add_output(command, "mp4 file, or .latent or .safetensors file for latents to decode later")


def _add_edit(command: argparse.ArgumentParser) -> None:
    add_edit(command)
    _add_output(command, "mp4 file")


def _add_decode(command: argparse.ArgumentParser) -> None:
    command.add_argument("latents", type=Path, help="from generate -o x.latent, or ComfyUI's SaveLatent")
    command.add_argument(
        "--memory-limit", type=gibibytes, metavar="GIB", help="besides the weights (default, and 0: what is free)"
    )
    add_decoder(command)
    _add_output(command, "mp4 file; of several videos, each is numbered")


def _add_output(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("-o", "--output", type=Path, default=Path("mochi.mp4"), help=f"{what} (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
