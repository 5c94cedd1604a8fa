"""`python -m mochi_core generate | edit | farm | decode | inspect | convert | doctor`, or `mochi ...` once installed."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from . import interrupts
from .autoencoder.model import AsymmVAE
from .autoencoder.plan import GIB
from .autoencoder.streaming import OutOfMemory
from .checkpoints import load_vae
from .checkpoints.convert import KEEP, LAYOUTS, TARGET_DTYPES, plan_conversion, write_conversion
from .checkpoints.inspect import inspect as inspect_file
from .checkpoints.inspect import render
from .checkpoints.names.detect import PARTS
from .doctor import examine
from .doctor import render as render_report
from .dtypes import DTYPES
from .edit_video import add_edit, edit_file
from .farm.run import add_farm
from .generate import (
    add_decoder,
    add_models,
    add_settings,
    check_device,
    check_rounds,
    default_device,
    load_pipeline,
    make_file,
    pipeline_arguments,
)
from .io.latent_files import load_latents
from .io.video import to_unit_range, video_file
from .output_files import check_writable
from .parallel.launch import MemberError, join, own_device, together
from .parallel.plan import Plan
from .shown import sentence


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 with one sentence on stderr about what has to change, or 130 for Ctrl-C.

    `farm` has 1, too: some of its videos failed.
    """
    interrupts.raise_again()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {sentence(message)}", file=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, SafetensorError, OutOfMemory, MemberError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def generate(options: argparse.Namespace) -> None:
    """Make a video; with --parallel, together with the other processes of the launcher."""
    if options.parallel is None:
        make_video(options, first=True)
        return
    device = own_device(options.device)
    options.device = str(device)
    world = join(device)
    if world.rank:
        warnings.showwarning = lambda *_, **__: None  # the first member gives it, too
    with together(world, device):
        make_video(options, first=world.rank == 0)


def make_video(options: argparse.Namespace, *, first: bool) -> None:
    """What a process does for a video; the first one, or the only one, says how far it is and writes."""
    if first:
        check_writable(options.output)  # before anything is loaded, as the next
    arguments = pipeline_arguments(options)
    steps = options.steps * check_rounds(arguments, options.output)
    pipe = load_pipeline(options, options.parallel, first=first)
    with tqdm(total=steps, unit="step", disable=not first) as bar:
        make_file(pipe, arguments, options.output, options.fps, bar.update)
    if not first:
        return
    if pipe.team is not None:
        print(pipe.team.report(), file=sys.stderr)
    if options.cache is not None:
        print(options.cache.report(), file=sys.stderr)
    print(options.output)


def edit(options: argparse.Namespace) -> None:
    edit_file(options)
    print(options.output)


def decode(options: argparse.Namespace) -> None:
    check_device(options.device)
    latents = load_latents(options.latents)
    vae = load_vae(options.vae, DTYPES[options.vae_dtype], options.device)
    for i, one in enumerate(latents.split(1)):
        output = options.output if len(latents) == 1 else options.output.with_stem(f"{options.output.stem}-{i + 1}")
        decode_to_file(vae, one, output, options)
        print(output)


def decode_to_file(vae: AsymmVAE, latents: Tensor, output: Path, options: argparse.Namespace) -> None:
    """Decode latents (1, 12, T, H, W) into a video file a few frames at a time, so that memory does not grow with its length."""
    with (
        tqdm(total=vae.decoded_shape(latents.shape)[2], unit="frame") as bar,
        video_file(output, options.fps) as writer,
    ):
        for piece in vae.decode_stream(latents, options.memory_limit):
            writer.write(to_unit_range(piece)[0].permute(1, 2, 3, 0))
            bar.update(piece.shape[2])


def inspect(options: argparse.Namespace) -> None:
    report = inspect_file(options.file)
    print(json.dumps(report, indent=2) if options.json else render(report))


def doctor(options: argparse.Namespace) -> None:
    report = examine(options.device, options.files)
    print(json.dumps(report, indent=2) if options.json else render_report(report))


