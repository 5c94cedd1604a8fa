"""`python -m mochi_core generate | inspect | convert`: the library from a shell."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from .checkpoints import load_transformer, load_vae
from .checkpoints.convert import DTYPES as STORED_DTYPES
from .checkpoints.convert import LAYOUTS, plan_conversion, write_conversion
from .checkpoints.inspect import inspect as inspect_file
from .checkpoints.inspect import render
from .pipeline import MochiPipeline
from .quantized import QUANTIZERS
from .schedule import linear_quadratic_schedule
from .text_encoder import load_text_encoder
from .video import FPS, save_video

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 with one sentence on stderr if the person has to change something."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def generate(options: argparse.Namespace) -> None:
    home = "cpu" if options.offload else options.device
    text_encoder = load_text_encoder(options.t5, options.tokenizer, DTYPES[options.t5_dtype], home)
    pipe = MochiPipeline(
        load_transformer(options.transformer, DTYPES[options.dtype], home, options.quantize),
        load_vae(options.vae, DTYPES[options.vae_dtype], home),
        text_encoder,
        offload=options.offload,
        device=options.device,
    )
    sigmas = linear_quadratic_schedule(options.steps, options.threshold_noise, options.linear_steps)
    with tqdm(total=options.steps, unit="step") as bar:
        frames = pipe(
            options.prompt,
            options.negative_prompt,
            height=options.height,
            width=options.width,
            num_frames=options.frames,
            guidance_scale=options.guidance,
            seed=options.seed,
            sigmas=sigmas,
            on_step=lambda *_: bool(bar.update() and False),
        )
    save_video(frames, options.output, options.fps)
    print(options.output)


def inspect(options: argparse.Namespace) -> None:
    report = inspect_file(options.file)
    print(json.dumps(report, indent=2) if options.json else render(report))


def convert(options: argparse.Namespace) -> None:
    destination: Path = options.destination
    if destination.exists() and not options.force:
        raise ValueError(f"{destination} exists already; choose another name, or overwrite it with --force.")
    if destination.suffix != ".safetensors" and options.to != "diffusers":
        raise ValueError(f"{destination} must end in .safetensors; only diffusers has a folder for a model.")
    conversion = plan_conversion(options.source, options.to, options.dtype, options.part)
    with tqdm(total=len(conversion.tensors), unit="tensor") as bar:
        write_conversion(conversion, destination, bar.update)
    print(destination)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mochi_core", description="Mochi 1 text to video.")
    commands = parser.add_subparsers(required=True, metavar="generate | inspect | convert")
    _add_generate(commands.add_parser("generate", help="make a video from a prompt"))
    command = commands.add_parser("inspect", help="say what a model file is")
    command.add_argument("file", type=Path, help="weights file or folder")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=inspect)
    _add_convert(commands.add_parser("convert", help="rewrite a transformer or autoencoder in another layout or dtype"))
    return parser


def _add_convert(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    command.set_defaults(run=convert)
    add("source", type=Path, nargs="+", help="weights file or folder; or an encoder's and a decoder's file")
    add("destination", type=Path, help=".safetensors file; or, for diffusers, a folder")
    add("--to", choices=LAYOUTS, required=True, help="canonical: the names of Genmo and ComfyUI")
    add("--dtype", choices=STORED_DTYPES, default="keep", help="fp8_scaled is for ComfyUI (default: %(default)s)")
    add("--part", choices=("transformer", "vae"), help="which one, of a file that holds both")
    add("--force", action="store_true", help="overwrite the destination")


def _add_generate(command: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = command.add_argument
    command.set_defaults(run=generate)
    add("--transformer", required=True, type=Path, help="e.g. mochi_preview_bf16.safetensors, or a diffusers folder")
    add("--vae", required=True, type=Path, nargs="+", help="e.g. mochi_vae.safetensors, or decoder.safetensors")
    add("--t5", required=True, type=Path, help="e.g. t5xxl_fp16.safetensors, or a text_encoder folder")
    add("--tokenizer", type=Path, help="folder with T5's tokenizer.json (default: looked for beside --t5)")
    add("--prompt", required=True)
    add("--negative-prompt", default="")
    add("--height", type=int, default=480, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--width", type=int, default=848, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--frames", type=int, default=163, help="6k + 1 (default: %(default)s)")
    add("--steps", type=int, default=64, help="(default: %(default)s)")
    add("--threshold-noise", type=float, default=0.025, help="noise removed by the linear steps (default: %(default)s)")
    add("--linear-steps", type=int, help="(default: half of the steps)")
    add("--guidance", type=float, default=4.5, help="classifier-free guidance scale; 1 is off (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--dtype", choices=DTYPES, default="bf16", help="of the transformer (default: %(default)s)")
    add("--quantize", choices=QUANTIZERS, help="keep the matrices of the transformer in 8 or 4 bits")
    add("--vae-dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    add("--t5-dtype", choices=DTYPES, default="fp32", help="fp16 can overflow (default: %(default)s)")
    add("--device", default=device, help="(default: %(default)s)")
    add("--offload", action="store_true", help="keep only the model at work on the device")
    add("--fps", type=int, default=FPS, help="(default: %(default)s)")
    add("-o", "--output", type=Path, default=Path("mochi.mp4"), help="mp4 file (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
