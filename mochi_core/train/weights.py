"""What is trained, a LoRA or all weights: the parameters, and how they become files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import from_state_dict, load_transformer
from ..checkpoints.formats.writer import write_safetensors
from ..dtypes import DTYPES
from ..quantization.weights import QuantizedLinear
from ..transformer.model import AsymmDiT
from .config import Config
from .lora import add_lora, write_lora


@dataclass(frozen=True)
class Trainee:
    """A denoiser of which some parameters, by name and in float32, are trained."""

    dit: AsymmDiT
    parameters: dict[str, nn.Parameter]
    write: Callable[[Path], list[Path]]
    """Writes what has been trained to files whose names begin with a stem."""
    autocast: bool
    """Whether float32 parameters are rounded to bf16 for the time of each product."""


def lora_trainee(config: Config, device: torch.device) -> Trainee:
    """A new LoRA in a denoiser that stays as it is."""
    dit = load_transformer(config.transformer, DTYPES[config.dtype], device, config.quantize)
    for layer in dit.modules():
        if isinstance(layer, QuantizedLinear):
            layer.fp8_product = False  # it has no gradient
    factors = add_lora(dit, config.lora, config.seed)
    write = partial(write_lora, factors=factors, keys=config.lora, depth=dit.config.depth)
    return Trainee(dit, factors, write, autocast=False)


def full_trainee(config: Config, device: torch.device) -> Trainee:
    """All weights of a denoiser, kept in float32 while they are trained and written in bf16.

    Raises:
        ValueError: the file's weights are quantised.
    """
    dit = load_transformer(config.transformer, torch.float32, device).requires_grad_(True)
    if list(dit.buffers()):
        raise ValueError(
            f"The weights of {config.transformer.name} are quantised and cannot be trained; widen them first with: "
            "python -m mochi_core convert ... --to canonical --dtype bf16."
        )
    parameters = dict(dit.named_parameters())
    return Trainee(dit, parameters, lambda stem: [_write_all(stem, dit)], config.dtype == "bf16")


def _write_all(stem: Path, dit: AsymmDiT) -> Path:
    path = stem.with_name(f"{stem.name}.safetensors")
    stored = AsymmDiT(dit.config, device="meta", dtype=torch.bfloat16)  # but for what it keeps in float32
    dtypes = {name: parameter.dtype for name, parameter in stored.named_parameters()}
    tensors = {name: value.detach().to("cpu", dtypes[name]) for name, value in dit.named_parameters()}
    write_safetensors(path, from_state_dict(tensors), {"format": "pt"})
    return path
