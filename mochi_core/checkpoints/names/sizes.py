"""Infer configurations from canonical tensors: every size is read from a shape or counted from names."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from ...config import AsymmDiTConfig, AsymmVAEConfig
from ..limits import MAX_BLOCKS
from ..tensors import LazyStateDict


def dit_config(tensors: LazyStateDict) -> AsymmDiTConfig:
    """Read the sizes of a denoiser from its canonical tensors."""
    dx, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    dy, text_width = shape_of(tensors, "t5_yproj.weight")
    mlp_size_y = shape_of(tensors, "blocks.0.mlp_y.w2.weight")[1] if "blocks.0.mlp_y.w2.weight" in tensors else 0
    return AsymmDiTConfig(
        depth=check_depth(count_numbers(tensors, r"blocks\.(\d+)\..*")),
        hidden_size_x=dx,
        hidden_size_y=dy,
        num_heads=shape_of(tensors, "pos_frequencies", 3)[1],
        in_channels=channels,
        patch_size=patch,
        text_width=text_width,
        mlp_size_x=shape_of(tensors, "blocks.0.mlp_x.w2.weight")[1],
        mlp_size_y=mlp_size_y,
        timestep_features=shape_of(tensors, "t_embedder.mlp.0.weight")[1],
    )


def vae_config(tensors: LazyStateDict) -> AsymmVAEConfig:
    """Read the sizes of an autoencoder from its canonical tensors; a missing half keeps the defaults."""
    found = halves(tensors)
    encoder = _encoder_sizes(tensors) if found["encoder"] else {}
    decoder = _decoder_sizes(tensors) if found["decoder"] else {}
    check_depth(sum(encoder.get("encoder_blocks", ())) + sum(decoder.get("decoder_blocks", ())))
    return AsymmVAEConfig(**encoder, **decoder)


def halves(tensors: LazyStateDict) -> dict[str, bool]:
    """Whether an autoencoder's canonical tensors hold an "encoder" and a "decoder"."""
    return {half: any(name.startswith(f"{half}.") for name in tensors) for half in ("encoder", "decoder")}


def _decoder_sizes(tensors: LazyStateDict) -> dict[str, Any]:
    """Sizes of the decoder: every stage doubles height and width; the rest of a projection's growth is its temporal expansion."""
    stages = count_numbers(tensors, r"decoder\.blocks\.(\d+)\.proj\.weight")
    projections = [shape_of(tensors, f"decoder.blocks.{i + 1}.proj.weight") for i in range(stages)]
    widths = (*(columns for _, columns in projections), shape_of(tensors, "decoder.output_proj.weight")[1])
    inside = count_by_place(tensors, r"decoder\.blocks\.(\d+)\.blocks\.(\d+)\..*")
    counts = [inside[str(i + 1)] for i in range(stages)]
    head = count_numbers(tensors, r"decoder\.blocks\.0\.(\d+)\..*") - 1
    tail = count_numbers(tensors, rf"decoder\.blocks\.{stages + 1}\.(\d+)\..*")
    return {
        "decoder_channels": widths,
        "decoder_blocks": (head, *counts, tail),
        "temporal_expansions": tuple(rows // (4 * w) for (rows, _), w in zip(projections, widths[1:], strict=True)),
        "spatial_expansions": (2,) * stages,
    }


def _encoder_sizes(tensors: LazyStateDict) -> dict[str, Any]:
    stage_of = re.compile(r"encoder\.layers\.(\d+)\.layers\.0\.weight")
    stages = sorted(int(m[1]) for name in tensors if (m := stage_of.fullmatch(name)))
    total = count_numbers(tensors, r"encoder\.layers\.(\d+)\..*")
    convs = [shape_of(tensors, f"encoder.layers.{i}.layers.0.weight", 5) for i in stages]
    if stages and stages[-1] >= total:
        raise ValueError(f"it has encoder.layers.{stages[-1]}, but not the layers before it; download it again.")
    layers = count_by_place(tensors, r"encoder\.layers\.(\d+)\.layers\.(\d+)\..*")
    inside = [layers[str(i)] - 1 for i in stages]
    head, tail = (stages[0] - 1, total - stages[-1] - 1) if stages else (total - 1, 0)
    places = ["1", *(f"{i}.layers.1" for i in stages), str(total - 1)]
    return {
        "encoder_channels": (shape_of(tensors, "encoder.layers.0.weight")[0], *(conv[0] for conv in convs)),
        "encoder_blocks": (head, *inside, tail),
        "encoder_attention": tuple(f"encoder.layers.{p}.attn_block.norm.weight" in tensors for p in places),
        "temporal_reductions": tuple(conv[2] for conv in convs),
        "spatial_reductions": tuple(conv[3] for conv in convs),
    }


def shape_of(tensors: LazyStateDict, name: str, axes: int = 2) -> tuple[int, ...]:
    """The shape of a tensor; ValueError unless it exists with `axes` axes, none of them empty."""
    if name not in tensors:
        raise ValueError(f"it lacks {name}, which is needed to determine its size; download it again.")
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise ValueError(f"{name} is {shape}, but needs {axes} axes of at least 1; download it again.")
    return shape


def count_numbers(tensors: LazyStateDict, pattern: str) -> int:
    """Count the distinct numbers that the pattern's group matches in the names."""
    return len({match[1] for name in tensors if (match := re.fullmatch(pattern, name))})


def count_by_place(tensors: LazyStateDict, pattern: str) -> Counter[str]:
    """Count the distinct numbers that the pattern's second group matches, for each match of its first."""
    found = {match.groups() for name in tensors if (match := re.fullmatch(pattern, name))}
    return Counter(place for place, _ in found)


def check_depth(blocks: int) -> int:
    """Return the number of blocks; ValueError if no real model has so many, before a model is built from it."""
    if blocks > MAX_BLOCKS:
        raise ValueError(f"it has {blocks:,} blocks; at most {MAX_BLOCKS} are allowed.")
    return blocks
