"""Detect which models a file holds, and select the tensors of one under canonical names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...shown import sentence, shown, shown_names
from ..tensors import Checkpoint, LazyStateDict, LazyTensor
from .diffusers import autoencoder_rules, to_canonical, transformer_rules
from .others import other_file
from .quantized import gather_quantized, unknown_formats
from .sizes import check_depth, count_by_place, count_numbers
from .t5 import COMPANIONS, UMT5, canonical_t5

# Inserted anywhere in names by torch.compile, sharding and activation checkpointing; kohya's trainers turn dots to underscores.
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]")
# Training state stored among the weights: counters and decay rates of moving averages.
TRAINING_STATE = re.compile(r"(.*\.)?(n_averaged|num_updates|decay|initted|step|global_step|num_batches_tracked)")
QUOTED_NAMES = 3
FRAME_LEVELS_KEY = "frame_levels"
"""Metadata key: "true" for a transformer that was trained with per-frame noise levels. A tensor of that name means the same."""
FRAME_LEVELS_CHOICES = {"auto": None, "on": True, "off": False}
"""User's choice of whether a transformer was trained with per-frame noise levels; auto decides by the file."""
TRAINED_FOR_FRAME_LEVELS = "pusa"
"""Occurs in the names of third-party files of that kind; their tensors have the same names and shapes as Genmo's."""


@dataclass(frozen=True)
class Part:
    """How files name and lay out one of the models needed to make a video."""

    phrase: str
    example: str
    """Name of a released file."""
    subfolder: str
    """Folder of the model in a diffusers pipeline."""
    prefixes: re.Pattern[str]
    """Prefixes that wrappers and whole pipelines add to the model's own names, in any combination."""
    signatures: tuple[str, ...]
    """Endings of tensor names; every layout has one of them."""
    to_canonical: Callable[[LazyStateDict], LazyStateDict]
    companions: re.Pattern[str] | None = None
    """Names of tensors that complete files of the model include but a video does not need."""


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    phrase: str
    sorts: tuple[str, ...]
    """Names in `PARTS`, or the sort of another known file (see `others.py`); empty for an unknown one."""


class OtherModelError(ValueError):
    """A file does not hold the requested model; the message says "FILE holds CONTENT"."""

    def __init__(self, message: str, file: str = "", content: Content = Content("", ())) -> None:
        super().__init__(sentence(message))
        self.file, self.content = file, content

    def with_loaders(self, taken: str) -> OtherModelError:
        """The same error with where such a file belongs added, such as ", which Load VAE takes from models/vae"."""
        holds = f" holds {self.content.phrase}"
        return OtherModelError(str(self).replace(holds, holds + taken, 1), self.file, self.content)


