"""The command `edit`: turn a video file and two prompts into an edited video file."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .autoencoder.latents import denormalize_latents
from .generate import Bars, load_pipeline, read_given_file, say
from .geometry import TEMPORAL_COMPRESSION, VideoSize, frames_to_latents, latents_to_frames
from .io.read_frames import read_frames
from .io.video import as_frames, save_video, to_unit_range
from .options import EDIT_DEFAULTS
from .output_files import check_writable
from .pipeline import MochiPipeline
from .sampling.edit import edit, edit_by_inversion, pulls
from .sampling.schedule import check_guidance, linear_quadratic_schedule, schedule_below


def edit_file(options: argparse.Namespace) -> None:
    """Read a video, edit it according to the options, and write the result.

    Raises:
        ValueError, OSError: an unusable file or invalid settings; both are detected before the models are loaded.
    """
    check_writable(options.output)
    for name, defaults in EDIT_DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, defaults[options.inversion])
    sigmas = noise_levels(options)
    frames = frames_to_edit(options)
    pipe = load_pipeline(options, on_load=say)
    with Bars((len(sigmas) - 1) * (2 if options.inversion else 1)) as bars:
        video = edited(pipe, as_frames(frames), sigmas, options, bars)
    save_video(video, options.output, options.fps)


def noise_levels(options: argparse.Namespace) -> Tensor:
    """Falling noise levels (steps + 1,) of an edit; ValueError if a setting is invalid."""
    for name in ("guidance", "source_guidance"):
        check_guidance(name, getattr(options, name))
    if not options.inversion:
        return schedule_below(options.start_noise, options.steps)
    sigmas = linear_quadratic_schedule(options.steps)
    pulls(sigmas, options.eta, 1.0, options.pull_until)
    return sigmas


def frames_to_edit(options: argparse.Namespace) -> Any:
    """The first 6k + 1 frames of the video, (F, height, width, 3) uint8.

    Raises:
        ValueError: Mochi cannot make a video of this size or length, or the file cannot be read.
    """
    size = VideoSize(options.height, options.width, 1 if options.frames is None else options.frames)
    # Enough to detect a video that is too long, which is refused rather than cut.
    most = size.most_frames + TEMPORAL_COMPRESSION if options.frames is None else options.frames
    frames = read_given_file(options.video, lambda path: read_frames(path, size.height, size.width, most))
    size = replace(size, num_frames=latents_to_frames(frames_to_latents(len(frames))))
    return frames[: size.num_frames]


@torch.no_grad()
def edited(pipe: MochiPipeline, frames: Tensor, sigmas: Tensor, options: argparse.Namespace, bars: Bars) -> Tensor:
    """Frames (F, H, W, 3) in [0, 1] to the frames of the edited video."""
    texts = options.source_prompt, options.prompt, options.negative_prompt
    with pipe.working(pipe.text_encoder):
        assert pipe.text_encoder is not None
        source, target, negative = (pipe.text_encoder.encode([text]) for text in texts)
    with pipe.working(pipe.vae):
        clean = pipe.encode_frames(frames, partial(bars.frames, unit="part"))
    common: dict[str, Any] = {"attention": options.attention, "on_step": lambda *_: bars.step()}
    with pipe.working(pipe.dit):
        if options.inversion:
            common |= {"scale": options.guidance, "eta": options.eta, "end": options.pull_until}
            latents = edit_by_inversion(pipe.dit, clean, sigmas, source, target, negative, **common)
        else:
            scales = options.source_guidance, options.guidance
            latents = edit(pipe.dit, clean, sigmas, source, target, negative, *scales, options.seed, **common)
    with pipe.working(pipe.vae):
        video = pipe.vae.decode(denormalize_latents(latents), on_progress=bars.frames)
    return to_unit_range(video)[0].movedim(0, -1).cpu()
