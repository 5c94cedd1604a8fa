"""Command-line options and their parsing; everything that can be checked without PyTorch."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from .choices import (
    ATTENTIONS,
    CACHE_METHODS,
    DTYPE_NAMES,
    FRAME_LEVELS,
    KEEP,
    LAYOUTS,
    PART_NAMES,
    QUANTIZER_NAMES,
    TARGET_DTYPE_NAMES,
    check_cache,
)
from .geometry import FPS, KEEP_FRAMES
from .parallel.plan import Plan
from .shown import shown

VIDEO_SUFFIX, LATENT_SUFFIXES = ".mp4", (".latent", ".safetensors")
MOST_FPS = 1000
GIB = 2**30
EDIT_DEFAULTS = {"steps": (30, 50), "guidance": (5.5, 4.5)}
"""(FlowEdit, inversion): the defaults of the node Mochi Edit, and the values in the inversion template."""
DEVICE = "(default: cuda if PyTorch finds a GPU, else cpu)"


def add_models(command: argparse.ArgumentParser) -> None:
    """Add the options of the transformer and the text encoder."""
    add = command.add_argument
    add("--transformer", required=True, type=Path, help="e.g. mochi_preview_bf16.safetensors, or a diffusers folder")
    add("--t5", required=True, type=Path, help="e.g. t5xxl_fp16.safetensors, or a text_encoder folder")
    add("--tokenizer", type=Path, help="folder with T5's tokenizer.json (default: searched for next to --t5)")
    add("--lora", type=lora_option, action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    levels = "whether the transformer was trained with per-frame noise levels (default: %(default)s, by the file and its name)"
    add("--frame-levels", choices=FRAME_LEVELS, default="auto", help=levels)
    add("--dtype", choices=DTYPE_NAMES, default="bf16", help="dtype of the transformer (default: %(default)s)")
    quantize = (
        "store the transformer's matrices in 8 or 4 bits; fp8_rowwise also multiplies in fp8 (all change the result)"
    )
    add("--quantize", choices=QUANTIZER_NAMES, help=quantize)
    compiled = "fuse the operations of the transformer's blocks with torch.compile, instead of our own kernels on a GPU"
    add("--compile", action="store_true", help=compiled)
    add("--attention", choices=ATTENTIONS, default="auto", help="auto: the fastest exact one (default: %(default)s)")
    add("--t5-dtype", choices=DTYPE_NAMES, default="fp32", help="fp16 can overflow (default: %(default)s)")
    offload = "keep only the model in use on the device; with stream, only a few of the transformer's blocks, and T5 on the CPU"
    add("--offload", nargs="?", const=True, default=False, choices=["stream"], help=offload)


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add the options that may differ between videos, apart from the prompt."""
    add = command.add_argument
    add("--negative-prompt", default="")
    add(
        "--image",
        type=Path,
        help="image that the video begins with; by temporal inpainting, unless the weights are like Pusa's",
    )
    add("--last-image", type=Path, help="image that the video ends with, for its last 6 frames")
    add("--video", type=Path, help="video to continue from its last frames; the output contains both")
    add(
        "--keep",
        type=int,
        default=KEEP_FRAMES,
        help="6k + 1 frames to continue from, with --video and between rounds (default: %(default)s)",
    )
    noise = "0 keeps the given frames at the {}, 1 regenerates them; Pusa's authors use {} (default: %(default)s)"
    published = noise.format("beginning", "0 to 0.4, and 0.3 with a last image")
    add("--start-noise", type=float, default=0.0, help=published)
    add("--end-noise", type=float, default=0.0, help=noise.format("end", "0.7"))
    add("--height", type=int, default=480, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--width", type=int, default=848, help="pixels, a multiple of 16 (default: %(default)s)")
    frames = (
        "6k + 1; with --video this includes the kept ones, and earlier ones are also written (default: %(default)s)"
    )
    add("--frames", type=int, default=163, help=frames)
    add("--seconds", type=float, help=f"instead of --frames, at {FPS} frames per second")
    rounds = (
        "make a longer video in rounds of at most this many, each continuing the last --keep frames of the previous one"
    )
    add("--round", type=int, metavar="FRAMES", help=rounds)
    add("--steps", type=int, default=64, help="(default: %(default)s)")
    add("--threshold-noise", type=float, default=0.025, help="noise removed by the linear steps (default: %(default)s)")
    add("--linear-steps", type=int, help="(default: half of the steps)")
    add("--guidance", type=float, default=4.5, help="classifier-free guidance scale; 1 is off (default: %(default)s)")
    skip = "skip-layer guidance: steer away from the transformer's result without this block, e.g. 34; may be repeated"
    add("--skip-block", type=int, action="append", default=[], metavar="N", help=skip)
    add("--skip-scale", type=float, default=1.0, help="scale of skip-layer guidance (default: %(default)s)")
    add("--cfg-zero", action="store_true", help="use CFG-Zero* for guidance, which skips the first 4 %% of the steps")
    nag = "also steer attention away from the negative prompt, for models that need --guidance 1 (default: off; bare: %(const)s)"
    add("--nag", type=float, nargs="?", const=5.0, default=1.0, metavar="SCALE", help=nag)
    add(
        "--cache",
        type=cache_option,
        metavar="METHOD:THRESHOLD",
        help=f"skip blocks when little changes, which alters the result; {' or '.join(CACHE_METHODS)}, e.g. teacache:0.06",
    )
    add("--seed", type=seed_option, default=0, help="the same seed gives the same video (default: %(default)s)")


def add_decoder(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that decode latents to a video."""
    add = command.add_argument
    add("--vae", required=True, type=Path, nargs="+", help="e.g. mochi_vae.safetensors, or decoder.safetensors")
    add("--vae-dtype", choices=DTYPE_NAMES, default="fp32", help="(default: %(default)s)")
    add("--device", help=DEVICE)
    add("--fps", type=rate_option, default=FPS, help="(default: %(default)s)")


def add_generate(command: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    add_models(command)
    command.add_argument("--prompt", required=True)
    add_settings(command)
    parallel = "share the video among torchrun's processes, one GPU each; auto, or e.g. guidance=2,ulysses=4 or ring=2"
    command.add_argument("--parallel", type=parallel_option, metavar="PLAN", help=parallel)
    add_decoder(command)
    _add_output(command, "mp4 file, or .latent or .safetensors file for latents to decode later", *LATENT_SUFFIXES)


def add_edit(command: argparse.ArgumentParser) -> None:
    """Add the options of `edit`."""
    add_models(command)
    add = command.add_argument
    add("--video", required=True, type=Path, help="video to edit; read at 30 frames per second")
    add("--source-prompt", required=True, help="what the video shows, including its motion")
    add("--prompt", required=True, help="what it should show: the same text with other words for what changes")
    add("--negative-prompt", default="")
    add("--height", type=int, default=480, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--width", type=int, default=848, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--frames", type=int, help="at most this many of the video's first frames, 6k + 1 (default: all)")
    one, other = EDIT_DEFAULTS["steps"]
    forwards = f"FlowEdit: four forward passes each (default: {one}); inversion: three (default: {other})"
    add("--steps", type=int, help=forwards)
    noise = "FlowEdit: how much may change, as the noise level of the first step (default: %(default)s)"
    add("--start-noise", type=float, default=0.9, help=noise)
    one, other = EDIT_DEFAULTS["guidance"]
    add(
        "--guidance",
        type=float,
        help=f"for the prompt; higher changes more (default: {one}, or {other} with --inversion)",
    )
    add("--source-guidance", type=float, default=1.5, help="FlowEdit: for the source prompt (default: %(default)s)")
    add("--inversion", action="store_true", help="RF inversion instead of FlowEdit")
    add("--eta", type=float, default=0.8, help="inversion: the pull towards the video, 0 to 1 (default: %(default)s)")
    until = "inversion: noise level down to which it pulls; lower keeps more (default: %(default)s)"
    add("--pull-until", type=float, default=0.8, help=until)
    add(
        "--seed",
        type=seed_option,
        default=0,
        help="FlowEdit: different noise gives a different edit (default: %(default)s)",
    )
    add_decoder(command)
    _add_output(command, "mp4 file")


def add_farm(command: argparse.ArgumentParser) -> None:
    """Add the options of `farm`."""
    add = command.add_argument
    add("prompts", type=Path, help="one JSON object per line: a prompt, and any of the options below that differ")
    add("--address", help="of a Ray cluster, or auto (default: processes on this machine)")
    add("--workers", type=int, help="(default: one per GPU, or one per machine without GPUs)")
    add("--gpus-per-worker", type=int, default=1, help="GPUs that work together on each video (default: %(default)s)")
    add_models(command)
    add_settings(command)
    add_decoder(command)
    add("-o", "--output", type=Path, default=Path("videos"), help="folder (default: %(default)s)")


def add_decode(command: argparse.ArgumentParser) -> None:
    """Add the options of `decode`."""
    command.add_argument("latents", type=Path, help="from generate -o x.latent, or ComfyUI's SaveLatent")
    command.add_argument(
        "--memory-limit",
        type=gibibytes,
        metavar="GIB",
        help="memory besides the weights (default, and 0: all that is free)",
    )
    add_decoder(command)
    _add_output(command, "mp4 file; several videos are numbered")


def add_convert(command: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    add = command.add_argument
    add("source", type=Path, nargs="+", help="weights file or folder; or an encoder's and a decoder's file")
    add("destination", type=Path, help=".safetensors file; or, for diffusers, a folder")
    add("--to", choices=LAYOUTS, required=True, help="canonical: the names of Genmo and ComfyUI")
    add("--dtype", choices=TARGET_DTYPE_NAMES, default=KEEP, help="fp8_scaled is for ComfyUI (default: %(default)s)")
    add("--part", choices=PART_NAMES, help="the model to convert, if the file holds several")
    add("--force", action="store_true", help="overwrite the destination")


def _add_output(command: argparse.ArgumentParser, what: str, *others: str) -> None:
    """Add the output option, for a video or for files with one of the suffixes `others`."""

    def named(text: str) -> Path:
        endings = (VIDEO_SUFFIX, *others)
        if (path := Path(text)).suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{shown(text)} must end in {' or '.join(endings)}.")
        return path

    command.add_argument("-o", "--output", type=named, default=Path("mochi.mp4"), help=f"{what} (default: %(default)s)")


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None


def seed_option(text: str) -> int:
    """A seed in the range that PyTorch's generators accept."""
    if not -(2**63) <= (seed := whole_number(text)) < 2**64:
        raise argparse.ArgumentTypeError(f"{shown(text)} is out of range; use a seed of 64 bits.")
    return seed


def rate_option(text: str) -> int:
    """Frames per second."""
    if not 1 <= (rate := whole_number(text)) <= MOST_FPS:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a frame rate; use 1 to {MOST_FPS} frames per second.")
    return rate


def gibibytes(text: str) -> int | None:
    """Convert GiB to bytes, and 0 to None, which means all that is free."""
    try:
        count = float(text) * GIB
    except ValueError:
        count = math.nan
    if not 0 <= count < math.inf:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not an amount of memory; use 0 for all that is free, or a number such as 8."
        )
    return round(count) or None


def parallel_option(text: str) -> Plan | str:
    """A plan, or auto."""
    try:
        return text if text == "auto" else Plan.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cache_option(text: str) -> tuple[str, float]:
    """METHOD:THRESHOLD to the arguments of a `BlockCache`."""
    method, _, threshold = text.partition(":")
    try:
        number = float(threshold)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not METHOD:THRESHOLD; use e.g. teacache:0.06 or first_block:0.1."
        ) from None
    try:
        check_cache(method, number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)}: {error}") from None
    return method, number


def lora_option(text: str) -> tuple[str, float]:
    """Parse FILE or FILE:STRENGTH; a colon that no number follows belongs to the file, as in C:\\a.safetensors."""
    path, _, number = text.rpartition(":")
    try:
        strength = float(number) if path else 1.0
    except ValueError:
        return text, 1.0
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"{shown(text)} has a non-finite strength; use a number such as 0.8.")
    return path or text, strength
