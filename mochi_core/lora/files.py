"""LoRA files: Genmo's, PEFT's and diffusers', kohya's and ComfyUI's kinds, all read as changes to canonical layers.

A LoRA changes a weight (rows, columns) to weight + scale * up @ down; a DoRA then gives every row the length that the file
says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints import Checkpoint, LazyTensor, describe, is_finite, open_checkpoint, transformer_rules
from ..checkpoints.names.detect import WRAPPERS
from ..checkpoints.names.diffusers import swapped_halves
from ..config import AsymmDiTConfig
from ..transformer.model import AsymmDiT

ROLES = re.compile(
    r"(?P<layer>.+)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up)|(?P<alpha>alpha)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector))(?:\.(?!bias$)\w+){0,2}"
)
# What may stand before the name of a layer once its dots are underscores, as kohya's are anyway.
PREFIXES = (
    "base_model_model_", "model_", "diffusion_model_", "transformer_", "unet_", "module_", "lora_unet_",
    "lora_transformer_", "lycoris_",
)  # fmt: skip
STRANGERS = (
    ("a LoHa, LoKr or OFT adapter", r".*\.(hada_w|lokr_w|oft_).*"),
    ("a LoRA for FLUX or HunyuanVideo", r".*(double_blocks|single_blocks|single_transformer_blocks).*"),
    ("a LoRA for FLUX or SD3", r".*(joint_blocks|transformer_blocks[._]\d+[._]attn[._]).*"),
    ("a LoRA for Wan", r".*blocks[._]\d+[._](self|cross)_attn.*"),
    ("a LoRA for LTX", r".*transformer_blocks[._]\d+[._]attn2.*"),
    ("a LoRA for Stable Diffusion", r".*(down_blocks|up_blocks|mid_block|input_blocks|output_blocks).*"),
    ("a LoRA for a text encoder", r"(lora_te|text_encoder).*"),
)
EXAMPLES = 6


@dataclass(frozen=True)
class LoraUpdate:
    """One change to some rows of one layer's weight."""

    layer: str
    """Canonical name, e.g. blocks.3.attn.qkv_x."""
    rows: tuple[int, int]
    """First row and the one after the last: a fused layer may be changed in parts."""
    down: Tensor
    """(rank, columns)."""
    up: Tensor
    """(rows, rank)."""
    scale: float
    """alpha / rank."""
    magnitude: Tensor | None
    """(rows,): with DoRA, the length of every row of the changed weight."""


@dataclass(frozen=True)
class LoraFile:
    updates: tuple[LoraUpdate, ...]
    unmatched: str | None
    """A sentence naming what in the file has no place in Mochi; None if everything has."""


@dataclass(frozen=True)
class Place:
    """Where a layer of a file lies in Mochi."""

    layer: str
    first_row: int
    rows: int
    columns: int
    swap_halves: bool


@dataclass(frozen=True)
class Alphas:
    """What a file's notes say about the alphas of layers that have no tensor for it."""

    by_ending: dict[str, float]
    """For layers whose names end so."""
    default: float | None = None
    """For all others; None is the rank."""
    rank_stabilised: bool = False

    def of(self, layer: str) -> float | None:
        endings = (alpha for ending, alpha in self.by_ending.items() if f".{layer}".endswith(f".{ending}"))
        return next(endings, self.default)

    def scale(self, alpha: float | None, rank: int) -> float:
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_lora(path: str | Path, config: AsymmDiTConfig) -> LoraFile:
    """Read a LoRA for a denoiser of these sizes.

    Raises:
        ValueError: it is no LoRA, or one for another model, or it does not fit.
        FileNotFoundError: there is no such file.
    """
    file = open_checkpoint(path)
    layers, unmatched = _group(file)
    places, alphas = _places(config), _alphas(file)
    updates: dict[tuple[str, int], LoraUpdate] = {}
    for layer, tensors in layers.items():
        place = _find(places, layer)
        if place is None or not {"down", "up"} & tensors.keys():
            unmatched.append(layer)
            continue
        update = _update(file, layer, tensors, place, alphas)
        if updates.setdefault((update.layer, update.rows[0]), update) is not update:
            raise file.error(f"changes {place.layer} twice; use a file with one LoRA.")
    if not updates:
        raise file.error(
            f"holds {_kind(file)}; Mochi has none of its layers, e.g. {_some(unmatched)}. Choose a LoRA made for Mochi."
        )
    left_out = f"{file.name}: Mochi has no place for {len(unmatched)} of its names, left out: {_some(unmatched)}."
    return LoraFile(tuple(updates.values()), left_out if unmatched else None)


def _group(file: Checkpoint) -> tuple[dict[str, dict[str, LazyTensor]], list[str]]:
    """The tensors of each layer by their roles: down, up, alpha, magnitude; and the names of all others."""
    layers: dict[str, dict[str, LazyTensor]] = {}
    others = []
    for name, tensor in file.tensors.items():
        if match := ROLES.fullmatch(name):
            layers.setdefault(match["layer"], {})[str(match.lastgroup)] = tensor
        else:
            others.append(name)
    return layers, others


