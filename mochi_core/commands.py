"""The commands, once their arguments have been parsed."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from . import interrupts, packages
from .autoencoder.model import AsymmVAE
from .autoencoder.streaming import OutOfMemory, is_out_of_memory, memory_problem
from .checkpoints import load_vae
from .checkpoints.convert import plan_conversion, write_conversion
from .checkpoints.inspect import inspect as inspect_file
from .checkpoints.inspect import render
from .devices import check_device, default_device, named_device
from .doctor import examine, failures
from .doctor import render as render_report
from .dtypes import DTYPES
from .edit_video import edit_file
from .farm.run import farm
from .generate import (
    SMALLER,
    Bars,
    check_rounds,
    load_pipeline,
    loading,
    make_file,
    pipeline_arguments,
    say,
)
from .io.latent_files import load_latents
from .io.video import to_unit_range, video_file
from .output_files import check_writable
from .parallel.launch import MemberError, join, own_device, together
from .shown import sentence


def run(options: argparse.Namespace) -> int:
    """Run the command in `options` and return the exit status, as in `__main__.main`."""
    interrupts.raise_again()
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {sentence(message)}")
    if "device" in options and options.device is None:
        options.device = default_device()
    try:
        packages.require(options.command)
        with interrupts.ended_in_order():
            return COMMANDS[options.command](options) or 0
    except (ValueError, OSError, SafetensorError, OutOfMemory, MemberError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = SMALLER if "offload" in options else "Close other programs that use it."
        print(f"error: {memory_problem(error)} {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def generate(options: argparse.Namespace) -> None:
    """Make a video; with --parallel, jointly with the launcher's other processes."""
    if options.parallel is None:
        make_video(options, first=True)
        return
    device = own_device(options.device)
    options.device = str(device)
    world = join(device)
    if world.rank:
        warnings.showwarning = lambda *_, **__: None  # the first member shows it already
    with together(world, device):
        make_video(options, first=world.rank == 0)


def make_video(options: argparse.Namespace, *, first: bool) -> None:
    """One process's part in making a video; the first or only process reports progress and writes the file."""
    if first:
        check_writable(options.output)  # like the checks below, before anything is loaded
    arguments = pipeline_arguments(options)
    steps = options.steps * check_rounds(arguments, options.output)
    pipe = load_pipeline(options, options.parallel, first=first, on_load=say if first else None)
    with Bars(steps, disable=not first) as bars:
        make_file(pipe, arguments, options.output, options.fps, bars.step, bars.frames)
    if not first:
        return
    if pipe.team is not None:
        print(pipe.team.report(), file=sys.stderr)
    if arguments["cache"] is not None:
        print(arguments["cache"].report(), file=sys.stderr)
    print(options.output)


def edit(options: argparse.Namespace) -> None:
    edit_file(options)
    print(options.output)


def decode(options: argparse.Namespace) -> None:
    check_device(options.device)
    latents = load_latents(options.latents)
    outputs = numbered(options.output, len(latents))
    for output in outputs:
        check_writable(output)
    say(loading("autoencoder", *options.vae))
    vae = load_vae(options.vae, DTYPES[options.vae_dtype], options.device)
    for one, output in zip(latents.split(1), outputs, strict=True):
        decode_to_file(vae, one, output, options)
        print(output)


def numbered(output: Path, count: int) -> list[Path]:
    """One output file per video, numbered; `output` itself for a single one."""
    return [output] if count == 1 else [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]


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


def doctor(options: argparse.Namespace) -> int:
    named_device(options.device)
    report = examine(options.device, options.files)
    print(json.dumps(report, indent=2) if options.json else render_report(report))
    return int(bool(failures(report)))


def convert(options: argparse.Namespace) -> None:
    destination: Path = options.destination
    if destination.exists() and not options.force:
        raise ValueError(f"{destination} already exists; choose another name, or overwrite it with --force.")
    if destination.exists() and destination.is_dir() == (destination.suffix == ".safetensors"):
        raise ValueError(f"{destination} is not a {'file' if destination.is_dir() else 'folder'}; choose another name.")
    if destination.suffix != ".safetensors" and options.to != "diffusers":
        raise ValueError(f"{destination} must end in .safetensors; only the diffusers layout writes a folder.")
    conversion = plan_conversion(options.source, options.to, options.dtype, options.part)
    with tqdm(total=len(conversion.tensors), unit="tensor") as bar:
        write_conversion(conversion, destination, bar.update, overwrite=options.force)
    print(destination)


def migrate(_: argparse.Namespace) -> None:
    raise ValueError("Workflows are converted by the node pack: run `python -m migrate old.json` in its folder.")


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "generate": generate,
    "edit": edit,
    "farm": farm,
    "decode": decode,
    "inspect": inspect,
    "doctor": doctor,
    "convert": convert,
    "migrate": migrate,
}