def select_part(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """The tensors of "transformer", "vae", "t5" or "tiny_vae" under their canonical names, whatever their names in the file.

    Prefixes are stripped, diffusers' names converted, and tensors of other models left out. Known extras of the same model or its
    training, such as T5's decoder, are left out and logged. Names of the autoencoder always begin with `encoder.` or `decoder.`.
    A quantised weight is one tensor, with its stored form in `quantized`.

    Raises:
        OtherModelError: the file holds no such model.
        ValueError: the model is in a form that cannot be loaded.
    """
    if (found := find_parts(checkpoint).get(part)) is None:
        holds, wanted, name = content(checkpoint), PARTS[part], checkpoint.name
        message = f"{name} holds {holds.phrase}, not {wanted.phrase}; choose a file such as {wanted.example}."
        raise OtherModelError(message, name, holds)
    if found.pop(FRAME_LEVELS_KEY, None):  # ComfyUI's save nodes write tensors, but not our metadata
        checkpoint = replace(checkpoint, metadata={**checkpoint.metadata, FRAME_LEVELS_KEY: "true"})
    found = _without_companions(checkpoint, found, PARTS[part])
    if formats := unknown_formats(found):
        raise checkpoint.error(
            f"has weights in a form that cannot be read: {shown_names(sorted(formats))}; use another file."
        )
    with checkpoint.named_errors():
        return checkpoint.with_tensors(PARTS[part].to_canonical(found))


def _without_companions(checkpoint: Checkpoint, tensors: LazyStateDict, part: Part) -> LazyStateDict:
    """A model's tensors without the known ones that it does not need; the log names some of those left out."""

    def is_companion(name: str, tensor: LazyTensor) -> bool:
        known = part.companions is not None and part.companions.fullmatch(name)
        return bool(known or (tensor.numel == 1 and TRAINING_STATE.fullmatch(name)))

    needed = {name: tensor for name, tensor in tensors.items() if not is_companion(name, tensor)}
    if companions := [name for name in tensors if name not in needed]:
        some, name = shown_names(companions, QUOTED_NAMES), shown(checkpoint.name)
        logging.info(f"{name}: skipped {len(companions)} tensors that {part.phrase} does not need: {some}")
    return needed


def has_frame_levels(checkpoint: Checkpoint) -> bool:
    """Whether a transformer was trained with per-frame noise levels, by the file's metadata or else its name."""
    said = checkpoint.metadata.get(FRAME_LEVELS_KEY)
    return TRAINED_FOR_FRAME_LEVELS in checkpoint.path.name.lower() if said is None else said.lower() == "true"


def find_parts(checkpoint: Checkpoint) -> dict[str, LazyStateDict]:
    """The tensors of each of "transformer", "vae", "t5" and "tiny_vae" that a file holds, without prefixes and wrappers.

    Raises:
        ValueError: a name occurs both with and without wrappers.
    """
    tensors = gather_quantized(checkpoint)
    unwrapped = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(unwrapped) < len(tensors):
        raise checkpoint.error(
            "does not fit Mochi: it holds tensors twice, under names with and without wrappers; use another file."
        )
    return {part: found for part in PARTS if (found := _strip(unwrapped, part)) is not None}


def describe(checkpoint: Checkpoint) -> str:
    """One phrase for what a file holds."""
    return content(checkpoint).phrase


def content(checkpoint: Checkpoint) -> Content:
    """What a file holds: parts of Mochi, another known model, or a few of its tensor names."""
    if parts := find_parts(checkpoint):
        return Content(" and ".join(_describe_part(part, found) for part, found in parts.items()), tuple(parts))
    names = list(gather_quantized(checkpoint))
    if other := other_file(names):
        return Content(other.phrase, (other.sort,))
    return Content(
        f"an unknown model of {len(names)} tensors (e.g. {shown_names(names, 3)})" if names else "no tensors", ()
    )


def _describe_part(part: str, tensors: LazyStateDict) -> str:
    layout = " in diffusers layout" if any("resnets." in n or n.startswith("time_embed.") for n in tensors) else ""
    blocks = count_numbers(tensors, r"(?:transformer_blocks|blocks|encoder\.block|enc\.blk)\.(\d+)\..*")
    depth = f", {blocks} blocks" if part in ("transformer", "t5") else ""
    dtypes = sorted({tensor.stored_dtype for tensor in tensors.values() if tensor.numel})
    return f"{PARTS[part].phrase}{layout}{depth}, {' and '.join(dtypes)}"


def _strip(tensors: LazyStateDict, part: str) -> LazyStateDict | None:
    """The tensors of one part without their prefix; None if the file does not hold it."""
    prefixes = {name.removesuffix(end) for name in tensors for end in PARTS[part].signatures if name.endswith(end)}
    for prefix in sorted(filter(PARTS[part].prefixes.fullmatch, prefixes), key=len):
        found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if LOOKS.get(part, bool)(found):
            return found
    return None


def _is_t5(tensors: LazyStateDict) -> bool:
    """Tell T5 from umT5, which has the same signature."""
    return not any(map(UMT5.fullmatch, tensors))


def _is_taem1(tensors: LazyStateDict) -> bool:
    """Tell TAEM1 from other tiny autoencoders, which have the same names but fewer frames or other channels."""
    shapes = {name: tuple(tensors[name].shape) for name in TAEM1_SHAPES if name in tensors}
    return shapes == TAEM1_SHAPES


def _decoder_only(tensors: LazyStateDict) -> LazyStateDict:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}


