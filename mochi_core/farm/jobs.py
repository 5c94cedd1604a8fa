"""Read a file of prompts as jobs: one JSON object per line, whose keys are per-video options of `generate`."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from ..generate import check_rounds, pipeline_arguments
from ..options import add_settings
from ..shown import shown, shown_names, without_advice

EXAMPLE = '{"prompt": "a red kite", "seed": 7}'
WORDS_LENGTH = 40
"""Most characters of the prompt in a file name; at four bytes each plus the rest, it stays below the limit of 255 bytes."""
NOT_THE_VIDEO = {"command", "prompts", "output", "address", "workers", "gpus_per_worker", "device", "offload"}
"""Options that affect where and how a video is made, but not which one."""
GIVEN_FILES = ("image", "last_image", "video")
"""Options with input files of a video: the checksum covers their content, but only the paths of model files."""


@dataclass
class Job:
    """A requested video and its state."""

    line: int
    options: argparse.Namespace
    file: str
    steps: int
    status: Literal["waiting", "kept", "made", "failed"] = "waiting"
    attempts: int = 0
    error: str = ""

    @property
    def name(self) -> str:
        return f"line {self.line} ({shown(self.options.prompt, WORDS_LENGTH)})"

    def report(self) -> dict[str, Any]:
        keys = ("line", "file", "status", "attempts", "error")
        return {"prompt": self.options.prompt, **{key: getattr(self, key) for key in keys}}


def read_jobs(path: Path, common: argparse.Namespace) -> list[Job]:
    """The jobs in a file, whose lines override the `common` options; empty lines are skipped.

    Raises:
        ValueError: a line is invalid or asks for the same video as another line, or the file has no lines.
        OSError: the file cannot be read.
    """
    jobs: dict[str, Job] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            options = line_options(line, common)
            arguments = pipeline_arguments(options)
            file = video_name(options)
            steps = options.steps * check_rounds(arguments, Path(file))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
        job = Job(number, options, file, steps)
        if same := jobs.get(job.file):
            raise ValueError(
                f"{path.name}, line {number} asks for the same video as line {same.line}; give it another seed."
            )
        jobs[job.file] = job
    if not jobs:
        raise ValueError(f"{path.name} has no lines; write a prompt on each, such as {EXAMPLE}.")
    return list(jobs.values())


def read_lines(path: Path) -> list[str]:
    try:
        # Not splitlines: JSON strings may contain the other line separators that it splits at.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text (byte {error.start}); save it as such.") from error


def line_options(line: str, common: argparse.Namespace) -> argparse.Namespace:
    """The equivalent options of `generate`: those of a line, and those of `common` that it does not set.

    Raises:
        ValueError: the line is not a JSON object of valid options.
    """
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({without_advice(error)}); write an object such as {EXAMPLE}.") from error
    if not isinstance(said, dict) or not isinstance(said.get("prompt"), str):
        raise ValueError(f"not a JSON object with a prompt; write one such as {EXAMPLE}.")
    parser = LineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt")
    add_settings(parser)
    names = vars(parser.parse_args([]))
    if unknown := [name for name in said if name not in names]:
        raise ValueError(f"{shown_names(unknown)} is not a video setting; use {', '.join(names)}.")
    if "frames" in said:
        common = argparse.Namespace(**{**vars(common), "seconds": None})
    inherited = {name: value for name, value in vars(common).items() if name not in said}
    arguments = [argument for name, value in said.items() for argument in as_arguments(name, value, names[name])]
    return parser.parse_args(arguments, argparse.Namespace(**inherited))


def as_arguments(name: str, value: Any, default: Any) -> list[str]:
    """A JSON value as command-line arguments; an option whose `default` is a list may be repeated."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option] * value
    if isinstance(value, list) and isinstance(default, list):
        return [argument for each in value for argument in as_arguments(name, each, None)]
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name} is {shown(json.dumps(value))}; write a string or a number, or leave it out.")
    return [f"{option}={value}"]


class LineParser(argparse.ArgumentParser):
    """Raises errors instead of printing them and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(shown(message.removeprefix("argument --")))


def video_name(options: argparse.Namespace) -> str:
    """A portable file name: words of the prompt, and a checksum of the options and input files."""
    text = unicodedata.normalize("NFC", options.prompt[: 10 * WORDS_LENGTH]).lower()
    words = re.sub(r"[\W_]+", "-", text)[:WORDS_LENGTH].strip("-")
    asked = {name: value for name, value in sorted(vars(options).items()) if name not in NOT_THE_VIDEO}
    asked |= {name: hashlib.sha256(asked[name].read_bytes()).hexdigest() for name in GIVEN_FILES if asked[name]}
    checksum = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:12]
    return f"{words}-{checksum}.mp4".removeprefix("-")
