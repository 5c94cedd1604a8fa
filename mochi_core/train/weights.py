"""The model to train: which parameters are trained, a LoRA's or all, and how they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import from_state_dict, load_transformer
from ..checkpoints.formats.writer import write_safetensors
from ..checkpoints.names.detect import FRAME_LEVELS_KEY
from ..dtypes import DTYPES
from ..quantization.weights import QuantizedLinear
from ..transformer.model import AsymmDiT
from .config import Config
from .lora import add_lora, write_lora


@dataclass(frozen=True)
class TrainableModel:
    """A denoiser, its trained parameters (float32, by name), and how they are written."""

    dit: AsymmDiT
    parameters: dict[str, nn.Parameter]
    write: Callable[[Path], list[Path]]
    """Writes the trained parameters to files whose names begin with the given stem; returns their paths."""
    autocast: bool
    """Whether matrix products round float32 parameters to bf16 (torch.autocast)."""


def lora_model(config: Config, device: torch.device) -> TrainableModel:
    """Load a denoiser and add a new LoRA; only its factors are trained."""
    dit = load_transformer(config.transformer, DTYPES[config.dtype], device, config.quantize)
    for layer in dit.modules():
        if isinstance(layer, QuantizedLinear):
            layer.fp8_product = False  # fp8 matrix products have no gradient
    factors = add_lora(dit, config.lora, config.seed)
    write = partial(write_lora, factors=factors, keys=config.lora, depth=dit.config.depth)
    return TrainableModel(dit, factors, write, autocast=False)


def full_model(config: Config, device: torch.device) -> TrainableModel:
    """Load a denoiser whose weights are all trained, in float32; they are written in bf16.

    Raises:
        ValueError: the file's weights are quantised.
    """
    dit = load_transformer(config.transformer, torch.float32, device).requires_grad_(True)
    if list(dit.buffers()):
        raise ValueError(
            f"The weights of {config.transformer.name} are quantised, so they cannot be trained; dequantise them first with: "
            "python -m mochi_core convert ... --to canonical --dtype bf16."
        )
    dit.has_frame_levels |= config.frame_levels > 0
    parameters = dict(dit.named_parameters())
    return TrainableModel(dit, parameters, lambda stem: [_write_all(stem, dit)], config.dtype == "bf16")


def _write_all(stem: Path, dit: AsymmDiT) -> Path:
    path = stem.with_name(f"{stem.name}.safetensors")
    stored = AsymmDiT(dit.config, device="meta", dtype=torch.bfloat16)  # its parameters have the dtypes to store
    dtypes = {name: parameter.dtype for name, parameter in stored.named_parameters()}
    tensors = {name: value.detach().to("cpu", dtypes[name]) for name, value in dit.named_parameters()}
    note = {FRAME_LEVELS_KEY: "true"} if dit.has_frame_levels else {}
    write_safetensors(path, from_state_dict(tensors), {"format": "pt", **note})
    return path
