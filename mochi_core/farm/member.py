"""What a process of the farm does: it holds the models, and makes one video after the other."""

from __future__ import annotations

import argparse
import gc
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..autoencoder.streaming import OutOfMemory
from ..generate import load_pipeline, make_file
from ..pipeline import MochiPipeline
from ..shown import sentence

EXPECTED = (ValueError, OSError, SafetensorError, OutOfMemory, torch.OutOfMemoryError)
"""Errors after which a process can make other videos; after others, such as those of a GPU's kernel, it may not."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task: an mp4 file, or nothing where there was none to make, or one sentence of what went wrong."""

    video: bytes = b""
    error: str = ""
    broken: bool = False
    """Whether the process should not be used any more."""
    warnings: tuple[str, ...] = ()


class Member:
    """Lives in a process of its own; `steps_done` is called from another thread of it."""

    pipe: MochiPipeline

    def __init__(self) -> None:
        self.steps = 0

    def load(self, options: argparse.Namespace) -> Outcome:
        """Load the models."""

        def work() -> bytes:
            self.pipe = load_pipeline(options)
            return b""

        return outcome_of(work)

    def make(self, arguments: dict[str, Any], fps: int) -> Outcome:
        """Make a video from what `pipeline_arguments` gives."""
        self.steps = 0

        def work() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "video.mp4"
                make_file(self.pipe, arguments, path, fps, self._count)
                return path.read_bytes()

        return outcome_of(work)

    def _count(self) -> None:
        self.steps += 1

    def steps_done(self) -> int:
        """Steps of the video that is being made."""
        return self.steps


def outcome_of(work: Callable[[], bytes]) -> Outcome:
    """Do something, and have whatever it raises as a sentence."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            video, error, broken = work(), "", False
        except Exception as failure:
            video, error, broken = b"", sentence_of(failure), not isinstance(failure, EXPECTED)
    gc.collect()  # of a failure, tensors that its frames held
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Outcome(video, error, broken, tuple(sentence(warning.message) for warning in caught))


def sentence_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):  # PyTorch goes on with its settings
        return f"{str(error).split(' GPU ')[0]} Use fewer frames, a smaller size, --quantize or --offload."
    return sentence(error if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}")
