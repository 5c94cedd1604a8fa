"""Turn a folder of videos and captions into a folder of clips: latents and text features, computed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import torch
from torch import Tensor

from ..autoencoder.model import AsymmVAE
from ..checkpoints import open_checkpoint
from ..geometry import FPS, VideoSize
from ..io.read_frames import read_frames
from ..text_encoder import TextEncoder
from .dataset import SUFFIX, write_clip

CAPTION_SUFFIX = ".txt"
SOURCE = "source"
"""Metadata key of a clip, under which JSON records what the clip was made from."""


@dataclass(frozen=True)
class Source:
    """A video, its caption, and the file of its clip."""

    video: Path
    caption: str
    clip: Path
    notes: dict[str, str]
    """Metadata of the clip; a clip whose note under `SOURCE` differs is made again."""

    @property
    def is_done(self) -> bool:
        """Whether the clip exists and was made from the same video, caption and settings."""
        try:
            return self.clip.exists() and open_checkpoint(self.clip).metadata.get(SOURCE) == self.notes[SOURCE]
        except ValueError:
            return False


def find_sources(videos: Path, dataset: Path, settings: dict[str, Any]) -> list[Source]:
    """Every video in a folder that has a caption, name.mp4 and name.txt; warns about the others.

    Raises:
        ValueError: there is no such folder, or it has no video with a caption.
    """
    if not videos.is_dir():
        raise ValueError(f"{videos} is not a folder; give the folder with the videos and their captions.")
    sources = []
    for video in sorted(videos.iterdir()):
        if video.is_file() and video.suffix.lower() != CAPTION_SUFFIX and not video.name.startswith("."):
            caption = _read_caption(video.with_suffix(CAPTION_SUFFIX))
            if caption:
                sources.append(_source(video, caption, dataset, settings))
            else:
                warn(f"{video.name} is skipped: its caption must be next to it in {video.stem}.txt.", stacklevel=2)
    if not sources:
        raise ValueError(f"There is no video with a caption in {videos}; put name.mp4 and name.txt there.")
    return sources


def _read_caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _source(video: Path, caption: str, dataset: Path, settings: dict[str, Any]) -> Source:
    made_from = {"video": fingerprint(video), "caption": caption, **settings}
    notes = {"caption": caption, SOURCE: json.dumps(made_from, sort_keys=True)}
    return Source(video, caption, dataset / f"{video.name}{SUFFIX}", notes)


def fingerprint(path: Path) -> list[Any]:
    """A file's [name, size in bytes, modification time in ns]."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def encode_captions(sources: Sequence[Source], text_encoder: TextEncoder) -> list[Tensor]:
    """Text features (valid tokens, text_width) of every caption, on the CPU."""
    features = []
    for source in sources:
        embeds, mask = text_encoder.encode(source.caption)
        features.append(embeds[mask].cpu())  # the autoencoder needs the device's memory next
    return features


def encode_videos(
    sources: Sequence[Source],
    features: Sequence[Tensor],
    vae: AsymmVAE,
    size: VideoSize,
    on_clip: Callable[[], object],
) -> int:
    """Write the clip of every source that can be read, warn about the others, and return how many were written."""
    device, written = next(vae.parameters()).device, 0
    for source, embeds in zip(sources, features, strict=True):
        try:
            frames = read_video(source.video, size)
        except ValueError as error:
            warn(f"{source.video.name} is skipped: {error}", stacklevel=2)
        else:
            posterior = vae.encode(to_model_range(frames), device=device)
            write_clip(source.clip, posterior, embeds, source.notes)
            written += 1
        on_clip()
    return written


def other_clips(dataset: Path, sources: Sequence[Source]) -> list[Path]:
    """Clips in a dataset that come from none of these sources or are outdated; training would use them, too."""
    own = {source.clip for source in sources if source.is_done}
    return sorted(set(dataset.glob(f"*{SUFFIX}")) - own)


def to_model_range(frames: np.ndarray[Any, Any]) -> Tensor:
    """Video (1, 3, F, H, W) in [-1, 1] from uint8 frames (F, H, W, 3)."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def read_video(path: Path, size: VideoSize) -> np.ndarray[Any, Any]:
    """The first frames of a video at 30 frames per second, resized and centre-cropped, (F, H, W, 3) uint8.

    Raises:
        ValueError: it is not a readable video, or too short.
    """
    frames = read_frames(path, size.height, size.width, size.num_frames)
    if len(frames) < size.num_frames:
        raise ValueError(f"it has {len(frames)} frames at {FPS} per second, but {size.num_frames} are needed.")
    return frames
