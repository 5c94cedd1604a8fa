"""`python -m mochi_core generate | decode | inspect | convert | doctor`, or `mochi ...` once installed: for a shell."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from tqdm import tqdm

from .autoencoder.model import AsymmVAE
from .autoencoder.streaming import GIB, OutOfMemory
from .checkpoints import load_transformer, load_vae
from .checkpoints.convert import KEEP, LAYOUTS, TARGET_DTYPES, plan_conversion, write_conversion
from .checkpoints.inspect import inspect as inspect_file
from .checkpoints.inspect import render
from .checkpoints.names.detect import FRAME_LEVELS_CHOICES, PARTS
from .doctor import examine
from .doctor import render as render_report
from .dtypes import DTYPES
from .geometry import FPS, VideoSize, seconds_to_frames
from .io.latent_files import load_latents, save_latents
from .io.read_frames import read_frames, read_image
from .io.video import save_video, to_unit_range, video_file
from .lora import load_lora
from .output_files import check_writable
from .pipeline import MochiPipeline
from .quantization.weights import QUANTIZERS
from .sampling.block_cache import METHODS, BlockCache
from .sampling.guidance import Guidance
from .sampling.image_to_video import KEEP_FRAMES, kept_frames
from .sampling.schedule import check_guidance, linear_quadratic_schedule
from .shown import sentence
from .text_encoder import load_text_encoder
from .transformer.attention import ATTENTIONS, choose_attention

LATENT_SUFFIXES = (".latent", ".safetensors")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 with one sentence on stderr about what has to change, or 130 for Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {sentence(message)}", file=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, SafetensorError, OutOfMemory) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def generate(options: argparse.Namespace) -> None:
    check_writable(options.output)  # before anything is loaded, as the next
    choose_attention(options.attention, options.device, DTYPES[options.dtype])
    frames = options.frames if options.seconds is None else seconds_to_frames(options.seconds)
    size = VideoSize(options.height, options.width, frames)
    sigmas = linear_quadratic_schedule(options.steps, options.threshold_noise, options.linear_steps)
    check_guidance("guidance", options.guidance)
    guidance = Guidance(tuple(options.skip_block), options.skip_scale, options.cfg_zero, options.nag)
    given = given_frames(options, size)
    home = "cpu" if options.offload else options.device
    text_encoder = load_text_encoder(options.t5, options.tokenizer, DTYPES[options.t5_dtype], home)
    frame_levels = FRAME_LEVELS_CHOICES[options.frame_levels]
    dtype = DTYPES[options.dtype]
    transformer = load_transformer(options.transformer, dtype, home, options.quantize, frame_levels=frame_levels)
    guidance.check_depth(transformer.config.depth)
    for path, strength in options.lora:
        load_lora(transformer, path, strength)
    if options.compile:
        transformer.compile_blocks()
    pipe = MochiPipeline(
        transformer,
        load_vae(options.vae, DTYPES[options.vae_dtype], home),
        text_encoder,
        offload=options.offload,
        device=options.device,
        attention=options.attention,
    )
    as_latents = options.output.suffix in LATENT_SUFFIXES
    with tqdm(total=options.steps, unit="step") as bar:
        result = pipe(
            options.prompt,
            options.negative_prompt,
            height=size.height,
            width=size.width,
            num_frames=size.num_frames,
            guidance_scale=options.guidance,
            seed=options.seed,
            sigmas=sigmas,
            output_type="latent" if as_latents else "np",
            on_step=lambda *_: bool(bar.update() and False),
            cache=options.cache,
            guidance=guidance,
            **given,
        )
    if options.cache is not None:
        print(options.cache.report(), file=sys.stderr)
    if as_latents:
        save_latents(result, options.output)
    else:
        save_video(joined(given.get("video"), result[0], options.keep), options.output, options.fps)
    print(options.output)


def given_frames(options: argparse.Namespace, size: VideoSize) -> dict[str, Any]:
    """The files that a video is made from, as arguments of `MochiPipeline`; ValueError if one cannot be read."""
    if options.image and options.video:
        raise ValueError("--image and --video are both given; a video begins with one of them.")
    given: dict[str, Any] = {"keep": options.keep, "start_noise": options.start_noise, "end_noise": options.end_noise}
    read = {
        "image": read_image,
        "last_image": read_image,
        "video": lambda path: read_frames(path, size.height, size.width),
    }
    for name, reader in read.items():
        if path := getattr(options, name):
            try:
                given[name] = reader(path)
            except ValueError as error:
                raise ValueError(f"{path.name} cannot be used: {error}") from error
    return given


def joined(
    video: NDArray[np.uint8] | None, continued: NDArray[np.float32], keep: int
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """A given video (F, H, W, 3) and the frames that continue it, which begin with its last ones."""
    if video is None:
        return continued
    new = continued[kept_frames(len(video), keep) :]
    return np.concatenate([video, (new * 255).round().astype(np.uint8)])


def decode(options: argparse.Namespace) -> None:
    latents = load_latents(options.latents)
    vae = load_vae(options.vae, DTYPES[options.vae_dtype], options.device)
    for i, one in enumerate(latents.split(1)):
        output = options.output if len(latents) == 1 else options.output.with_stem(f"{options.output.stem}-{i + 1}")
        decode_to_file(vae, one, output, options)
        print(output)


def decode_to_file(vae: AsymmVAE, latents: torch.Tensor, output: Path, options: argparse.Namespace) -> None:
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
    commands = parser.add_subparsers(required=True, metavar="generate | decode | inspect | convert | doctor")
    _add_generate(commands.add_parser("generate", help="make a video from a prompt"))
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
    add = command.add_argument
    command.set_defaults(run=generate)
    add("--transformer", required=True, type=Path, help="e.g. mochi_preview_bf16.safetensors, or a diffusers folder")
    add("--t5", required=True, type=Path, help="e.g. t5xxl_fp16.safetensors, or a text_encoder folder")
    add("--tokenizer", type=Path, help="folder with T5's tokenizer.json (default: looked for beside --t5)")
    add("--lora", type=lora_option, action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    add("--prompt", required=True)
    add("--negative-prompt", default="")
    add(
        "--image",
        type=Path,
        help="image that the video begins with; without weights such as Pusa's, by inpainting in time",
    )
    add("--last-image", type=Path, help="image that the video ends with, for 6 frames")
    add("--video", type=Path, help="video to continue, from its last frames on; both are written")
    add(
        "--keep", type=int, default=KEEP_FRAMES, help="6k + 1 frames of --video to continue from (default: %(default)s)"
    )
    noise = "0 keeps the {} as given, 1 makes them anew; Pusa's authors use 0 to 0.4 (default: %(default)s)"
    add("--start-noise", type=float, default=0.0, help=noise.format("frames at the beginning"))
    add("--end-noise", type=float, default=0.0, help=noise.format("frames at the end"))
    levels = (
        "whether the transformer was trained with a noise level of each frame (default: %(default)s, by file and name)"
    )
    add("--frame-levels", choices=FRAME_LEVELS_CHOICES, default="auto", help=levels)
    add("--height", type=int, default=480, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--width", type=int, default=848, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--frames", type=int, default=163, help="6k + 1 (default: %(default)s)")
    add("--seconds", type=float, help=f"instead of --frames, at {FPS} a second")
    add("--steps", type=int, default=64, help="(default: %(default)s)")
    add("--threshold-noise", type=float, default=0.025, help="noise removed by the linear steps (default: %(default)s)")
    add("--linear-steps", type=int, help="(default: half of the steps)")
    add("--guidance", type=float, default=4.5, help="classifier-free guidance scale; 1 is off (default: %(default)s)")
    skip = "skip-layer guidance: go away from what the transformer makes without this block, e.g. 34; may be repeated"
    add("--skip-block", type=int, action="append", default=[], metavar="N", help=skip)
    add("--skip-scale", type=float, default=1.0, help="how far (default: %(default)s)")
    add("--cfg-zero", action="store_true", help="guidance is CFG-Zero*, which leaves out the first 4 %% of the steps")
    nag = "lead attention away from the negative prompt, too, for models that want --guidance 1 (default: off; alone: %(const)s)"
    add("--nag", type=float, nargs="?", const=5.0, default=1.0, metavar="SCALE", help=nag)
    add(
        "--cache",
        type=cache_option,
        metavar="METHOD:THRESHOLD",
        help=f"leave out blocks where little changes, which changes the result; {' or '.join(METHODS)}, e.g. teacache:0.06",
    )
    add("--seed", type=int, default=0)
    add("--dtype", choices=DTYPES, default="bf16", help="of the transformer (default: %(default)s)")
    quantize = "keep the matrices of the transformer in 8 or 4 bits; fp8_rowwise multiplies in fp8, too (all change the result)"
    add("--quantize", choices=QUANTIZERS, help=quantize)
    compiled = (
        "have the operations of the transformer's blocks fused by torch.compile, in place of our own kernels on a GPU"
    )
    add("--compile", action="store_true", help=compiled)
    add("--attention", choices=ATTENTIONS, default="auto", help="auto: the fastest exact one (default: %(default)s)")
    add("--t5-dtype", choices=DTYPES, default="fp32", help="fp16 can overflow (default: %(default)s)")
    offload = (
        "keep only the model at work on the device; with stream, of the transformer only blocks, and T5 on the CPU"
    )
    add("--offload", nargs="?", const=True, default=False, choices=["stream"], help=offload)
    _add_output(command, "mp4 file, or .latent or .safetensors file for latents to decode later")


def _add_decode(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=decode)
    command.add_argument("latents", type=Path, help="from generate -o x.latent, or ComfyUI's SaveLatent")
    command.add_argument(
        "--memory-limit", type=gibibytes, metavar="GIB", help="besides the weights (default, and 0: what is free)"
    )
    _add_output(command, "mp4 file; of several videos, each is numbered")


def _add_output(command: argparse.ArgumentParser, what: str) -> None:
    """Add the options of commands that make a video; `what` describes the output file."""
    add = command.add_argument
    add("--vae", required=True, type=Path, nargs="+", help="e.g. mochi_vae.safetensors, or decoder.safetensors")
    add("--vae-dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    add("--device", default=default_device(), help="(default: %(default)s)")
    add("--fps", type=int, default=FPS, help="(default: %(default)s)")
    add("-o", "--output", type=Path, default=Path("mochi.mp4"), help=f"{what} (default: %(default)s)")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def gibibytes(text: str) -> int | None:
    """A number of GiB to bytes; 0 to None, which means all that is free."""
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text} is no amount of memory; use 0 for what is free, or a number such as 8."
        )
    return round(float(text) * GIB) or None


def cache_option(text: str) -> BlockCache:
    """METHOD:THRESHOLD to a cache."""
    method, _, threshold = text.partition(":")
    try:
        return BlockCache(method, float(threshold))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def lora_option(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH to both; a colon without a number after it belongs to the file, as in C:\\a.safetensors."""
    path, _, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


if __name__ == "__main__":
    sys.exit(main())
