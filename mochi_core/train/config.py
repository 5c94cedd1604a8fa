"""What a training is told: the keys of its YAML file, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from ..geometry import VideoSize
from ..quantization.weights import FP8_ROWWISE, QUANTIZERS

T = TypeVar("T")
DTYPES = ("bf16", "fp32")
# Products in fp8 have no gradient.
EXACT_QUANTIZERS = tuple(kind for kind in QUANTIZERS if kind != FP8_ROWWISE)


@dataclass(frozen=True)
class Rule:
    """What a key may be, in words, and as a function that returns the value or raises ValueError or TypeError."""

    text: str
    read: Callable[[Any], Any]


def _whole(lowest: int) -> Rule:
    def read(value: Any) -> int:
        if type(value) is not int or value < lowest:
            raise ValueError
        return value

    return Rule(f"a whole number, {lowest} or more", read)


def _number(text: str, fits: Callable[[float], bool]) -> Rule:
    def read(value: Any) -> float:
        # YAML takes 2e-4 for text: its numbers have a dot.
        if isinstance(value, bool) or not fits(number := float(value)):
            raise ValueError
        return number

    return Rule(text, read)


def _choice(*names: str) -> Rule:
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError
        return value

    return Rule(f"one of {', '.join(names)}", read)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _prompts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise TypeError
    return tuple(map(_text, value))


def _blocks(value: Any) -> int | bool:
    return value if isinstance(value, bool) else _whole(0).read(value)


def read_size(text: Any) -> tuple[int, int]:
    """(width, height) of "848x480"; ValueError or TypeError for anything else."""
    width, _, height = _text(text).partition("x")
    return int(width), int(height)


PATH = Rule("a file or folder", lambda value: Path(_text(value)).expanduser())
POSITIVE = _number("a number above 0", lambda number: 0 < number < math.inf)
NOT_NEGATIVE = _number("a number, 0 or more", lambda number: 0 <= number < math.inf)
FRACTION = _number("a number from 0 to 1", lambda number: 0 <= number <= 1)
SIZE = Rule("a width and a height, such as 848x480", read_size)
PROMPTS = Rule("a list of texts", _prompts)
BLOCKS = Rule("true, false or a number of blocks", _blocks)


@dataclass(frozen=True)
class LoraKeys:
    """Sizes of a LoRA, under the names that Genmo's trainer gives them."""

    qkv_proj_lora_rank: Annotated[int, _whole(1)] = 16
    qkv_proj_lora_alpha: Annotated[float, POSITIVE] = 16.0
    out_proj_lora_rank: Annotated[int, _whole(1)] = 16
    out_proj_lora_alpha: Annotated[float, POSITIVE] = 16.0


@dataclass(frozen=True)
class SampleKeys:
    """Videos that are made on the way."""

    prompts: Annotated[tuple[str, ...], PROMPTS]
    vae: Annotated[Path, PATH]
    t5: Annotated[Path, PATH]
    tokenizer: Annotated[Path | None, PATH] = None
    every: Annotated[int, _whole(1)] = 200
    steps: Annotated[int, _whole(1)] = 64
    guidance: Annotated[float, NOT_NEGATIVE] = 4.5
    frames: Annotated[int, _whole(1)] = 37
    size: Annotated[tuple[int, int], SIZE] = (848, 480)
    seed: Annotated[int, _whole(0)] = 0

    def __post_init__(self) -> None:
        self.video_size  # noqa: B018 - raises if Mochi cannot make it

    @property
    def video_size(self) -> VideoSize:
        width, height = self.size
        return VideoSize(height, width, self.frames)


def _section(keys: type[Any]) -> Rule:
    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError
        return parse(keys, value)

    return Rule("a section with keys of its own", read)


@dataclass(frozen=True)
class Config:
    """One training; the defaults are those of Genmo's fine-tuner where it has them."""

    transformer: Annotated[Path, PATH]
    dataset: Annotated[Path, PATH]
    output: Annotated[Path, PATH]
    steps: Annotated[int, _whole(1)] = 2000
    learning_rate: Annotated[float, POSITIVE] = 2e-4
    warmup_steps: Annotated[int, _whole(0)] = 200
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    gradient_clip: Annotated[float, POSITIVE] = 1.0
    batch_size: Annotated[int, _whole(1)] = 1
    gradient_accumulation: Annotated[int, _whole(1)] = 1
    caption_dropout: Annotated[float, FRACTION] = 0.1
    gradient_checkpointing: Annotated[int | bool, BLOCKS] = True
    dtype: Annotated[str, _choice(*DTYPES)] = "bf16"
    quantize: Annotated[str | None, _choice(*EXACT_QUANTIZERS)] = None
    seed: Annotated[int, _whole(0)] = 0
    save_every: Annotated[int, _whole(1)] = 500
    lora: Annotated[LoraKeys, _section(LoraKeys)] = LoraKeys()
    sample: Annotated[SampleKeys | None, _section(SampleKeys)] = None

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, but must be fewer than steps, {self.steps}.")


LORA_ONLY = ("lora", "quantize")


def read_config(path: Path, *, full: bool = False) -> Config:
    """Read a YAML file; paths in it are relative to the current folder.

    Raises:
        ValueError: it is no YAML, or a key is unknown, missing or not what it must be.
        FileNotFoundError: there is no such file.
    """
    import yaml  # comes with ComfyUI; the rest of the core does without

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, such as steps: 2000.")
    misplaced = [name for name in LORA_ONLY if full and values.get(name) is not None]
    if misplaced:
        raise ValueError(f"{path}: {misplaced[0]} is for LoRAs only; remove it to train all weights.")
    try:
        return parse(Config, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(keys: type[T], values: dict[Any, Any]) -> T:
    """One of the dataclasses above from plain values; None is as good as absent. ValueError names the first misfit."""
    rules = {name: get_args(hint)[1] for name, hint in get_type_hints(keys, include_extras=True).items()}
    if unknown := [name for name in values if name not in rules]:
        raise ValueError(f"there is no key {unknown[0]}; the keys are {', '.join(rules)}.")
    given = {name: _read(name, rules[name], value) for name, value in values.items() if value is not None}
    required = [f.name for f in fields(keys) if f.default is MISSING]  # pyright: ignore[reportArgumentType]
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"{missing[0]} is missing; it is {rules[missing[0]].text}.")
    return keys(**given)


def _read(name: str, rule: Rule, value: Any) -> Any:
    try:
        return rule.read(value)
    except (ValueError, TypeError) as error:
        if str(error).endswith("."):  # a sentence already, about a key of a section
            raise ValueError(f"in {name}, {error}") from error
        raise ValueError(f"{name} is {value!r}, but must be {rule.text}.") from error