def convert(options: argparse.Namespace) -> None:
    destination: Path = options.destination
    if destination.exists() and not options.force:
        raise ValueError(f"{destination} exists already; choose another name, or overwrite it with --force.")
    if destination.exists() and destination.is_dir() == (destination.suffix == ".safetensors"):
        raise ValueError(f"{destination} is no {'file' if destination.is_dir() else 'folder'}; choose another name.")
    if destination.suffix != ".safetensors" and options.to != "diffusers":
        raise ValueError(f"{destination} must end in .safetensors; only diffusers has a folder for a model.")
    conversion = plan_conversion(options.source, options.to, options.dtype, options.part)
    with tqdm(total=len(conversion.tensors), unit="tensor") as bar:
        write_conversion(conversion, destination, bar.update, overwrite=options.force)
    print(destination)


def migrate(_: argparse.Namespace) -> None:
    raise ValueError("Workflows are converted by the node pack: run `python -m migrate old.json` in its folder.")


def command_name() -> str:
    """The name that this program was started by: the installed command, or the module."""
    return "mochi" if Path(sys.argv[0]).stem == "mochi" else "python -m mochi_core"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command_name(), description="Mochi 1 text to video.")
    commands = parser.add_subparsers(
        required=True, metavar="generate | edit | farm | decode | inspect | convert | doctor"
    )
    _add_generate(commands.add_parser("generate", help="make a video from a prompt"))
    _add_edit(commands.add_parser("edit", help="change a video by a prompt"))
    add_farm(commands.add_parser("farm", help="make the videos of a file of prompts on several GPUs or machines"))
    _add_decode(commands.add_parser("decode", help="make a video from latents"))
    command = commands.add_parser("inspect", help="say what a model file is")
    command.add_argument("file", type=Path, help="weights file or folder")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=inspect)
    _add_convert(commands.add_parser("convert", help="rewrite a model in another layout or dtype"))
    command = commands.add_parser("doctor", help="say what works on this machine, for a bug report")
    command.add_argument("files", type=Path, nargs="*", help="model files, to say what they would need here")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    command.set_defaults(run=doctor)
    # No argument starts with NUL: whatever options follow are positional, and get the sentence, too.
    moved = "moved: python -m migrate, in the folder of the node pack"
    command = commands.add_parser("migrate", help=moved, prefix_chars="\0", add_help=False)
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=migrate)
    return parser


def _add_convert(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    command.set_defaults(run=convert)
    add("source", type=Path, nargs="+", help="weights file or folder; or an encoder's and a decoder's file")
    add("destination", type=Path, help=".safetensors file; or, for diffusers, a folder")
    add("--to", choices=LAYOUTS, required=True, help="canonical: the names of Genmo and ComfyUI")
    add("--dtype", choices=TARGET_DTYPES, default=KEEP, help="fp8_scaled is for ComfyUI (default: %(default)s)")
    add("--part", choices=PARTS, help="which one, of a file that holds several")
    add("--force", action="store_true", help="overwrite the destination")


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=generate)
    add_models(command)
    command.add_argument("--prompt", required=True)
    add_settings(command)
    parallel = "share the video with the other processes of torchrun, a GPU each; auto, or such as guidance=2,ulysses=4 or ring=2"
    command.add_argument("--parallel", type=parallel_option, metavar="PLAN", help=parallel)
    add_decoder(command)
    _add_output(command, "mp4 file, or .latent or .safetensors file for latents to decode later")


def _add_edit(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=edit)
    add_edit(command)
    _add_output(command, "mp4 file")


def _add_decode(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=decode)
    command.add_argument("latents", type=Path, help="from generate -o x.latent, or ComfyUI's SaveLatent")
    command.add_argument(
        "--memory-limit", type=gibibytes, metavar="GIB", help="besides the weights (default, and 0: what is free)"
    )
    add_decoder(command)
    _add_output(command, "mp4 file; of several videos, each is numbered")


def _add_output(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("-o", "--output", type=Path, default=Path("mochi.mp4"), help=f"{what} (default: %(default)s)")


def gibibytes(text: str) -> int | None:
    """A number of GiB to bytes; 0 to None, which means all that is free."""
    if not 0 <= float(text) * GIB < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text} is no amount of memory; use 0 for what is free, or a number such as 8."
        )
    return round(float(text) * GIB) or None


def parallel_option(text: str) -> Plan | str:
    """A plan, or auto."""
    try:
        return text if text == "auto" else Plan.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
