"""`python -m mochi_core generate | edit | farm | decode | inspect | convert | doctor`, or `mochi ...` once installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import DEVICE, add_convert, add_decode, add_edit, add_farm, add_generate


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: success. 1: some videos of `farm` or some checks of `doctor` failed. 2: an error, with one sentence on stderr about what
    to change. 130: Ctrl-C. 128 + its number: a termination signal.
    """
    options = _parser().parse_args(arguments)
    from .commands import run  # imports PyTorch, which takes seconds: argument errors have been reported by now

    return run(options)


def command_name() -> str:
    """How this program was started: the installed command, or `python -m`."""
    return "mochi" if Path(sys.argv[0]).stem == "mochi" else "python -m mochi_core"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command_name(), description="Mochi 1 text to video.")
    names = "generate | edit | farm | decode | inspect | convert | doctor"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    add_generate(commands.add_parser("generate", help="make a video from a prompt"))
    add_edit(commands.add_parser("edit", help="change a video by a prompt"))
    add_farm(commands.add_parser("farm", help="make a video for each prompt in a file, on several GPUs or machines"))
    add_decode(commands.add_parser("decode", help="make a video from latents"))
    command = commands.add_parser("inspect", help="say what a model file is")
    command.add_argument("file", type=Path, help="weights file or folder")
    command.add_argument("--json", action="store_true", help="print JSON")
    add_convert(commands.add_parser("convert", help="rewrite a model in another layout or dtype"))
    command = commands.add_parser("doctor", help="report what works on this machine, for a bug report")
    command.add_argument("files", type=Path, nargs="*", help="model files; reports the memory they would need here")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--device", help=DEVICE)
    # No argument starts with NUL, so any options that follow count as positional and get the same message.
    moved = "moved: python -m migrate, in the folder of the node pack"
    command = commands.add_parser("migrate", help=moved, prefix_chars="\0", add_help=False)
    command.add_argument("arguments", nargs="*")
    return parser


if __name__ == "__main__":
    sys.exit(main())
