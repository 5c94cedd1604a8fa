"""Rewrite a checkpoint with other tensor names or another dtype, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..choices import FP8_SCALED, KEEP
from ..config import AsymmDiTConfig, AsymmVAEConfig, T5EncoderConfig, TinyVAEConfig
from ..dtypes import DTYPES
from ..output_files import folder, replacing
from ..quantization.weights import quantize_fp8
from .formats.reader import open_checkpoint
from .formats.writer import write_safetensors
from .loading import ModelSpec, check_fit, checked_when_read, model_spec
from .names.detect import FRAME_LEVELS_KEY, find_parts, has_frame_levels, select_part
from .names.diffusers import autoencoder_rules, to_diffusers, transformer_rules
from .names.notes import NOTE, note_tensor
from .names.quantized import is_block_matrix
from .names.sizes import halves
from .names.t5 import hugging_face_entries
from .tensors import QUANTIZATION, Checkpoint, LazyStateDict, LazyTensor, from_state_dict, merge

TARGET_DTYPES = {KEEP: None, **DTYPES, FP8_SCALED: torch.bfloat16}
"""The dtype that weights are converted to; for fp8_scaled, that of the unquantised ones. None keeps the stored dtype."""
# Name of the weights file in a diffusers or transformers folder.
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "t5": "model.safetensors",
    "tiny_vae": "model.safetensors",
}


@dataclass(frozen=True)
class Conversion:
    """What to write."""

    tensors: LazyStateDict
    metadata: dict[str, str]
    config_entries: dict[str, Any]
    """Entries of config.json in a folder."""
    weights_name: str
    """Name of the weights file in a folder."""


def plan_conversion(sources: Sequence[Path], layout: str, dtype: str, part: str | None = None) -> Conversion:
    """Open and check the sources; only headers are read until the conversion is written.

    Args:
        sources: a file or folder, or the two halves of an autoencoder.
        layout, dtype: one of `choices.LAYOUTS`, a key of `TARGET_DTYPES`.
        part: one of `PARTS`, if the source holds several.

    Raises:
        FileNotFoundError, ValueError: see `open_checkpoint`, `select_part` and `check_fit`.
        ValueError: the model cannot be written in that layout or dtype.
    """
    files = [open_checkpoint(source) for source in sources]
    part = part or _only_part(files)
    checkpoint = merge([select_part(file, part) for file in files])
    model = model_spec(checkpoint, part, TARGET_DTYPES[dtype])
    check_fit(model.parameters, checkpoint)
    converted = checked_when_read(_cast(checkpoint, model, TARGET_DTYPES[dtype])).tensors
    if dtype == FP8_SCALED:
        if part in ("vae", "tiny_vae") or layout != "canonical":
            raise ValueError(
                "Scaled fp8 is for a transformer or T5 with canonical names; diffusers cannot load it, use --dtype bf16."
            )
        converted = _with_fp8(converted)
    if layout == "diffusers":
        if part == "tiny_vae":
            raise ValueError("diffusers has no tiny autoencoder for Mochi; write it with --to canonical.")
        converted = _to_diffusers(converted, model)
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != QUANTIZATION}
    if part == "transformer" and has_frame_levels(checkpoint):
        metadata[FRAME_LEVELS_KEY] = "true"  # the new file name may not show it
    return Conversion(converted, {"format": "pt", **metadata}, _config_entries(model), WEIGHTS[part])


def write_conversion(
    conversion: Conversion, destination: Path, on_tensor: Callable[[], object] = lambda: None, *, overwrite: bool = True
) -> None:
    """Write a .safetensors file or, under any other name, a folder that `from_pretrained` loads.

    Raises:
        OSError: it cannot be written; without `overwrite`, also if the file exists by the time writing ends.
    """
    if destination.suffix == ".safetensors":
        with folder(destination.parent):
            write_safetensors(destination, conversion.tensors, conversion.metadata, on_tensor, overwrite=overwrite)
        return
    weights, config = destination / conversion.weights_name, destination / "config.json"
    with folder(destination), replacing(config, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(conversion.config_entries, indent=2) + "\n", encoding="utf-8")
        write_safetensors(weights, conversion.tensors, conversion.metadata, on_tensor, overwrite=overwrite)


def _only_part(files: list[Checkpoint]) -> str:
    found = {part for file in files for part in find_parts(file)}
    if len(found) != 1:
        raise ValueError(
            f"{' and '.join(file.name for file in files)} does not fit Mochi: a transformer, an autoencoder or T5 can be "
            "converted; of several, choose one with --part."
        )
    return found.pop()


def _cast(checkpoint: Checkpoint, model: ModelSpec, dtype: torch.dtype | None) -> Checkpoint:
    """The tensors in the model's order; those that the model always keeps in float32 stay in their stored dtype."""

    def cast(name: str, tensor: LazyTensor) -> LazyTensor:
        if dtype is None and tensor.dtype.itemsize == 1:
            raise checkpoint.error(f"has {name} in 8 bits or fewer; choose its new dtype with --dtype.")
        exact = model.parameters[name].dtype != dtype and tensor.dtype.itemsize > 1
        target = tensor.dtype if dtype is None or exact else dtype
        return tensor.map(lambda value: value.to(target), dtype=target)

    return checkpoint.with_tensors({name: cast(name, checkpoint.tensors[name]) for name in model.parameters})


