"""Train LoRAs, and write them in two file formats.

The factors become parameters of the layer that they change, under Genmo's names, and a forward hook adds their product to
the layer's output. PEFT would wrap `nn.Linear`, but not `QuantizedLinear`; a hook works on any layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import from_state_dict, transformer_rules
from ..checkpoints.formats.writer import write_safetensors
from ..quantization.weights import QuantizedLinear
from ..transformer.model import AsymmDiT
from .config import LoraKeys

Factors = dict[str, nn.Parameter]
"""Factors by name, float32: blocks.N.attn.qkv_x.lora_A (rank, in_features), ...lora_B (out_features, rank)."""


def add_lora(dit: AsymmDiT, keys: LoraKeys, seed: int) -> Factors:
    """Add a new LoRA to the attention of every block; the output is unchanged at first, as every `lora_B` is zero."""
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = {}
    for name, layer in _target_layers(dit):
        rank, scale = rank_and_scale(keys, name)
        down = nn.init.kaiming_uniform_(torch.empty(rank, layer.in_features), math.sqrt(5), generator=generator)
        up = torch.zeros(layer.out_features, rank)
        device = next(iter(layer.state_dict().values())).device
        for factor, value in (("lora_A", down), ("lora_B", up)):
            factors[f"{name}.{factor}"] = nn.Parameter(value.to(device))
            layer.register_parameter(factor, factors[f"{name}.{factor}"])
        layer.register_forward_hook(partial(_lora_hook, scale))
    return factors


def rank_and_scale(keys: LoraKeys, layer: str) -> tuple[int, float]:
    """Rank of a layer's factors, and alpha / rank, the scale of their product."""
    if layer.endswith(("qkv_x", "qkv_y")):
        return keys.qkv_proj_lora_rank, keys.qkv_proj_lora_alpha / keys.qkv_proj_lora_rank
    return keys.out_proj_lora_rank, keys.out_proj_lora_alpha / keys.out_proj_lora_rank


def _target_layers(dit: AsymmDiT) -> Iterator[tuple[str, nn.Linear | QuantizedLinear]]:
    for name, layer in dit.named_modules():
        if re.fullmatch(r"blocks\.\d+\.attn\.(qkv|proj)_[xy]", name):
            yield name, cast("nn.Linear | QuantizedLinear", layer)


def _lora_hook(scale: float, layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    """Forward hook: out + scale * x A^T B^T, in the dtype of the layer's input."""
    x = inputs[0]
    down, up = (cast(Tensor, factor).to(x.dtype) for factor in (layer.lora_A, layer.lora_B))
    product = torch.addmm(out.flatten(0, -2), F.linear(x, down).flatten(0, -2), up.T, alpha=scale)
    return product.view_as(out)


def write_lora(stem: Path, factors: Factors, keys: LoraKeys, depth: int) -> list[Path]:
    """Write STEM.lora.safetensors, in Genmo's format, and STEM.diffusers.safetensors, which diffusers and PEFT read."""
    tensors = {name: factor.detach().cpu() for name, factor in factors.items()}
    genmo, diffusers = (stem.with_name(f"{stem.name}.{kind}.safetensors") for kind in ("lora", "diffusers"))
    write_safetensors(genmo, from_state_dict(tensors), {"format": "pt", "kwargs": json.dumps(keys.model_dump())})
    write_safetensors(diffusers, from_state_dict(diffusers_factors(tensors, keys, depth)), {"format": "pt"})
    return [genmo, diffusers]


def diffusers_factors(factors: dict[str, Tensor], keys: LoraKeys, depth: int) -> dict[str, Tensor]:
    """A LoRA under diffusers' names: q, k and v share a lora_A, and alpha / rank is multiplied into lora_B."""
    renamed = {}
    for rule in transformer_rules(depth):
        layer = rule.canonical.removesuffix(".weight")
        if f"{layer}.lora_A" in factors:
            _, scale = rank_and_scale(keys, layer)
            parts = (scale * factors[f"{layer}.lora_B"]).chunk(len(rule.foreign))
            for name, part in zip(rule.foreign, parts, strict=True):
                foreign = f"transformer.{name.removesuffix('.weight')}"
                renamed[f"{foreign}.lora_A.weight"] = factors[f"{layer}.lora_A"]
                renamed[f"{foreign}.lora_B.weight"] = part
    return renamed
