"""LoRA files as the trainers write them, and the weights that should result."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mochi_core import AsymmDiT
from mochi_core.checkpoints import from_state_dict, to_canonical, to_diffusers, transformer_rules

RANK, ALPHA = 4, 6.0
ATTENTION = ("qkv_x", "qkv_y", "proj_x", "proj_y")
# Names of the factors, with the layer's name unchanged, with underscores, or inside a compiled block.
SPELLINGS = {
    "genmo": ("{layer}.lora_A", "{layer}.lora_B"),
    "peft": ("base_model.model.{layer}.lora_A.weight", "base_model.model.{layer}.lora_B.weight"),
    "named peft": ("{layer}.lora_A.default.weight", "{layer}.lora_B.default.weight"),
    "diffusers": ("transformer.{layer}.lora_A.weight", "transformer.{layer}.lora_B.weight"),
    "old diffusers": ("transformer.{layer}.lora.down.weight", "transformer.{layer}.lora.up.weight"),
    "comfyui": ("diffusion_model.{layer}.lora_A.weight", "diffusion_model.{layer}.lora_B.weight"),
    "compiled": ("_orig_mod.{compiled}.lora_A.weight", "_orig_mod.{compiled}.lora_B.weight"),
    "lora_down": ("{layer}.lora_down.weight", "{layer}.lora_up.weight"),
    "kohya": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight"),
    "compiled kohya": ("lora_unet__orig_mod_{flat}.lora_down.weight", "lora_unet__orig_mod_{flat}.lora_up.weight"),
}


@dataclass(frozen=True)
class Factors:
    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None


Adapter = dict[str, Factors]
"""By layer names, Mochi's own or diffusers'."""


def diffusers_weights(dit: AsymmDiT) -> dict[str, Tensor]:
    tensors = to_diffusers(from_state_dict(dit.state_dict()), transformer_rules(dit.config.depth))
    return {name: tensor.read() for name, tensor in tensors.items()}


def random_adapter(weights: dict[str, Tensor], *endings: str, seed: int = 0, dora: bool = False) -> Adapter:
    """An adapter for every matrix of a state dict whose layer's name has one of `endings` (all if empty)."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and weight.ndim == 2 and layer.endswith(endings or ("",)):
            rows, columns = weight.shape
            down = torch.randn(RANK, columns, generator=generator) * columns**-0.5
            up = torch.randn(rows, RANK, generator=generator) * 0.2
            stretch = 1 + 0.2 * torch.randn(rows, generator=generator)
            adapter[layer] = Factors(down, up, weight.float().norm(dim=1) * stretch if dora else None)
    return adapter


def random_changes(weights: dict[str, Tensor], *endings: str, seed: int = 0) -> dict[str, Tensor]:
    """Changes for every parameter whose name has one of `endings` (all if empty): a fifth of its own size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.2 * weight.float().std(correction=0) * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
        if name.endswith(endings or ("",))
    }


def merged(
    weights: dict[str, Tensor], adapter: Adapter, scale: float = 1.0, strength: float = 1.0
) -> dict[str, Tensor]:
    """The definition of a LoRA, in float32."""
    result = dict(weights)
    for layer, factors in adapter.items():
        weight = weights[f"{layer}.weight"].float()
        changed = weight + scale * factors.up @ factors.down
        if factors.magnitude is not None:
            changed = changed * (factors.magnitude / changed.norm(dim=1))[:, None]
        result[f"{layer}.weight"] = weight + strength * (changed - weight)
    return result


def with_weights(dit: AsymmDiT, weights: dict[str, Tensor]) -> AsymmDiT:
    """A float32 denoiser with the given weights, under Mochi's own names or diffusers'."""
    if "patch_embed.proj.weight" in weights:
        canonical = to_canonical(from_state_dict(weights), transformer_rules(dit.config.depth))
        weights = {name: tensor.read() for name, tensor in canonical.items()}
    other = AsymmDiT(dit.config)
    other.load_state_dict(weights)
    return other.requires_grad_(False).eval()


def write_adapter(
    path: Path,
    adapter: Adapter,
    spelling: str,
    alpha: float | None = None,
    metadata: dict | None = None,
    changes: dict[str, Tensor] | None = None,
) -> Path:
    """`metadata` values become JSON; `alpha` becomes a tensor per layer; `changes` of parameters get ComfyUI's names."""
    tensors = {}
    for name, change in (changes or {}).items():
        layer, leaf = name.rpartition(".")[::2] if name.endswith((".weight", ".bias")) else (name, "weight")
        stem = f"lora_unet_{layer.replace('.', '_')}" if spelling == "kohya" else f"diffusion_model.{layer}"
        tensors[f"{stem}.{'diff_b' if leaf == 'bias' else 'diff'}"] = change.contiguous()
    for layer, factors in adapter.items():
        forms = {"flat": layer.replace(".", "_"), "compiled": re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", layer)}
        down, up = (name.format(layer=layer, **forms) for name in SPELLINGS[spelling])
        stem = down.split(".lora")[0]
        tensors |= {down: factors.down.contiguous(), up: factors.up.contiguous()}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        if factors.magnitude is not None and spelling == "kohya":
            tensors[f"{stem}.dora_scale"] = factors.magnitude[:, None]
        elif factors.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = factors.magnitude
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {name: json.dumps(value) for name, value in (metadata or {}).items()} or None)
    return path


def write_genmo_lora(path: Path, dit: AsymmDiT, seed: int = 0) -> None:
    """A one-layer LoRA that visibly changes what `dit` makes."""
    layer, generator = "blocks.0.attn.qkv_x", torch.Generator().manual_seed(seed)
    rows, columns = dit.get_parameter(f"{layer}.weight").shape
    tensors = {
        f"{layer}.lora_A": torch.randn(RANK, columns, generator=generator) * 0.1,
        f"{layer}.lora_B": torch.randn(rows, RANK, generator=generator) * 0.1,
    }
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
