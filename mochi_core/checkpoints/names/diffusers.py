"""diffusers' names for Mochi's tensors, as tables that are used in both directions.

A rule pairs a canonical name with the diffusers tensors that make it up: several are concatenated along their rows, and
`swap_halves` swaps the two halves of the rows (diffusers puts gate after value, and scale before shift). Names as in diffusers'
models/transformers/transformer_mochi.py and models/autoencoders/autoencoder_kl_mochi.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...quantization.weights import QuantizedWeight
from ...shown import shown_names
from ..tensors import LazyStateDict, LazyTensor


@dataclass(frozen=True)
class NameRule:
    """The canonical name of a tensor, and the names of the diffusers tensors that make it up."""

    canonical: str
    foreign: tuple[str, ...]
    swap_halves: bool = False


Rules = list[NameRule]


def transformer_rules(depth: int) -> Rules:
    """Rules for a denoiser of `depth` blocks."""
    return [
        NameRule("pos_frequencies", ("pos_frequencies",)),
        *_layer("x_embedder.proj", "patch_embed.proj"),
        *_layer("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
        *_layer("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
        *_layer("t5_y_embedder.to_kv", "time_embed.pooler.to_kv"),
        *_layer("t5_y_embedder.to_q", "time_embed.pooler.to_q"),
        *_layer("t5_y_embedder.to_out", "time_embed.pooler.to_out"),
        *_layer("t5_yproj", "time_embed.caption_proj"),
        *(rule for i in range(depth) for rule in _block(i, is_last=i == depth - 1)),
        *_layer("final_layer.mod", "norm_out.linear", swap_halves=True),
        *_layer("final_layer.linear", "proj_out"),
    ]


def _block(i: int, *, is_last: bool) -> Rules:
    ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
    attn, attn1 = f"{ours}.attn", f"{theirs}.attn1"
    return [
        *_layer(f"{ours}.mod_x", f"{theirs}.norm1.linear"),
        *_layer(f"{ours}.mod_y", f"{theirs}.norm1_context.linear" + ("_1" if is_last else "")),
        NameRule(f"{attn}.qkv_x.weight", tuple(f"{attn1}.to_{part}.weight" for part in "qkv")),
        NameRule(f"{attn}.qkv_y.weight", tuple(f"{attn1}.add_{part}_proj.weight" for part in "qkv")),
        *_layer(f"{attn}.q_norm_x", f"{attn1}.norm_q"),
        *_layer(f"{attn}.k_norm_x", f"{attn1}.norm_k"),
        *_layer(f"{attn}.q_norm_y", f"{attn1}.norm_added_q"),
        *_layer(f"{attn}.k_norm_y", f"{attn1}.norm_added_k"),
        *_layer(f"{attn}.proj_x", f"{attn1}.to_out.0"),
        *_layer(f"{attn}.proj_y", f"{attn1}.to_add_out"),
        *_layer(f"{ours}.mlp_x.w1", f"{theirs}.ff.net.0.proj", swap_halves=True),
        *_layer(f"{ours}.mlp_x.w2", f"{theirs}.ff.net.2"),
        *_layer(f"{ours}.mlp_y.w1", f"{theirs}.ff_context.net.0.proj", swap_halves=True),
        *_layer(f"{ours}.mlp_y.w2", f"{theirs}.ff_context.net.2"),
    ]


def autoencoder_rules(encoder_blocks: tuple[int, ...], decoder_blocks: tuple[int, ...]) -> Rules:
    """Rules for an autoencoder, given its residual blocks before, in and after its stages (see `AsymmVAEConfig`)."""
    return [*_decoder(*decoder_blocks), *_encoder(*encoder_blocks)]


def _decoder(head: int, *rest: int) -> Rules:
    *stages, tail = rest
    return [
        *_layer("decoder.blocks.0.0", "decoder.conv_in"),
        *_res_blocks("decoder.blocks.0.{}", 1, "decoder.block_in", head),
        *(
            rule
            for i, count in enumerate(stages)
            for rule in (
                *_res_blocks(f"decoder.blocks.{i + 1}.blocks.{{}}", 0, f"decoder.up_blocks.{i}", count),
                *_layer(f"decoder.blocks.{i + 1}.proj", f"decoder.up_blocks.{i}.proj"),
            )
        ),
        *_res_blocks(f"decoder.blocks.{len(stages) + 1}.{{}}", 0, "decoder.block_out", tail),
        *_layer("decoder.output_proj", "decoder.proj_out"),
    ]


def _encoder(head: int, *rest: int) -> Rules:
    *stages, tail = rest
    return [
        *_layer("encoder.layers.0", "encoder.proj_in"),
        *_res_blocks("encoder.layers.{}", 1, "encoder.block_in", head),
        *(
            rule
            for i, count in enumerate(stages)
            for rule in (
                *_layer(f"encoder.layers.{1 + head + i}.layers.0", f"encoder.down_blocks.{i}.conv_in.conv"),
                *_res_blocks(f"encoder.layers.{1 + head + i}.layers.{{}}", 1, f"encoder.down_blocks.{i}", count),
            )
        ),
        *_res_blocks("encoder.layers.{}", 1 + head + len(stages), "encoder.block_out", tail),
        *_layer("encoder.output_norm", "encoder.norm_out.norm_layer"),
        *_layer("encoder.output_proj", "encoder.proj_out"),
    ]


def _res_blocks(canonical: str, first: int, place: str, count: int) -> Rules:
    return [rule for j in range(count) for rule in _res_block(canonical.format(first + j), place, j)]


def _res_block(block: str, place: str, j: int) -> Rules:
    resnet, attention = f"{place}.resnets.{j}", f"{place}.attentions.{j}"
    return [
        *_layer(f"{block}.stack.0", f"{resnet}.norm1.norm_layer"),
        *_layer(f"{block}.stack.2", f"{resnet}.conv1.conv"),
        *_layer(f"{block}.stack.3", f"{resnet}.norm2.norm_layer"),
        *_layer(f"{block}.stack.5", f"{resnet}.conv2.conv"),
        *_layer(f"{block}.attn_block.norm", f"{place}.norms.{j}.norm_layer"),
        NameRule(f"{block}.attn_block.attn.qkv.weight", tuple(f"{attention}.to_{part}.weight" for part in "qkv")),
        *_layer(f"{block}.attn_block.attn.out", f"{attention}.to_out.0"),
    ]


def _layer(canonical: str, foreign: str, *, swap_halves: bool = False) -> Rules:
    return [NameRule(f"{canonical}.{kind}", (f"{foreign}.{kind}",), swap_halves) for kind in ("weight", "bias")]


def to_canonical(tensors: LazyStateDict, rules: Rules) -> LazyStateDict:
    """Rename, merge and swap diffusers' tensors; tensors are merged when they are read.

    A rule is skipped if none of its tensors occur: not every layer has a bias, attention or a text stream.

    Raises:
        ValueError: a name matches no rule, a tensor to be merged is missing, or tensors to be merged differ in shape.
    """
    canonical: LazyStateDict = {}
    for rule in rules:
        parts = [tensors[name] for name in rule.foreign if name in tensors]
        if parts and len(parts) < len(rule.foreign):
            missing = ", ".join(name for name in rule.foreign if name not in tensors)
            raise ValueError(f"it lacks {missing}, a part of {rule.canonical}; download it again.")
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"{', '.join(rule.foreign)} differ in shape; download it again.")
        if parts:
            merged = _concatenate(parts)
            canonical[rule.canonical] = _map_rows(merged, swapped_halves) if rule.swap_halves else merged
    _refuse_unknown(set(tensors) - {name for rule in rules for name in rule.foreign})
    return canonical


def to_diffusers(tensors: LazyStateDict, rules: Rules) -> LazyStateDict:
    """The inverse of `to_canonical`: canonical names to diffusers' names.

    Raises:
        ValueError: a name matches no rule.
    """
    foreign: LazyStateDict = {}
    for rule in rules:
        if rule.canonical in tensors:
            source = tensors[rule.canonical]
            parts = _split(_map_rows(source, swapped_halves) if rule.swap_halves else source, len(rule.foreign))
            foreign.update(zip(rule.foreign, parts, strict=True))
    _refuse_unknown(set(tensors) - {rule.canonical for rule in rules})
    return foreign


def swapped_halves(tensor: Tensor) -> Tensor:
    """(rows, ...) with the second half of the rows first."""
    return torch.cat(tensor.chunk(2)[::-1])


def _concatenate(parts: list[LazyTensor]) -> LazyTensor:
    """Concatenate several tensors along their rows; quantised weights of one stored dtype stay quantised."""
    if len(parts) == 1:
        return parts[0]
    readers = [part.quantized for part in parts if part.quantized is not None]
    same_form = len(readers) == len(parts) and len({part.stored_dtype for part in parts}) == 1
    return replace(
        parts[0],
        shape=(sum(part.shape[0] for part in parts), *parts[0].shape[1:]),
        read=lambda: torch.cat([part.read() for part in parts]),
        quantized=(lambda: _arrange_rows([read() for read in readers], torch.cat)) if same_form else None,
    )


def _split(tensor: LazyTensor, count: int) -> list[LazyTensor]:
    if count == 1:
        return [tensor]
    return [_map_rows(tensor, lambda t, i=i: t.chunk(count)[i], count) for i in range(count)]


def _map_rows(tensor: LazyTensor, change: Callable[[Tensor], Tensor], parts: int = 1) -> LazyTensor:
    """Apply `change` to a tensor's rows, keeping 1/`parts` of them; a quantised weight stays quantised."""
    shape = (tensor.shape[0] // parts, *tensor.shape[1:])
    return tensor.map(change, lambda weight: _arrange_rows([weight], lambda t: change(t[0])), shape=shape)


def _arrange_rows(weights: list[QuantizedWeight], arrange: Callable[[list[Tensor]], Tensor]) -> QuantizedWeight:
    """Combine quantised weights of one stored dtype by applying `arrange` to their values and to their scales."""
    scaled = any(weight.scale is not None for weight in weights)
    return replace(
        weights[0],
        values=arrange([weight.values for weight in weights]),
        scale=arrange([weight.scale_per_row() for weight in weights]) if scaled else None,
        input_scale=weights[0].input_scale if len(weights) == 1 else None,  # several cannot share one divisor
        exact_product=all(weight.exact_product for weight in weights),
        fp8_product=all(weight.fp8_product for weight in weights),
    )


def _refuse_unknown(names: set[str]) -> None:
    if names:
        some = shown_names(sorted(names))
        raise ValueError(f"{len(names)} tensors do not belong to it, e.g. {some}; this is a file of another model.")
