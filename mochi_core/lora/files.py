"""LoRA files in Genmo's, PEFT's, diffusers', kohya's and ComfyUI's formats, all read as changes to canonical parameters.

A LoRA changes a weight (rows, columns) to weight + scale * up @ down, where scale is alpha / rank. A DoRA then rescales every
row to the length given in the file. ComfyUI's files may also hold changes to norms, biases and whole weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import Checkpoint, LazyTensor, is_finite, open_checkpoint
from ..checkpoints.limits import read_json
from ..checkpoints.names.detect import Content, OtherModelError, content
from ..checkpoints.names.diffusers import swapped_halves
from ..config import AsymmDiTConfig
from ..shown import shown, shown_names
from .targets import TargetRows, find_target, lora_targets

# Tensor names in LoRAs: the name of a layer, then one of the names for the tensor's role.
LORA_KEY = re.compile(
    r"(?P<layer>.+)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up)|(?P<alpha>alpha)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector))(?:\.(?!bias$)\w+){0,2}"
    r"|(?P<whole_layer>.+)\.(?:(?P<weight>diff|w_norm)|(?P<bias>diff_b|b_norm))"  # names from ComfyUI's comfy/lora.py
)
LEAVES = ("bias", "weight")
"""Roles of tensors that are added to the parameter of the same name."""


@dataclass(frozen=True)
class LoraDelta:
    """One low-rank change: weight[rows] of a layer becomes weight[rows] + scale * up @ down."""

    layer: str
    """Canonical name, e.g. blocks.3.attn.qkv_x."""
    rows: tuple[int, int]
    """First row and the one after the last; only part of the layer where the file has q, k and v separately."""
    down: Tensor
    """(rank, columns)."""
    up: Tensor
    """(rows, rank)."""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) if the file says so."""
    magnitude: Tensor | None
    """(rows,) lengths to which DoRA rescales the changed rows, see `dora_scale`; None without DoRA."""


@dataclass(frozen=True)
class ParameterDelta:
    """An elementwise change to any parameter: parameter[rows] becomes parameter[rows] + change."""

    parameter: str
    """Canonical name, e.g. blocks.3.attn.q_norm_x.weight."""
    rows: tuple[int, int]
    """First row and the one after the last."""
    change: Tensor
    """(rows, ...)."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file's changes to a denoiser."""

    checkpoint: Checkpoint
    deltas: tuple[LoraDelta | ParameterDelta, ...]
    unmatched: tuple[str, ...]
    """Layers and tensors that Mochi does not have, or that are in an unsupported form."""

    def report(self, read_elsewhere: Collection[str] = ()) -> str | None:
        """A sentence that lists what was left out, None if nothing was; `read_elsewhere` lists what a host has read.

        Raises:
            OtherModelError: nothing was read.
        """
        left = [name for name in self.unmatched if name not in read_elsewhere]
        if not self.deltas and not read_elsewhere:
            name, holds = self.checkpoint.name, _content(self.checkpoint)
            raise OtherModelError(
                f"{name} holds {holds.phrase}; Mochi has none of its layers, e.g. {shown_names(left)}: "
                "choose a LoRA made for Mochi.",
                name,
                holds,
            )
        name, some = shown(self.checkpoint.name), shown_names(left)
        sentence = f"{name}: Mochi has no layers for {len(left)} of its names, which are ignored: {some}."
        return sentence if left else None


@dataclass(frozen=True)
class Alphas:
    """Alphas from a file's metadata, for layers that have no alpha tensor."""

    by_ending: dict[str, float]
    """Alpha by the last components of a layer's name."""
    default: float | None = None
    """Alpha of layers that `by_ending` does not list; None means alpha = rank."""
    rank_stabilised: bool = False
    """Whether alpha is divided by the square root of the rank (rsLoRA, arXiv:2312.03732)."""

    def of(self, layer: str) -> float | None:
        """Alpha of a layer by its name in the file; None means alpha = rank."""
        endings = (alpha for ending, alpha in self.by_ending.items() if f".{layer}".endswith(f".{ending}"))
        return next(endings, self.default)

    def scale(self, alpha: float | None, rank: int) -> float:
        """The factor of up @ down."""
        alpha = rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_lora(path: str | Path, config: AsymmDiTConfig) -> LoraFile:
    """Read a LoRA file for a denoiser of the sizes in `config`.

    Raises:
        ValueError: the file is not a LoRA, or does not fit the denoiser.
        FileNotFoundError: there is no such file.
    """
    file = open_checkpoint(path)
    layers, unmatched = _group(file)
    targets, alphas = lora_targets(config), _alphas(file)
    deltas: dict[tuple[str, int], LoraDelta | ParameterDelta] = {}

    def add(target: TargetRows, delta: LoraDelta | ParameterDelta) -> None:
        if deltas.setdefault((target.parameter, target.first_row), delta) is not delta:
            raise file.error(f"changes {target.parameter.removesuffix('.weight')} twice; use a file with one LoRA.")

    for layer, tensors in layers.items():
        found = {leaf: target for leaf in LEAVES if (target := find_target(targets, layer, leaf))}
        factors = {role: tensor for role, tensor in tensors.items() if role not in LEAVES}
        wholes = tensors.keys() & LEAVES
        if not wholes <= found.keys() or (not wholes and (not found or not {"down", "up"} & factors.keys())):
            unmatched.append(layer)
            continue
        for leaf in sorted(wholes):
            add(found[leaf], _read_whole(file, layer, tensors[leaf], found[leaf]))
        if {"down", "up"} & factors.keys():
            add(found["weight"], _read_delta(file, layer, factors, found["weight"], alphas))
    return LoraFile(file, tuple(deltas.values()), tuple(unmatched))


