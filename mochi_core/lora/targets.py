"""Targets of LoRAs: which rows of which linear layer of the denoiser a layer name in a LoRA file means."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoints.names.detect import WRAPPERS
from ..checkpoints.names.diffusers import transformer_rules
from ..config import AsymmDiTConfig

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


def linear_shapes(config: AsymmDiTConfig) -> dict[str, tuple[int, int]]:
    """Shape of the weight, (rows, columns), of every linear layer of `AsymmDiT`, by canonical layer name."""
    dx, dy, text = config.hidden_size_x, config.hidden_size_y, config.text_width
    shapes = {
        "t_embedder.mlp.0": (dx, config.timestep_features),
        "t_embedder.mlp.2": (dx, dx),
        "t5_y_embedder.to_kv": (2 * text, text),
        "t5_y_embedder.to_q": (text, text),
        "t5_y_embedder.to_out": (dx, text),
        "t5_yproj": (dy, text),
        "final_layer.mod": (2 * dx, dx),
        "final_layer.linear": (config.patch_size**2 * config.in_channels, dx),
    }
    for i in range(config.depth):
        block = _block_shapes(config, is_last=i == config.depth - 1)
        shapes |= {f"blocks.{i}.{layer}": shape for layer, shape in block.items()}
    return shapes


def _block_shapes(config: AsymmDiTConfig, *, is_last: bool) -> dict[str, tuple[int, int]]:
    """Shapes within a block; the last one leaves the text stream as it is, so it lacks the layers that would change it."""
    dx, dy, mlp_x, mlp_y = config.hidden_size_x, config.hidden_size_y, config.mlp_size_x, config.mlp_size_y
    x = {"attn.qkv_x": (3 * dx, dx), "attn.proj_x": (dx, dx), "mlp_x.w1": (2 * mlp_x, dx), "mlp_x.w2": (dx, mlp_x)}
    y = {"attn.proj_y": (dy, dx), "mlp_y.w1": (2 * mlp_y, dy), "mlp_y.w2": (dy, mlp_y)}
    both = {"mod_x": (4 * dx, dx), "mod_y": (dy if is_last else 4 * dy, dx), "attn.qkv_y": (3 * dx, dy), **x}
    return both if is_last else both | y


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