def _places(config: AsymmDiTConfig) -> dict[str, Place]:
    """Every linear layer under its canonical and its diffusers name, dots as underscores."""
    places = {}
    parameters = dict(AsymmDiT(config, device="meta").named_parameters())
    for rule in transformer_rules(config.depth):
        layer, _, kind = rule.canonical.rpartition(".")
        if kind != "weight" or rule.canonical not in parameters or parameters[rule.canonical].ndim != 2:
            continue
        rows, columns = parameters[rule.canonical].shape
        places[_flat(layer)] = Place(layer, 0, rows, columns, swap_halves=False)
        part = rows // len(rule.foreign)
        for i, name in enumerate(rule.foreign):
            foreign = _flat(name.removesuffix(".weight"))
            places[foreign] = Place(layer, i * part, part, columns, rule.swap_halves)
    return places


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _find(places: dict[str, Place], layer: str) -> Place | None:
    name = _flat(WRAPPERS.sub("", layer))
    while name not in places:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return places[name]


def _update(file: Checkpoint, layer: str, tensors: dict[str, LazyTensor], place: Place, alphas: Alphas) -> LoraUpdate:
    _check(file, layer, tensors, place)
    # Copies, because a trainer may write the file again while the LoRA is in use.
    values = {role: tensor.read().clone() for role, tensor in tensors.items()}
    down, up = values["down"].flatten(1), values["up"].flatten(1)
    scale = alphas.scale(values["alpha"].item() if "alpha" in values else alphas.of(layer), len(down))
    if not math.isfinite(scale) or not all(map(is_finite, values.values())):
        raise file.error(f"has NaN or infinite numbers in {layer}; its training failed, use another.")
    magnitude = values["magnitude"].flatten() if "magnitude" in values else None
    if place.swap_halves:
        up = swapped_halves(up)
        magnitude = None if magnitude is None else swapped_halves(magnitude)
    rows = (place.first_row, place.first_row + place.rows)
    return LoraUpdate(place.layer, rows, down, up, scale, magnitude)


def _check(file: Checkpoint, layer: str, tensors: dict[str, LazyTensor], place: Place) -> None:
    if not {"down", "up"} <= tensors.keys():
        raise file.error(f"has one half of {layer} only; download it again.")
    rank, expected = tensors["down"].shape[:1], (place.rows, place.columns)
    down, up = (_as_matrix(tensors[role].shape) for role in ("down", "up"))
    if (down, up) != ((*rank, place.columns), (place.rows, *rank)) or rank == (0,):
        raise file.error(
            f"does not fit: {layer} multiplies {up} by {down}, but the layer in Mochi is {expected}; "
            f"it looks like {_kind(file)}."
        )
    if "magnitude" in tensors and _as_matrix(tensors["magnitude"].shape) not in ((place.rows, 1), (place.rows,)):
        raise file.error(
            f"does not fit: the DoRA scale of {layer} is {tensors['magnitude'].shape}, but must have "
            f"{place.rows} rows; scales of columns are not supported."
        )
    if "alpha" in tensors and math.prod(tensors["alpha"].shape) != 1:
        raise file.error(f"has {tensors['alpha'].shape} alphas for {layer}, but must have one.")


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Factors of linear layers are sometimes kept as 1x1 convolutions."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape


def _alphas(file: Checkpoint) -> Alphas:
    """Genmo's trainer notes its alphas under `kwargs`, diffusers and PEFT have the adapter's whole configuration."""
    beside = file.path.with_name("adapter_config.json")
    try:
        if "kwargs" in file.metadata:
            return _genmo_alphas(json.loads(file.metadata["kwargs"]))
        if "lora_adapter_metadata" in file.metadata:
            return _peft_alphas(json.loads(file.metadata["lora_adapter_metadata"]))
        if file.path.name.startswith("adapter_model.") and beside.is_file():
            return _peft_alphas(json.loads(beside.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise file.error("has notes on its alpha that make no sense; save it again.") from error
    return Alphas({})


def _genmo_alphas(notes: dict[str, Any]) -> Alphas:
    kinds = {"qkv_x": "qkv", "qkv_y": "qkv", "proj_x": "out", "proj_y": "out"}
    alphas = {layer: notes.get(f"{kind}_proj_lora_alpha") for layer, kind in kinds.items()}
    return Alphas({layer: float(alpha) for layer, alpha in alphas.items() if alpha is not None})


def _peft_alphas(notes: dict[str, Any]) -> Alphas:
    notes = {name.removeprefix("transformer."): value for name, value in notes.items()}
    by_ending = {name.removeprefix("^"): float(alpha) for name, alpha in (notes.get("alpha_pattern") or {}).items()}
    default = notes.get("lora_alpha")
    return Alphas(by_ending, None if default is None else float(default), bool(notes.get("use_rslora")))


def _kind(file: Checkpoint) -> str:
    """One phrase for what a file is that does not fit."""
    for phrase, pattern in STRANGERS:
        if any(re.fullmatch(pattern, name) for name in file.tensors):
            return phrase
    described = describe(file)
    return "a LoRA for another model" if described == "a LoRA" else described


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:EXAMPLES]) + (", ..." if len(names) > EXAMPLES else "")
