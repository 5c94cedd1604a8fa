"""A process of the farm: it holds the models and makes one video after another."""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..autoencoder.streaming import OutOfMemory, is_out_of_memory, memory_problem
from ..generate import SMALLER, load_pipeline, make_file
from ..parallel.launch import MemberError, join, own_device, together
from ..pipeline import MochiPipeline
from ..shown import sentence

EXPECTED = (ValueError, OSError, SafetensorError, OutOfMemory)
"""Errors after which a process can go on to other videos, as it can after running out of memory; after others, such as a GPU
kernel's, it may not."""


@dataclass(frozen=True)
class Outcome:
    """Result of a task: an mp4 file, nothing if there was none to make, or a sentence about what went wrong."""

    video: bytes = b""
    error: str = ""
    broken: bool = False
    """Whether the process should no longer be used."""
    warnings: tuple[str, ...] = ()


class Member:
    """Lives in its own process; `steps_done` is called from another thread there."""

    pipe: MochiPipeline

    def __init__(self) -> None:
        self.steps = 0
        self.session = ExitStack()
        """The session with other members, once they have joined."""

    def load(self, options: argparse.Namespace, launch: Mapping[str, str] | None = None) -> Outcome:
        """Load the models; `launch` is a launcher's environment, for videos that several members make together."""

        def work() -> bytes:
            parallel, first = None, True
            if launch is not None:
                os.environ.update(launch)
                device = own_device(options.device)
                options.device, world = str(device), join(device)
                self.session.enter_context(together(world, device))
                parallel, first = "auto", world.rank == 0
            self.pipe = load_pipeline(options, parallel, first=first)
            return b""

        return outcome_of(work, self.session)

    def make(self, arguments: dict[str, Any], fps: int) -> Outcome:
        """Make a video from the result of `pipeline_arguments`; among several members, the first returns it."""
        self.steps = 0

        def work() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "video.mp4"
                make_file(self.pipe, arguments, path, fps, self._count)
                return path.read_bytes() if self.pipe.is_first else b""

        return outcome_of(work, self.session)

    def _count(self) -> None:
        self.steps += 1

    def steps_done(self) -> int:
        """Steps done of the current video."""
        return self.steps


def outcome_of(work: Callable[[], bytes], session: ExitStack) -> Outcome:
    """Run `work` and turn any exception into a sentence; an exception ends the session with other members.

    Raises:
        SystemExit: another member failed first.
    """
    with warnings.catch_warnings(record=True) as caught:
        try:
            video, error, broken = work(), "", False
        except Exception as failure:
            failure = ended_by(failure, session)
            video, error, broken = (
                b"",
                sentence_of(failure),
                not (isinstance(failure, EXPECTED) or is_out_of_memory(failure)),
            )
    gc.collect()  # after a failure, tensors held by its stack frames
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Outcome(video, error, broken, tuple(sentence(warning.message) for warning in caught))


def ended_by(failure: Exception, session: ExitStack) -> Exception:
    """The error to report for a failure that ends the session."""
    try:
        session.__exit__(type(failure), failure, failure.__traceback__)
    except MemberError as error:
        return error
    return failure


def sentence_of(error: Exception) -> str:
    if isinstance(error, (*EXPECTED, MemberError)):
        return sentence(error)
    return (
        f"{memory_problem(error)} {SMALLER}"
        if is_out_of_memory(error)
        else sentence(f"{type(error).__name__}: {error}")
    )
