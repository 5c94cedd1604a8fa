"""The keys of a training configuration in YAML, and a one-sentence error for anything invalid."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StrictBool, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ..geometry import VideoSize
from ..shown import NAME_LENGTH, shown, without_advice

MAX_BYTES = 50_000
"""Most bytes of a configuration file; a real one has a tenth of that, most of it prompts."""
MAX_COUNT = 2**63 - 1
MAX_DIGITS = 12
"""Most digits of width and height together."""


def read_size(text: Any) -> tuple[int, int]:
    """Parse a size such as "848x480" to (width, height); ValueError for anything else."""
    # Never convert lists to text: through aliases, they can hold more than any machine could write.
    if not isinstance(text, str):
        raise ValueError("it is not text.")
    width, _, height = text.partition("x")
    if len(width) + len(height) > MAX_DIGITS:
        raise ValueError("no video is that large.")
    return int(width), int(height)


def _read_number(value: Any) -> Any:
    """Convert text to a number: YAML 1.1 reads 2e-4 as text, because its floats need a dot."""
    return float(value) if isinstance(value, str) else value


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError("no such home folder") from error


# The descriptions complete the sentences of `_sentence`: "steps is 0, but must be a whole number, 1 or more."
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT, description="a whole number, 1 or more")]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT, description="a whole number, 0 or more")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_read_number)]
Positive = Annotated[Number, Field(gt=0, description="a number above 0")]
NotNegative = Annotated[Number, Field(ge=0, description="a number, 0 or more")]
Fraction = Annotated[Number, Field(ge=0, le=1, description="a number from 0 to 1")]
FilePath = Annotated[Path, AfterValidator(_expanded), Field(description="a file or folder")]
Size = Annotated[
    tuple[int, int], BeforeValidator(read_size), Field(description="a width and a height, such as 848x480")
]
Prompts = Annotated[tuple[str, ...], Field(min_length=1, description="a list of strings")]
BlockCount = Annotated[StrictBool | CountOrZero, Field(description="true, false or a number of blocks")]
Dtype = Annotated[Literal["bf16", "fp32"], Field(description="one of bf16, fp32")]
# All but fp8_rowwise: fp8 matrix products have no gradient.
ExactQuantizer = Literal["fp8", "int8", "q4_0"]
SECTION = "a section with its own keys"


class Keys(BaseModel):
    """Base of the file's sections: immutable, unknown keys are errors, null is the same as absent."""

    model_config = {"frozen": True, "extra": "forbid"}

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {str(name): value for name, value in values.items() if value is not None}


class LoraKeys(Keys):
    """Rank and alpha of a LoRA's factors, named as in Genmo's fine-tuner."""

    qkv_proj_lora_rank: Count = 16
    qkv_proj_lora_alpha: Positive = 16.0
    out_proj_lora_rank: Count = 16
    out_proj_lora_alpha: Positive = 16.0


class SampleKeys(Keys):
    """Sample videos made during training: from which prompts, how often, and how."""

    prompts: Prompts
    vae: FilePath
    t5: FilePath
    tokenizer: Annotated[FilePath | None, Field(description="a file or folder")] = None
    every: Count = 200
    steps: Count = 64
    guidance: NotNegative = 4.5
    frames: Count = 37
    size: Size = (848, 480)
    seed: CountOrZero = 0

    @model_validator(mode="after")
    def _can_be_made(self) -> SampleKeys:
        self.video_size  # noqa: B018 - raises if Mochi cannot make it
        return self

    @property
    def video_size(self) -> VideoSize:
        width, height = self.size
        return VideoSize(height, width, self.frames)


class Config(Keys):
    """A training run; the defaults are those of Genmo's fine-tuner (genmoai/mochi, demos/fine_tuner) where it has them."""

    transformer: FilePath
    dataset: FilePath
    output: FilePath
    steps: Count = 2000
    learning_rate: Positive = 2e-4
    warmup_steps: CountOrZero = 200
    weight_decay: NotNegative = 0.01
    gradient_clip: Positive = 1.0
    batch_size: Count = 1
    gradient_accumulation: Count = 1
    caption_dropout: Fraction = 0.1
    frame_levels: Fraction = 0.0
    gradient_checkpointing: BlockCount = True
    dtype: Dtype = "bf16"
    quantize: Annotated[ExactQuantizer | None, Field(description="one of fp8, int8, q4_0")] = None
    seed: CountOrZero = 0
    save_every: Count = 500
    lora: Annotated[LoraKeys, Field(description=SECTION)] = LoraKeys()
    sample: Annotated[SampleKeys | None, Field(description=SECTION)] = None

    @model_validator(mode="after")
    def _warms_up_first(self) -> Config:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, but must be less than steps, {self.steps}.")
        return self


KeysT = TypeVar("KeysT", bound=Keys)
LORA_ONLY = ("lora", "quantize")
SECTIONS: dict[str, type[Keys]] = {"lora": LoraKeys, "sample": SampleKeys}


def read_config(path: Path, *, full: bool = False) -> Config:
    """Read a YAML file; paths in it are relative to the current folder.

    Raises:
        ValueError: it is not YAML, or a key is unknown, missing or invalid.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; docs/train_lora.yaml is an example.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a training configuration may have at most {MAX_BYTES:,}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # PyYAML parses dates, numbers and bytes, which can raise anything
        text = "it is nested too deeply" if isinstance(error, RecursionError) else without_advice(error)
        reason = " ".join(text.split())
        raise ValueError(f"{path} is not a YAML file: {shown(reason)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, such as steps: 2000.")
    misplaced = [name for name in LORA_ONLY if full and values.get(name) is not None]
    if misplaced:
        raise ValueError(f"{path}: {misplaced[0]} is for LoRAs only; remove it to train all weights.")
    try:
        return parse(Config, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(keys: type[KeysT], values: dict[Any, Any]) -> KeysT:
    """Build a section from plain YAML values; ValueError about the first invalid key."""
    try:
        return keys.model_validate(values)
    except ValidationError as error:
        # A misspelt key first: it explains why another one is missing.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    # Not while pydantic's error is being handled: a traceback would print its values, and through aliases a short file can hold
    # more than any machine could write.
    raise ValueError(_sentence(keys, values, first))


def _sentence(keys: type[Keys], values: dict[Any, Any], error: ErrorDetails) -> str:
    """One sentence with key, value and rule for a pydantic error; sections are one level deep."""
    place, path = "", [str(part) for part in error["loc"]]
    if keys is Config and path and path[0] in SECTIONS and error["type"] != "model_type":
        place, keys, values = f"in {path[0]}, ", SECTIONS[path[0]], values[path.pop(0)]
    if not path:  # a validator of the whole section raised its own message
        return f"{place}{error.get('ctx', {})['error']}"
    name = path[0]
    if error["type"] == "extra_forbidden":
        return f"{place}there is no key {shown(name)}; the keys are {', '.join(keys.model_fields)}."
    rule = keys.model_fields[name].description
    if error["type"] == "missing":
        return f"{place}{name} is missing; it is {rule}."
    at_most = f" and at most {MAX_COUNT:,}" if error.get("ctx", {}).get("le") == MAX_COUNT else ""
    return f"{place}{name} is {_shown_value(values[name])}, but must be {rule}{at_most}."


def _shown_value(value: Any) -> str:
    """A YAML value, abbreviated: through aliases, a short file can hold more than any machine could write."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong = 2, NAME_LENGTH, NAME_LENGTH
    try:
        return shown(short.repr(value))
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return "a number with thousands of digits"
