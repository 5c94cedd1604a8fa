"""A video file and two prompts to an edited video file: the command `edit`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .autoencoder.latents import denormalize_latents
from .generate import add_decoder, add_models, load_pipeline, read_given_file, seed_option
from .geometry import TEMPORAL_COMPRESSION, VideoSize, frames_to_latents, latents_to_frames
from .io.read_frames import read_frames
from .io.video import as_frames, save_video, to_unit_range
from .output_files import check_writable
from .pipeline import MochiPipeline
from .sampling.edit import edit, edit_by_inversion, pulls
from .sampling.schedule import check_guidance, linear_quadratic_schedule, schedule_below

DEFAULTS = {"steps": (30, 50), "guidance": (5.5, 4.5)}
"""Two of each: for FlowEdit, as the node Mochi Edit proposes, and for inversion, as its template has it."""


def edit_file(options: argparse.Namespace) -> None:
    """Read a video, change it as the options say, and write what it has become.

    Raises:
        ValueError, OSError: a file that cannot be used, or settings that make no sense; found before the models are loaded.
    """
    check_writable(options.output)
    for name, defaults in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, defaults[options.inversion])
    sigmas = noise_levels(options)
    frames = frames_to_edit(options)
    pipe = load_pipeline(options)
    with tqdm(total=(len(sigmas) - 1) * (2 if options.inversion else 1), unit="step") as bar:
        video = edited(pipe, as_frames(frames), sigmas, options, bar.update)
    save_video(video, options.output, options.fps)


def noise_levels(options: argparse.Namespace) -> Tensor:
    """(steps + 1,) falling noise levels of an edit; ValueError if any setting makes no sense."""
    for name in ("guidance", "source_guidance"):
        check_guidance(name, getattr(options, name))
    if not options.inversion:
        return schedule_below(options.start_noise, options.steps)
    sigmas = linear_quadratic_schedule(options.steps)
    pulls(sigmas, options.eta, 1.0, options.pull_until)
    return sigmas


def frames_to_edit(options: argparse.Namespace) -> Any:
    """The first frames of the video, 6k + 1 of them, (F, height, width, 3) uint8.

    Raises:
        ValueError: a size or length that Mochi cannot make, or a file that cannot be read.
    """
    size = VideoSize(options.height, options.width, 1 if options.frames is None else options.frames)
    # Enough to see that a video is too long, which is refused and not cut.
    most = size.most_frames + TEMPORAL_COMPRESSION if options.frames is None else options.frames
    frames = read_given_file(options.video, lambda path: read_frames(path, size.height, size.width, most))
    size = replace(size, num_frames=latents_to_frames(frames_to_latents(len(frames))))
    return frames[: size.num_frames]


@torch.no_grad()
def edited(
    pipe: MochiPipeline, frames: Tensor, sigmas: Tensor, options: argparse.Namespace, on_step: Callable[[], object]
) -> Tensor:
    """Frames (F, H, W, 3) in [0, 1] to those of the edited video."""
    texts = options.source_prompt, options.prompt, options.negative_prompt
    with pipe.working(pipe.text_encoder):
        assert pipe.text_encoder is not None
        source, target, negative = (pipe.text_encoder.encode([text]) for text in texts)
    with pipe.working(pipe.vae):
        clean = pipe.encode_frames(frames)
    common: dict[str, Any] = {"attention": options.attention, "on_step": lambda *_: on_step() and False}
    with pipe.working(pipe.dit):
        if options.inversion:
            common |= {"scale": options.guidance, "eta": options.eta, "end": options.pull_until}
            latents = edit_by_inversion(pipe.dit, clean, sigmas, source, target, negative, **common)
        else:
            scales = options.source_guidance, options.guidance
            latents = edit(pipe.dit, clean, sigmas, source, target, negative, *scales, options.seed, **common)
    with pipe.working(pipe.vae):
        return to_unit_range(pipe.vae.decode(denormalize_latents(latents)))[0].movedim(0, -1).cpu()


def add_edit(command: argparse.ArgumentParser) -> None:
    """Add the options of `edit`, but for the file that it writes."""
    add_models(command)
    add = command.add_argument
    add("--video", required=True, type=Path, help="what is changed; taken at 30 frames a second")
    add("--source-prompt", required=True, help="what the video shows, its motion too")
    add("--prompt", required=True, help="what it is to show: the same text with other words where it changes")
    add("--negative-prompt", default="")
    add("--height", type=int, default=480, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--width", type=int, default=848, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--frames", type=int, help="of the video's first frames at most so many, 6k + 1 (default: all)")
    one, other = DEFAULTS["steps"]
    forwards = f"FlowEdit: each is four forwards (default: {one}); inversion: three (default: {other})"
    add("--steps", type=int, help=forwards)
    noise = "FlowEdit: how much may change, as the noise level of the first step (default: %(default)s)"
    add("--start-noise", type=float, default=0.9, help=noise)
    one, other = DEFAULTS["guidance"]
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
