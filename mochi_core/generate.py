"""From the options of a shell to a video file: what `generate` and `farm` have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .autoencoder.model import OnProgress
from .checkpoints import empty_transformer, load_transformer, load_vae, merge, open_part
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
        "cache": options.cache and BlockCache(*options.cache),
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
    options: argparse.Namespace,
    parallel: Plan | str | None = None,
    *,
    first: bool = True,
    on_load: Callable[[str], object] | None = None,
) -> MochiPipeline:
    """The models, and the LoRAs; of processes that share a video by the plan `parallel`, the `first` one reads T5.

    `on_load` gets a line before each model.

    Raises:
        ValueError, OSError: a file that cannot be used, or an attention that the device does not have.
    """
    check_device(options.device)
    dtype, home = DTYPES[options.dtype], "cpu" if options.offload else options.device
    choose_attention(options.attention, options.device, dtype)  # before anything is loaded, as the next
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
    """Look at the headers of all files of the models, without T5 if not `text`, and at LoRAs.

    Raises:
        ValueError, OSError: one is missing, holds something else, or lacks a block that is to be skipped.
    """
    if text:
        open_part(options.t5, "t5")
        find_tokenizer(options.t5, options.tokenizer)
    config = empty_transformer(open_part(options.transformer, "transformer")).config
    Guidance(tuple(getattr(options, "skip_block", ()))).check_depth(config.depth)  # which edits do not have
    for path, _ in options.lora:
        read_lora(path, config).report()
    merge([open_part(file, "vae") for file in options.vae])


def loading(what: str, *files: Path) -> str:
    """The line that says which files are read next."""
    return f"loading the {what}: {', '.join(shown(file.name or str(file)) for file in files)}"


def make_file(
    pipe: MochiPipeline,
    arguments: dict[str, Any],
    output: Path,
    fps: int,
    on_step: Callable[[], object],
    on_decode: OnProgress | None = None,
) -> None:
    """Make a video, or latents if the name of the file says so, from what `pipeline_arguments` gives.

    Of processes that make it together, the first one writes.
    """
    check_rounds(arguments, output)
    arguments = {**arguments, "on_step": lambda *_: on_step() and False, "on_decode": on_decode}
    if output.suffix in LATENT_SUFFIXES:
        del arguments["at_once"]
        latents = pipe(**arguments, output_type="latent")
        if pipe.is_first:
            save_latents(latents, output)
    else:
        video = in_rounds(pipe, **arguments)
        if pipe.is_first:
            save_video(continued(arguments.get("video"), video, arguments["keep"]), output, fps)


class Bars:
    """Progress on stderr: a bar over all steps, and one over the frames of each video that is encoded or decoded.

    The last of them stays below the full bar of the steps; those of rounds before it go when the steps go on.
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
        if new := done - self.coding.n:  # or the speed would be that of the last piece
            self.coding.update(new)

    def _end_coding(self) -> None:
        if self.coding is not None:
            self.coding.close()
            self.coding = None


def memory_sentence(error: BaseException) -> str:
    """What there is to say of an allocation that failed."""
    # PyTorch goes on with its settings, and a CPU's allocator begins with a line of its code.
    said = str(error).split(" GPU ")[0] if isinstance(error, torch.OutOfMemoryError) else "Main memory is full."
    return f"{said} Use fewer frames, a smaller size, --quantize or --offload."


def say(line: str) -> None:
    """Write a line to stderr, above the bars that may be there."""
    tqdm.write(line, file=sys.stderr)


def check_rounds(arguments: dict[str, Any], output: Path) -> int:
    """How many rounds a video takes; ValueError if it takes several and is to be latents."""
    rounds = len(round_sizes(arguments["num_frames"], arguments["at_once"], arguments["keep"]))
    if rounds > 1 and output.suffix in LATENT_SUFFIXES:
        raise ValueError(f"Rounds make frames and no latents; choose an mp4 file instead of {output.name}.")
    return rounds
