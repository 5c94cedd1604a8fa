"""LoRA targets: which rows of which parameter of the denoiser a name in a LoRA file refers to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checkpoints.names.detect import WRAPPERS
from ..checkpoints.names.diffusers import transformer_rules
from ..config import AsymmDiTConfig
from ..transformer.model import AsymmDiT

# Possible prefixes of a layer's name in a file, in any combination; with underscores for dots, as in kohya's files.
LAYER_PREFIXES = (
    "base_model_model_", "model_", "diffusion_model_", "transformer_", "unet_", "module_", "lora_unet_",
    "lora_transformer_", "lycoris_",
)  # fmt: skip


@dataclass(frozen=True)
class TargetRows:
    """Rows of a parameter that one name in a LoRA file refers to."""

    parameter: str
    """Canonical name, e.g. blocks.3.attn.qkv_x.weight."""
    first_row: int
    shape: tuple[int, ...]
    """Shape of these rows: the parameter's, or with only the rows of q, k or v."""
    swap_halves: bool
    """Whether the file stores the second half of the rows first; see `checkpoints.names.diffusers`."""

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Inputs per row; for a convolution, its flattened kernel."""
        return math.prod(self.shape[1:])

    @property
    def layer(self) -> str:
        """Canonical name of the layer that has the parameter, e.g. blocks.3.attn.qkv_x."""
        return self.parameter.rpartition(".")[0]


def lora_targets(config: AsymmDiTConfig) -> dict[str, TargetRows]:
    """Every parameter of `AsymmDiT` under its canonical and diffusers names, with underscores for dots."""
    shapes = {name: tuple(p.shape) for name, p in AsymmDiT(config, device="meta").named_parameters()}
    targets = {}
    for rule in transformer_rules(config.depth):
        if rule.canonical not in shapes:
            continue
        rows, *rest = shapes[rule.canonical]
        part = rows // len(rule.foreign)
        for i, name in enumerate(rule.foreign):
            targets[_flat(name)] = TargetRows(rule.canonical, i * part, (part, *rest), rule.swap_halves)
        targets[_flat(rule.canonical)] = TargetRows(rule.canonical, 0, (rows, *rest), swap_halves=False)
    return targets


def find_target(targets: dict[str, TargetRows], layer: str, leaf: str = "weight") -> TargetRows | None:
    """The entry of `lora_targets` for the weight or bias of a layer in a file, whatever its prefixes and wrappers.

    `layer` may also be the name of a parameter outside any layer. None if there is no such parameter.
    """
    name = _flat(WRAPPERS.sub("", layer))
    while True:
        if found := targets.get(f"{name}_{leaf}") or (targets.get(name) if leaf == "weight" else None):
            return found
        prefix = next((prefix for prefix in LAYER_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)


def _flat(name: str) -> str:
    return name.replace(".", "_")
