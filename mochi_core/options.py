"""Options of the commands, and what is read of them; all that can be said without PyTorch."""

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
"""(FlowEdit, inversion): as the node Mochi Edit proposes, and as the template of inversion has it."""
DEVICE = "(default: cuda where PyTorch has a GPU, or cpu)"


def add_models(command: argparse.ArgumentParser) -> None:
    """Add the options of transformer and text encoder."""
    add = command.add_argument
    add("--transformer", required=True, type=Path, help="e.g. mochi_preview_bf16.safetensors, or a diffusers folder")
    add("--t5", required=True, type=Path, help="e.g. t5xxl_fp16.safetensors, or a text_encoder folder")
    add("--tokenizer", type=Path, help="folder with T5's tokenizer.json (default: looked for beside --t5)")
    add("--lora", type=lora_option, action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    levels = (
        "whether the transformer was trained with a noise level of each frame (default: %(default)s, by file and name)"
    )
    add("--frame-levels", choices=FRAME_LEVELS, default="auto", help=levels)
    add("--dtype", choices=DTYPE_NAMES, default="bf16", help="of the transformer (default: %(default)s)")
    quantize = "keep the matrices of the transformer in 8 or 4 bits; fp8_rowwise multiplies in fp8, too (all change the result)"
    add("--quantize", choices=QUANTIZER_NAMES, help=quantize)
    compiled = (
        "have the operations of the transformer's blocks fused by torch.compile, in place of our own kernels on a GPU"
    )
    add("--compile", action="store_true", help=compiled)
    add("--attention", choices=ATTENTIONS, default="auto", help="auto: the fastest exact one (default: %(default)s)")
    add("--t5-dtype", choices=DTYPE_NAMES, default="fp32", help="fp16 can overflow (default: %(default)s)")
    offload = (
        "keep only the model at work on the device; with stream, of the transformer only blocks, and T5 on the CPU"
    )
    add("--offload", nargs="?", const=True, default=False, choices=["stream"], help=offload)


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add what may differ from one video to the next, besides the prompt."""
    add = command.add_argument
    add("--negative-prompt", default="")
    add(
        "--image",
        type=Path,
        help="image that the video begins with; without weights such as Pusa's, by inpainting in time",
    )
    add("--last-image", type=Path, help="image that the video ends with, for 6 frames")
    add("--video", type=Path, help="video to continue, from its last frames on; both are written")
    add(
        "--keep",
        type=int,
        default=KEEP_FRAMES,
        help="6k + 1 frames to continue from, of --video and in rounds (default: %(default)s)",
    )
    noise = "0 keeps the frames at the {} as given, 1 makes them anew; Pusa's authors use {} (default: %(default)s)"
    published = noise.format("beginning", "0 to 0.4, and 0.3 with a last image")
    add("--start-noise", type=float, default=0.0, help=published)
    add("--end-noise", type=float, default=0.0, help=noise.format("end", "0.7"))
    add("--height", type=int, default=480, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--width", type=int, default=848, help="pixels, a multiple of 16 (default: %(default)s)")
    frames = "6k + 1; with --video the kept ones are counted in, and what is before them is written, too (default: %(default)s)"
    add("--frames", type=int, default=163, help=frames)
    add("--seconds", type=float, help=f"instead of --frames, at {FPS} a second")
    rounds = "make a longer video in rounds of at most so many, each from the last --keep frames of the one before"
    add("--round", type=int, metavar="FRAMES", help=rounds)
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
        help=f"leave out blocks where little changes, which changes the result; {' or '.join(CACHE_METHODS)}, e.g. teacache:0.06",
    )
    add("--seed", type=seed_option, default=0, help="the same one makes the same video (default: %(default)s)")


def add_decoder(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that make a video of latents."""
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
    parallel = "share the video with the other processes of torchrun, a GPU each; auto, or such as guidance=2,ulysses=4 or ring=2"
    command.add_argument("--parallel", type=parallel_option, metavar="PLAN", help=parallel)
    add_decoder(command)
    _add_output(command, "mp4 file, or .latent or .safetensors file for latents to decode later", *LATENT_SUFFIXES)


def add_edit(command: argparse.ArgumentParser) -> None:
    """Add the options of `edit`."""
    add_models(command)
    add = command.add_argument
    add("--video", required=True, type=Path, help="what is changed; taken at 30 frames a second")
    add("--source-prompt", required=True, help="what the video shows, its motion too")
    add("--prompt", required=True, help="what it is to show: the same text with other words where it changes")
    add("--negative-prompt", default="")
    add("--height", type=int, default=480, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--width", type=int, default=848, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--frames", type=int, help="of the video's first frames at most so many, 6k + 1 (default: all)")
    one, other = EDIT_DEFAULTS["steps"]
    forwards = f"FlowEdit: each is four forwards (default: {one}); inversion: three (default: {other})"
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
    add("--seed", type=seed_option, default=0, help="FlowEdit: other noise makes another edit (default: %(default)s)")
    add_decoder(command)
    _add_output(command, "mp4 file")


def add_farm(command: argparse.ArgumentParser) -> None:
    """Add the options of `farm`."""
    add = command.add_argument
    add("prompts", type=Path, help="a JSON object on each line: prompt, and what differs from the options below")
    add("--address", help="of a Ray cluster, or auto (default: processes on this machine)")
    add("--workers", type=int, help="(default: one for each GPU, or without GPUs for each machine)")
    add("--gpus-per-worker", type=int, default=1, help="GPUs that make each video together (default: %(default)s)")
    add_models(command)
    add_settings(command)
    add_decoder(command)
    add("-o", "--output", type=Path, default=Path("videos"), help="folder (default: %(default)s)")


def add_decode(command: argparse.ArgumentParser) -> None:
    """Add the options of `decode`."""
    command.add_argument("latents", type=Path, help="from generate -o x.latent, or ComfyUI's SaveLatent")
    command.add_argument(
        "--memory-limit", type=gibibytes, metavar="GIB", help="besides the weights (default, and 0: what is free)"
    )
    add_decoder(command)
    _add_output(command, "mp4 file; of several videos, each is numbered")


def add_convert(command: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    add = command.add_argument
    add("source", type=Path, nargs="+", help="weights file or folder; or an encoder's and a decoder's file")
    add("destination", type=Path, help=".safetensors file; or, for diffusers, a folder")
    add("--to", choices=LAYOUTS, required=True, help="canonical: the names of Genmo and ComfyUI")
    add("--dtype", choices=TARGET_DTYPE_NAMES, default=KEEP, help="fp8_scaled is for ComfyUI (default: %(default)s)")
    add("--part", choices=PART_NAMES, help="which one, of a file that holds several")
    add("--force", action="store_true", help="overwrite the destination")


def _add_output(command: argparse.ArgumentParser, what: str, *others: str) -> None:
    """Where a video is written to, or files with `others` as endings."""

    def named(text: str) -> Path:
        endings = (VIDEO_SUFFIX, *others)
        if (path := Path(text)).suffix not in endings:
            raise argparse.ArgumentTypeError(f"{shown(text)} must end in {' or '.join(endings)}.")
        return path

    command.add_argument("-o", "--output", type=named, default=Path("mochi.mp4"), help=f"{what} (default: %(default)s)")


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None


def seed_option(text: str) -> int:
    """What PyTorch's generators take."""
    if not -(2**63) <= (seed := whole_number(text)) < 2**64:
        raise argparse.ArgumentTypeError(f"{shown(text)} is too large; use a seed of 64 bits.")
    return seed


def rate_option(text: str) -> int:
    """Frames per second."""
    if not 1 <= (rate := whole_number(text)) <= MOST_FPS:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a frame rate; use 1 to {MOST_FPS} frames per second.")
    return rate


def gibibytes(text: str) -> int | None:
    """A number of GiB to bytes; 0 to None, which means all that is free."""
    try:
        count = float(text) * GIB
    except ValueError:
        count = math.nan
    if not 0 <= count < math.inf:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not an amount of memory; use 0 for what is free, or a number such as 8."
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
            f"{shown(text)} is not METHOD:THRESHOLD; write such as teacache:0.06 or first_block:0.1."
        ) from None
    try:
        check_cache(method, number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)}: {error}") from None
    return method, number


def lora_option(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH to both; a colon without a number after it belongs to the file, as in C:\\a.safetensors."""
    path, _, number = text.rpartition(":")
    try:
        strength = float(number) if path else 1.0
    except ValueError:
        return text, 1.0
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"{shown(text)} has a strength that is not finite; use a number such as 0.8.")
    return path or text, strength
