"""From command-line options to a video file: what `generate` and `farm` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .autoencoder.model import AsymmVAE, OnProgress
from .checkpoints import empty_transformer, empty_vae, load_transformer, load_vae, merge, open_part
from .checkpoints.names.detect import FRAME_LEVELS_CHOICES
from .devices import check_device
from .dtypes import DTYPES
from .geometry import VideoSize, seconds_to_frames
from .io.latent_files import save_latents
from .io.read_frames import read_frames, read_image
from .io.video import save_video
from .lora import load_lora, read_lora
from .options import LATENT_SUFFIXES
from .parallel.plan import Plan
from .pipeline import MochiPipeline
from .rounds import continued, in_rounds, round_sizes
from .sampling.block_cache import BlockCache
from .sampling.guidance import Guidance
from .sampling.schedule import check_guidance, linear_quadratic_schedule
from .shown import shown
from .text_encoder import find_tokenizer, load_text_encoder
from .transformer.attention import choose_attention

SMALLER = "Use fewer frames, a smaller size, --quantize or, if the device is full, --offload."
"""What helps where memory is full."""


def pipeline_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """A prompt and its settings as arguments of `in_rounds`; without rounds, the whole video is made at once.

    Raises:
        ValueError: Mochi cannot make such a video, or a file cannot be read.
    """
    frames = num_frames(options)
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
        "cache": options.cache and BlockCache(*options.cache),
        "guidance": Guidance(tuple(options.skip_block), options.skip_scale, options.cfg_zero, options.nag),
        **read_given(options, size),
    }


def read_given(options: argparse.Namespace, size: VideoSize) -> dict[str, Any]:
    """A video's input files as arguments of `MochiPipeline`; ValueError if one cannot be read."""
    if options.image and options.video:
        raise ValueError("--image and --video are both given; a video can only begin with one of them.")
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
    """Return `reader(path)`; a ValueError that it raises about the file's content gets the file's name added."""
    try:
        return reader(path)
    except ValueError as error:
        raise ValueError(f"{path.name or path} cannot be used: {error}") from error


def load_pipeline(
    options: argparse.Namespace,
    parallel: Plan | str | None = None,
    *,
    first: bool = True,
    on_load: Callable[[str], object] | None = None,
) -> MochiPipeline:
    """Load the models and LoRAs; of the processes that share a video by the plan `parallel`, only the `first` reads T5.

    `on_load` gets a line of text before each model.

    Raises:
        ValueError, OSError: a file cannot be used, or the device does not support the attention.
    """
    check_device(options.device)
    dtype, home = DTYPES[options.dtype], "cpu" if options.offload else options.device
    choose_attention(options.attention, options.device, dtype)  # like the next line, before anything is loaded
    check_models(options, text=first)
    text_encoder = None
    tell = on_load or (lambda _: None)
    if first:
        tell(loading("text encoder", options.t5))
        text_encoder = load_text_encoder(options.t5, options.tokenizer, DTYPES[options.t5_dtype], home)
    frame_levels = FRAME_LEVELS_CHOICES[options.frame_levels]
    tell(loading("transformer", options.transformer))
    transformer = load_transformer(options.transformer, dtype, home, options.quantize, frame_levels=frame_levels)
    for path, strength in options.lora:
        load_lora(transformer, path, strength)
    if options.compile:
        transformer.compile_blocks()
    tell(loading("autoencoder", *options.vae))
    return MochiPipeline(
        transformer,
        load_vae(options.vae, DTYPES[options.vae_dtype], home),
        text_encoder,
        offload=options.offload,
        device=options.device,
        attention=options.attention,
        parallel=parallel,
    )