def _with_fp8(tensors: LazyStateDict) -> LazyStateDict:
    """Quantise the blocks' matrices to fp8, each with its scale and a note about its format, under ComfyUI's names."""

    @lru_cache(maxsize=1)
    def quantized(name: str) -> tuple[Tensor, Tensor]:
        return quantize_fp8(tensors[name].read())

    converted: LazyStateDict = {}
    for name, tensor in tensors.items():
        if not is_block_matrix(name, tensor):
            converted[name] = tensor
            continue
        layer, note = name.removesuffix("weight"), note_tensor({"format": "float8_e4m3fn"})
        converted[name] = replace(tensor, dtype=torch.float8_e4m3fn, read=lambda name=name: quantized(name)[0])
        converted[f"{layer}weight_scale"] = LazyTensor((), torch.float32, lambda name=name: quantized(name)[1])
        converted |= from_state_dict({layer + NOTE: note})
    return converted


def _to_diffusers(tensors: LazyStateDict, model: ModelSpec) -> LazyStateDict:
    config = model.config
    if isinstance(config, T5EncoderConfig | TinyVAEConfig):
        return tensors
    if isinstance(config, AsymmDiTConfig):
        return to_diffusers(tensors, transformer_rules(config.depth))
    if not all(halves(tensors).values()):
        raise ValueError("diffusers' autoencoder needs both halves; give both the encoder's and the decoder's file.")
    return to_diffusers(tensors, autoencoder_rules(config.encoder_blocks, config.decoder_blocks))


def _config_entries(model: ModelSpec) -> dict[str, Any]:
    config = model.config
    if isinstance(config, TinyVAEConfig):
        return {}  # no library defines a folder layout for it
    if isinstance(config, T5EncoderConfig):
        return {"architectures": ["T5EncoderModel"], "model_type": "t5", **hugging_face_entries(config)}
    return _dit_entries(config) if isinstance(config, AsymmDiTConfig) else _vae_entries(config)


def _dit_entries(config: AsymmDiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "MochiTransformer3DModel",
        "in_channels": config.in_channels,
        "patch_size": config.patch_size,
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "pooled_projection_dim": config.hidden_size_y,
        "text_embed_dim": config.text_width,
        "time_embed_dim": config.timestep_features,
    }


def _vae_entries(config: AsymmVAEConfig) -> dict[str, Any]:
    """diffusers lists the stages of both halves from the pixels to the latents."""
    return {
        "_class_name": "AutoencoderKLMochi",
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": config.encoder_channels,
        "decoder_block_out_channels": config.decoder_channels[::-1],
        "layers_per_block": config.encoder_blocks,
        "temporal_expansions": config.temporal_expansions[::-1],
        "spatial_expansions": config.spatial_expansions[::-1],
        "add_attention_block": config.encoder_attention,
    }