def _is_mochi_vae(tensors: LazyStateDict) -> bool:
    marks = (
        r"(decoder\.)?blocks\.0\.1\.stack\.2\.weight",
        r"(encoder\.)?layers\.1\.stack\.2\.weight",
        r"(decoder|encoder)\.block_in\.resnets\.0\.conv1\.conv\.weight",
    )
    return any(re.fullmatch(mark, name) for mark in marks for name in tensors)


def _canonical_transformer(tensors: LazyStateDict) -> LazyStateDict:
    if "t5_yproj.weight" in tensors:
        return tensors
    depth = check_depth(count_numbers(tensors, r"transformer_blocks\.(\d+)\..*"))
    return to_canonical(tensors, transformer_rules(depth))


def _canonical_vae(tensors: LazyStateDict) -> LazyStateDict:
    if "blocks.0.0.weight" in tensors:
        return {f"decoder.{name}": tensor for name, tensor in tensors.items()}
    if "layers.0.weight" in tensors:
        return {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    halves = {name: tensor for name, tensor in tensors.items() if name.startswith(("encoder.", "decoder."))}
    if not any(".resnets." in name for name in halves):
        return halves
    rules = autoencoder_rules(_resnets(halves, "encoder.down_blocks"), _resnets(halves, "decoder.up_blocks"))
    return to_canonical(halves, rules)


def _resnets(tensors: LazyStateDict, stages: str) -> tuple[int, ...]:
    """Number of residual blocks that one half of a diffusers autoencoder has before, in and after its stages."""
    half = stages.partition(".")[0]
    count = check_depth(count_numbers(tensors, re.escape(stages) + r"\.(\d+)\..*"))
    numbered = [f"{stages}.{i}" for i in range(count)]
    resnets = count_by_place(tensors, r"([^.]+\.[^.]+(?:\.\d+)?)\.resnets\.(\d+)\..*")
    counts = tuple(resnets[place] for place in (f"{half}.block_in", *numbered, f"{half}.block_out"))
    check_depth(sum(counts))
    return counts


TAEM1_SHAPES = {"decoder.1.weight": (256, 12, 3, 3), "decoder.19.conv.weight": (192, 64, 1, 1)}
"""Shapes of the first convolution and the last temporal expansion in madebyollin/taem1."""
LOOKS: dict[str, Callable[[LazyStateDict], bool]] = {"vae": _is_mochi_vae, "t5": _is_t5, "tiny_vae": _is_taem1}
"""For parts that names alone do not identify: whether tensors with the signature are Mochi's."""
PARTS = {
    "transformer": Part(
        "a Mochi transformer", "mochi_preview_bf16.safetensors", "transformer",
        re.compile(r"((module|model|diffusion_model|transformer)\.)*"),
        ("t5_yproj.weight", "time_embed.caption_proj.weight"),
        _canonical_transformer,
    ),
    "vae": Part(
        "a Mochi autoencoder", "mochi_vae.safetensors", "vae",
        re.compile(r"((module|model|vae|first_stage_model)\.)*"),
        ("decoder.blocks.0.0.weight", "encoder.layers.0.weight", "blocks.0.0.weight", "layers.0.weight",
         "decoder.block_in.resnets.0.conv1.conv.weight", "encoder.block_in.resnets.0.conv1.conv.weight"),
        _canonical_vae,
    ),
    "t5": Part(
        "a T5 text encoder", "t5xxl_fp16.safetensors", "text_encoder",
        re.compile(
            r"((module|model|text_encoders?|text_encoder_\d|t5xxl|transformer|conditioner|embedders\.\d+|cond_stage_model)\.)*"
        ),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "enc.blk.0.attn_q.weight"),
        canonical_t5,
        COMPANIONS,
    ),
    "tiny_vae": Part(
        "Mochi's tiny autoencoder TAEM1", "taem1.safetensors", "tiny_vae",
        re.compile(r"((module|model|vae|taem1|first_stage_model)\.)*"),
        ("decoder.19.conv.weight",),
        _decoder_only,
        re.compile(r"encoder\..*"),
    ),
}  # fmt: skip