def check_models(options: argparse.Namespace, *, text: bool) -> None:
    """Check the headers of all model files, T5's only if `text`, and the LoRAs.

    Raises:
        ValueError, OSError: a file is missing, holds something else, or lacks a block to be skipped.
    """
    if text:
        open_part(options.t5, "t5")
        find_tokenizer(options.t5, options.tokenizer)
    config = empty_transformer(open_part(options.transformer, "transformer")).config
    for path, _ in options.lora:
        read_lora(path, config).report()
    vae = empty_vae(merge([open_part(file, "vae") for file in options.vae]))
    if "prompts" not in options:  # the lines of a farm's file have settings of their own
        Guidance(tuple(getattr(options, "skip_block", ()))).check_depth(config.depth)  # edits have no such option
        check_halves(vae, options)


def check_halves(vae: AsymmVAE, options: argparse.Namespace) -> None:
    """Raise a ValueError if an autoencoder lacks a half that the video needs."""
    given = any(getattr(options, name, None) for name in ("image", "last_image", "video"))
    if given or ("round" in options and options.round is not None and num_frames(options) > options.round):
        vae.check_encoder(torch.empty(1, 3, 1, 16, 16, device="meta"))
    if not is_latent_file(options.output):
        vae.check_decoder((1, vae.config.latent_channels, 1, 2, 2))


def is_latent_file(output: Path) -> bool:
    return output.suffix.lower() in LATENT_SUFFIXES


def num_frames(options: argparse.Namespace) -> int:
    return options.frames if options.seconds is None else seconds_to_frames(options.seconds)


def loading(what: str, *files: Path) -> str:
    """The line that announces which files are read next."""
    return f"loading the {what}: {', '.join(shown(file.name or str(file)) for file in files)}"


def make_file(
    pipe: MochiPipeline,
    arguments: dict[str, Any],
    output: Path,
    fps: int,
    on_step: Callable[[], object],
    on_decode: OnProgress | None = None,
) -> None:
    """Make a video, or latents if the file name says so, from the result of `pipeline_arguments`.

    Among processes that make it together, the first one writes the file.
    """
    check_rounds(arguments, output)
    arguments = {**arguments, "on_step": lambda *_: on_step() and False, "on_decode": on_decode}
    if is_latent_file(output):
        del arguments["at_once"]
        latents = pipe(**arguments, output_type="latent")
        if pipe.is_first:
            save_latents(latents, output)
    else:
        video = in_rounds(pipe, **arguments)
        if pipe.is_first:
            save_video(continued(arguments.get("video"), video, arguments["keep"]), output, fps)


class Bars:
    """Progress on stderr: one bar for all steps, and one for the frames of each video that is encoded or decoded.

    The last frame bar stays below the finished step bar; those of earlier rounds disappear when the steps continue.
    """

    def __init__(self, steps: int, *, disable: bool = False) -> None:
        self.disable = disable
        self.sampling = tqdm(total=steps, unit="step", disable=disable)
        self.coding: tqdm | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_coding()
        self.sampling.close()

    def step(self) -> None:
        self._end_coding()
        self.sampling.update()

    def frames(self, done: int, total: int, unit: str = "frame") -> None:
        """Show how much of a video is encoded or decoded."""
        if self.coding is None:
            if is_last := self.sampling.n == self.sampling.total:
                self.sampling.close()
            self.coding = tqdm(total=total, unit=unit, leave=is_last, disable=self.disable)
        if new := done - self.coding.n:  # an update by 0 would distort the displayed speed
            self.coding.update(new)

    def _end_coding(self) -> None:
        if self.coding is not None:
            self.coding.close()
            self.coding = None


def say(line: str) -> None:
    """Write a line to stderr, above any progress bars."""
    tqdm.write(line, file=sys.stderr)


def check_rounds(arguments: dict[str, Any], output: Path) -> int:
    """Number of rounds that a video takes; ValueError if there are several and the output is latents."""
    rounds = len(round_sizes(arguments["num_frames"], arguments["at_once"], arguments["keep"]))
    if rounds > 1 and is_latent_file(output):
        raise ValueError(f"Rounds produce frames, not latents; choose an mp4 file instead of {output.name}.")
    return rounds