def _group(file: Checkpoint) -> tuple[dict[str, dict[str, LazyTensor]], list[str]]:
    """The tensors of each layer by role (down, up, alpha, magnitude, or one of `LEAVES`), and names without such a role."""
    layers: dict[str, dict[str, LazyTensor]] = {}
    others = []
    for name, tensor in file.tensors.items():
        if match := LORA_KEY.fullmatch(name):
            layers.setdefault(match["layer"] or match["whole_layer"], {})[str(match.lastgroup)] = tensor
        else:
            others.append(name)
    return layers, others


def _read_whole(file: Checkpoint, layer: str, tensor: LazyTensor, target: TargetRows) -> ParameterDelta:
    """Read the change to a whole parameter, or to those of its rows that the file's layer corresponds to."""
    if tensor.shape != target.shape:
        raise file.error(
            f"does not fit: the change of {layer} is {tensor.shape}, but {target.parameter} in Mochi is {target.shape}; "
            f"it looks like {_content(file).phrase}."
        )
    change = _read_finite(file, layer, tensor)
    rows = (target.first_row, target.first_row + target.rows)
    return ParameterDelta(target.parameter, rows, swapped_halves(change) if target.swap_halves else change)


def _read_finite(file: Checkpoint, layer: str, tensor: LazyTensor) -> Tensor:
    """A copy of the values, because a trainer may overwrite the file while the LoRA is in use."""
    if not tensor.is_float:
        raise file.error(
            f"has {tensor.stored_dtype} values in {layer}, but they must be floating point; use another file."
        )
    value = tensor.read().clone()
    if not is_finite(value):
        raise file.error(f"has NaN or infinite values in {layer}; its training failed, use another.")
    return value


def _read_delta(
    file: Checkpoint, layer: str, tensors: dict[str, LazyTensor], target: TargetRows, alphas: Alphas
) -> LoraDelta:
    _check(file, layer, tensors, target)
    alpha = tensors["alpha"].read().item() if "alpha" in tensors else alphas.of(layer)
    values = {role: _read_finite(file, layer, tensor) for role, tensor in tensors.items() if role != "alpha"}
    down, up = values["down"].flatten(1), values["up"].flatten(1)
    scale = alphas.scale(alpha, len(down))
    if not math.isfinite(scale):
        raise file.error(f"has NaN or infinite values in {layer}; its training failed, use another.")
    magnitude = values["magnitude"].flatten() if "magnitude" in values else None
    if target.swap_halves:
        up = swapped_halves(up)
        magnitude = None if magnitude is None else swapped_halves(magnitude)
    rows = (target.first_row, target.first_row + target.rows)
    return LoraDelta(target.layer, rows, down, up, scale, magnitude)


def _check(file: Checkpoint, layer: str, tensors: dict[str, LazyTensor], target: TargetRows) -> None:
    if not {"down", "up"} <= tensors.keys():
        raise file.error(f"has only one half of {layer}; download it again.")
    rank, expected = tensors["down"].shape[:1], (target.rows, target.columns)
    down, up = (_as_matrix(tensors[role].shape) for role in ("down", "up"))
    if (down, up) != ((*rank, target.columns), (target.rows, *rank)) or rank == (0,):
        raise file.error(
            f"does not fit: {layer} multiplies {up} by {down}, but the layer in Mochi is {expected}; "
            f"it looks like {_content(file).phrase}."
        )
    if "magnitude" in tensors and _as_matrix(tensors["magnitude"].shape) not in ((target.rows, 1), (target.rows,)):
        raise file.error(
            f"does not fit: the DoRA scale of {layer} is {tensors['magnitude'].shape}, but must have "
            f"{target.rows} rows; per-column scales are not supported."
        )
    if "alpha" in tensors and math.prod(tensors["alpha"].shape) != 1:
        raise file.error(f"has {tensors['alpha'].shape} alphas for {layer}, but must have one.")
    if "alpha" in tensors and tensors["alpha"].dtype in (torch.bool, torch.complex64, torch.complex128):
        raise file.error(f"has {tensors['alpha'].stored_dtype} for the alpha of {layer}, but it must be a real number.")


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with trailing axes flattened: some files store the factors of linear layers as 1x1 convolutions."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape


def _alphas(file: Checkpoint) -> Alphas:
    """Alphas from the metadata: Genmo's trainer stores them in `kwargs`, diffusers and PEFT in the adapter's configuration."""
    beside = file.path.with_name("adapter_config.json")
    try:
        if "kwargs" in file.metadata:
            return _genmo_alphas(read_json(file.metadata["kwargs"]))
        if "lora_adapter_metadata" in file.metadata:
            return _peft_alphas(read_json(file.metadata["lora_adapter_metadata"]))
        if file.path.name.startswith("adapter_model.") and beside.is_file():
            return _peft_alphas(read_json(beside.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise file.error("has invalid metadata about its alpha; save it again.") from None
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


def _content(file: Checkpoint) -> Content:
    """The content of a file that does not fit Mochi."""
    found = content(file)
    return Content("a LoRA for another model", ()) if found.phrase == "a LoRA" else found
