"""Memory that the models in a file would need on a device, from its header alone."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..autoencoder.memory import decoder_memory_estimate
from ..autoencoder.plan import CPU, Plan, free_memory
from ..checkpoints import (
    Checkpoint,
    LazyStateDict,
    check_fit,
    describe,
    open_checkpoint,
    quantize_block_matrices,
    select_part,
)
from ..checkpoints.loading import model_spec
from ..checkpoints.names.detect import find_parts
from ..checkpoints.names.sizes import halves
from ..config import AsymmDiTConfig, AsymmVAEConfig
from ..dtypes import SHORT_NAMES, dtype_name
from ..geometry import VideoSize
from ..quantization.weights import QUANTIZERS
from ..transformer.memory import modulation_bytes, working_bytes
from .attempt import attempt

LENGTHS = (25, 85, 163)
"""Numbers of 848x480 frames for which needs are reported."""
STEPS = 64
SAMPLE_ROWS = 16  # fp8 needs multiples of 16
MODULATOR = re.compile(r"blocks\.\d+\.mod_[xy]\..*")
BLOCK = re.compile(r"blocks\.(\d+)\..*")
RESIDENT, OFFLOAD, STREAM = "resident", "offload=True", 'offload="stream"'


def file_needs(path: str | Path, device: torch.device) -> dict[str, Any]:
    """What a file or folder holds, and what each model in it would need on `device`.

    Raises:
        FileNotFoundError, ValueError: see `open_checkpoint`.
    """
    file = open_checkpoint(path)
    found: dict[str, Any] = {"is": describe(file)}
    for part in find_parts(file):
        found[part] = attempt(lambda part=part: NEEDS[part](select_part(file, part), device))
    return found


def transformer_needs(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """Weights under each offloading mode, and for each length the working memory of a guided run and the first mode that fits.

    Weights not quantised in the file are counted in bf16. `plan` is None where no mode fits in free memory.
    """
    spec = model_spec(checkpoint, "transformer")
    check_fit(spec.parameters, checkpoint)
    assert isinstance(spec.config, AsymmDiTConfig)
    weights, free = offload_bytes(checkpoint.tensors), free_memory(device)
    ways = [RESIDENT] if device == CPU else list(weights)
    lengths = {}
    for frames in LENGTHS:
        tokens = VideoSize(num_frames=frames).num_tokens
        working = working_bytes(spec.config, tokens, 2) + modulation_bytes(spec.config, STEPS, 2)
        plan = next((way for way in ways if weights[way] + working <= free), None)
        lengths[str(frames)] = {"working_bytes": working, "plan": plan}
    return {"dtype": "bf16", "weights": weights, "frames": lengths}


def offload_bytes(tensors: LazyStateDict) -> dict[str, int]:
    """Bytes of a denoiser's weights on the device at once, by offloading mode, as in `transformer.offload`."""
    size = {name: held_bytes({name: tensor}, 2) for name, tensor in tensors.items()}
    kept = {name: count for name, count in size.items() if not MODULATOR.fullmatch(name)}
    blocks: dict[str, int] = {}
    for name, count in kept.items():
        if match := BLOCK.fullmatch(name):
            blocks[match[1]] = blocks.get(match[1], 0) + count
    outside = sum(kept.values()) - sum(blocks.values())
    two_blocks = sum(sorted(blocks.values())[-2:])
    return {RESIDENT: sum(size.values()), OFFLOAD: sum(kept.values()), STREAM: outside + two_blocks}


def vae_needs(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """Weights, and for each length the video's bytes; the decode's own memory depends on its plan, not on the length."""
    spec = model_spec(checkpoint, "vae")
    check_fit(spec.parameters, checkpoint)
    assert isinstance(spec.config, AsymmVAEConfig)
    stored, _ = checkpoint.main_dtype()
    dtype = stored if stored in SHORT_NAMES else torch.bfloat16
    found: dict[str, Any] = {"dtype": dtype_name(dtype), "weights": held_bytes(checkpoint.tensors, dtype.itemsize)}
    if not halves(checkpoint.tensors)["decoder"]:
        return found
    size = VideoSize()
    *_, height, width = size.latent_shape()
    estimate = decoder_memory_estimate(spec.config, height, width, dtype.itemsize)
    plan = estimate.choose_plan(free_memory(device), device)
    video = {str(frames): 3 * frames * size.height * size.width * dtype.itemsize for frames in LENGTHS}
    return found | {
        "decode": {
            "working_bytes": estimate.peak_bytes(plan),
            "least_bytes": estimate.peak_bytes(Plan(device, CPU, 1)),
            "working_set": plan.working_set,
            "caches_on": str(plan.cache_device),
        },
        "video_bytes": video,
    }


def t5_needs(checkpoint: Checkpoint, _: torch.device) -> dict[str, Any]:
    """Weights as stored, and in float32, as Genmo runs them."""
    check_fit(model_spec(checkpoint, "t5").parameters, checkpoint)
    stored, _block_type = checkpoint.main_dtype()
    as_stored = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    return {"dtype": dtype_name(stored), "weights": as_stored, "weights_fp32": held_bytes(checkpoint.tensors, 4)}


def tiny_vae_needs(checkpoint: Checkpoint, _: torch.device) -> dict[str, Any]:
    """Weights as stored."""
    check_fit(model_spec(checkpoint, "tiny_vae").parameters, checkpoint)
    stored, _block_type = checkpoint.main_dtype()
    weights = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    return {"dtype": dtype_name(stored), "weights": weights}


def loaded_bytes(checkpoint: Checkpoint, itemsize: int, quantize: str | None = None) -> int:
    """Bytes of a denoiser's weights if its file is loaded with `quantize`, as in `load_transformer`; see `held_bytes`."""
    stored, loaded = checkpoint.tensors, quantize_block_matrices(checkpoint, quantize).tensors
    changed = {name for name, tensor in stored.items() if tensor.quantized is None and loaded[name].quantized}
    left = held_bytes({name: tensor for name, tensor in stored.items() if name not in changed}, itemsize)
    return left + sum(quantized_bytes(stored[name].shape, quantize) for name in changed if quantize)


@cache
def quantized_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a matrix (rows, columns) quantised with one of `QUANTIZERS`, including scales."""
    rows, columns = shape
    some = QUANTIZERS[kind](torch.zeros(SAMPLE_ROWS, columns))
    tensors = [some.values] if some.scale is None else [some.values, some.scale]
    return rows * sum(tensor.nbytes for tensor in tensors) // SAMPLE_ROWS


def held_bytes(tensors: LazyStateDict, itemsize: int) -> int:
    """Bytes in memory: quantised matrices as stored, everything else at `itemsize` bytes per value."""
    return sum(
        tensor.num_bytes if tensor.quantized and len(tensor.shape) == 2 else math.prod(tensor.shape) * itemsize
        for tensor in tensors.values()
    )


NEEDS = {"transformer": transformer_needs, "vae": vae_needs, "t5": t5_needs, "tiny_vae": tiny_vae_needs}
