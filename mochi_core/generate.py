"""From the options of a shell to a video file: what `generate` and `farm` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .checkpoints import load_transformer, load_vae
from .checkpoints.names.detect import FRAME_LEVELS_CHOICES
from .dtypes import DTYPES
from .geometry import FPS, VideoSize, seconds_to_frames
from .io.latent_files import save_latents
from .io.read_frames import read_frames, read_image
from .io.video import save_video
from .lora import load_lora
from .parallel.plan import Plan
from .pipeline import MochiPipeline
from .quantization.weights import QUANTIZERS
from .rounds import continued, in_rounds, round_sizes
from .sampling.block_cache import METHODS, BlockCache
from .sampling.guidance import Guidance
from .sampling.image_to_video import KEEP_FRAMES
from .sampling.schedule import check_guidance, linear_quadratic_schedule
from .shown import shown
from .text_encoder import load_text_encoder
from .transformer.attention import ATTENTIONS, choose_attention

MOST_FPS = 1000
LATENT_SUFFIXES = (".latent", ".safetensors")


def pipeline_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What a prompt and its settings say, as arguments of `in_rounds`; without rounds, all is made at once.

    Raises:
        ValueError: something that Mochi cannot make, or a file that cannot be read.
    """
    frames = options.frames if options.seconds is None else seconds_to_frames(options.seconds)
    at_once = frames if options.round is None else options.round
    size = VideoSize(options.height, options.width, min(frames, at_once))
    round_sizes(frames, at_once, options.keep)
    check_guidance("guidance", options.guidance)
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "height": size.height,
        "width": size.width,
        "num_frames": frames,
        "at_once": at_once,
        "guidance_scale": options.guidance,
        "seed": options.seed,
        "sigmas": linear_quadratic_schedule(options.steps, options.threshold_noise, options.linear_steps),
        "cache": options.cache,
        "guidance": Guidance(tuple(options.skip_block), options.skip_scale, options.cfg_zero, options.nag),
        **read_given(options, size),
    }


def read_given(options: argparse.Namespace, size: VideoSize) -> dict[str, Any]:
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
            given[name] = read_given_file(path, reader)
    return given


def read_given_file(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What `reader` makes of a file; a ValueError of it, which says what is wrong with the file, names it, too."""
    try:
        return reader(path)
    except ValueError as error:
        raise ValueError(f"{path.name or path} cannot be used: {error}") from error


def load_pipeline(
    options: argparse.Namespace, parallel: Plan | str | None = None, *, first: bool = True
) -> MochiPipeline:
    """The models, and the LoRAs; of processes that share a video by the plan `parallel`, the `first` one reads T5.

    Raises:
        ValueError, OSError: a file that cannot be used, or an attention that the device does not have.
    """
    check_device(options.device)
    dtype, home = DTYPES[options.dtype], "cpu" if options.offload else options.device
    choose_attention(options.attention, options.device, dtype)  # before anything is loaded
    text_encoder = None
    if first:
        text_encoder = load_text_encoder(options.t5, options.tokenizer, DTYPES[options.t5_dtype], home)
    frame_levels = FRAME_LEVELS_CHOICES[options.frame_levels]
    transformer = load_transformer(options.transformer, dtype, home, options.quantize, frame_levels=frame_levels)
    for path, strength in options.lora:
        load_lora(transformer, path, strength)
    if options.compile:
        transformer.compile_blocks()
    return MochiPipeline(
        transformer,
        load_vae(options.vae, DTYPES[options.vae_dtype], home),
        text_encoder,
        offload=options.offload,
        device=options.device,
        attention=options.attention,
        parallel=parallel,
    )


def make_file(
    pipe: MochiPipeline, arguments: dict[str, Any], output: Path, fps: int, on_step: Callable[[], object]
) -> None:
    """Make a video, or latents if the name of the file says so, from what `pipeline_arguments` gives.

    Of processes that make it together, the first one writes.
    """
    check_rounds(arguments, output)
    arguments = {**arguments, "on_step": lambda *_: on_step() and False}
    if output.suffix in LATENT_SUFFIXES:
        del arguments["at_once"]
        latents = pipe(**arguments, output_type="latent")
        if pipe.is_first:
            save_latents(latents, output)
    else:
        video = in_rounds(pipe, **arguments)
        if pipe.is_first:
            save_video(continued(arguments.get("video"), video, arguments["keep"]), output, fps)


def check_rounds(arguments: dict[str, Any], output: Path) -> int:
    """How many rounds a video takes; ValueError if it takes several and is to be latents."""
    rounds = len(round_sizes(arguments["num_frames"], arguments["at_once"], arguments["keep"]))
    if rounds > 1 and output.suffix in LATENT_SUFFIXES:
        raise ValueError(f"Rounds make frames and no latents; choose an mp4 file instead of {output.name}.")
    return rounds


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
    add("--frame-levels", choices=FRAME_LEVELS_CHOICES, default="auto", help=levels)
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
        help=f"leave out blocks where little changes, which changes the result; {' or '.join(METHODS)}, e.g. teacache:0.06",
    )
    add("--seed", type=seed_option, default=0, help="the same one makes the same video (default: %(default)s)")


def add_decoder(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that make a video of latents."""
    add = command.add_argument
    add("--vae", required=True, type=Path, nargs="+", help="e.g. mochi_vae.safetensors, or decoder.safetensors")
    add("--vae-dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    add("--device", default=default_device(), help="(default: %(default)s)")
    add("--fps", type=rate_option, default=FPS, help="(default: %(default)s)")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> None:
    """Raise a ValueError if this machine has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {shown(name)}, which is none; use cpu, cuda, cuda:1 or mps.") from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    counts["xpu"] = torch.xpu.device_count()
    if (device.index or 0) >= counts.get(device.type, 0):
        there = ", ".join(kind for kind, count in counts.items() if count)
        raise ValueError(f"device is {name}, which is not on this machine or cannot be computed on; it has {there}.")


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
        raise argparse.ArgumentTypeError(f"{shown(text)} is no rate of a video; use 1 to {MOST_FPS} frames per second.")
    return rate


def cache_option(text: str) -> BlockCache:
    """METHOD:THRESHOLD to a cache."""
    method, _, threshold = text.partition(":")
    try:
        number = float(threshold)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not METHOD:THRESHOLD; write such as teacache:0.06 or first_block:0.1."
        ) from None
    try:
        return BlockCache(method, number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)}: {error}") from None


def lora_option(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH to both; a colon without a number after it belongs to the file, as in C:\\a.safetensors."""
    path, _, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0
