"""Targets of LoRAs: which rows of which linear layer of the denoiser a layer name in a LoRA file means."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoints.names.detect import WRAPPERS
from ..checkpoints.names.diffusers import transformer_rules
from ..config import AsymmDiTConfig
from ..transformer.model import AsymmDiT

# Possible beginnings of a layer's name in a file, in any combination; dots are underscores here, as kohya's trainers write.
LAYER_PREFIXES = (
    "base_model_model_", "model_", "diffusion_model_", "transformer_", "unet_", "module_", "lora_unet_",
    "lora_transformer_", "lycoris_",
)  # fmt: skip


@dataclass(frozen=True)
class TargetRows:
    """Rows of a linear layer's weight that one layer name in a LoRA file stands for."""

    layer: str
    """Canonical name of the layer, e.g. blocks.3.attn.qkv_x."""
    first_row: int
    rows: int
    """Number of rows: all of the weight, or one of q, k and v."""
    columns: int
    swap_halves: bool
    """Whether the file keeps the second half of the rows first; see `checkpoints.names.diffusers`."""


def linear_shapes(config: AsymmDiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of the weight, (rows, columns), of every linear layer of `AsymmDiT`, by canonical layer name."""
    weights = AsymmDiT(config, device="meta").named_parameters()
    return {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in weights
        if name.endswith(".weight") and weight.ndim == 2
    }


def lora_targets(config: AsymmDiTConfig) -> dict[str, TargetRows]:
    """Every linear layer under its canonical and its diffusers names, with underscores for dots."""
    shapes, targets = linear_shapes(config), {}
    for rule in transformer_rules(config.depth):
        layer = rule.canonical.removesuffix(".weight")
        if layer not in shapes:
            continue
        rows, columns = shapes[layer]
        targets[_flat(layer)] = TargetRows(layer, 0, rows, columns, swap_halves=False)
        part = rows // len(rule.foreign)
        for i, name in enumerate(rule.foreign):
            foreign = _flat(name.removesuffix(".weight"))
            targets[foreign] = TargetRows(layer, i * part, part, columns, rule.swap_halves)
    return targets


def find_target(targets: dict[str, TargetRows], layer: str) -> TargetRows | None:
    """The entry of `lora_targets` for a layer name in a file, whatever prefixes and wrappers it has; None if there is none."""
    name = _flat(WRAPPERS.sub("", layer))
    while name not in targets:
        prefix = next((prefix for prefix in LAYER_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return targets[name]


def _flat(name: str) -> str:
    return name.replace(".", "_")
