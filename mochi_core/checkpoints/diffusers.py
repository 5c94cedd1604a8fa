"""diffusers' names for the tensors of Mochi, as tables that are read in both directions.

A rule pairs one canonical name with the foreign tensors that make it up: several are concatenated along their rows, and
`swap_halves` exchanges the two halves of the rows (diffusers keeps gate before value, and scale before shift).
`{i}` and `{j}` stand for numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .reader import StoredTensor, Tensors


@dataclass(frozen=True)
class Rule:
    canonical: str
    foreign: tuple[str, ...]
    swap_halves: bool = False


def _same(canonical: str, foreign: str, *suffixes: str, swap_halves: bool = False) -> list[Rule]:
    return [Rule(f"{canonical}.{suffix}", (f"{foreign}.{suffix}",), swap_halves) for suffix in suffixes]


WB = ("weight", "bias")
BLOCK, PEER_BLOCK = "blocks.{i}", "transformer_blocks.{i}"
ATTN, PEER_ATTN = BLOCK + ".attn", PEER_BLOCK + ".attn1"

TRANSFORMER_RULES: tuple[Rule, ...] = (
    Rule("pos_frequencies", ("pos_frequencies",)),
    *_same("x_embedder.proj", "patch_embed.proj", *WB),
    *_same("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1", *WB),
    *_same("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2", *WB),
    *(rule for name in ("to_kv", "to_q", "to_out")
      for rule in _same(f"t5_y_embedder.{name}", f"time_embed.pooler.{name}", *WB)),
    *_same("t5_yproj", "time_embed.caption_proj", *WB),
    *_same(f"{BLOCK}.mod_x", f"{PEER_BLOCK}.norm1.linear", *WB),
    # Two names for one thing: the last block's is called linear_1.
    *_same(f"{BLOCK}.mod_y", f"{PEER_BLOCK}.norm1_context.linear", *WB),
    *_same(f"{BLOCK}.mod_y", f"{PEER_BLOCK}.norm1_context.linear_1", *WB),
    Rule(f"{ATTN}.qkv_x.weight", tuple(f"{PEER_ATTN}.to_{name}.weight" for name in "qkv")),
    Rule(f"{ATTN}.qkv_y.weight", tuple(f"{PEER_ATTN}.add_{name}_proj.weight" for name in "qkv")),
    *_same(f"{ATTN}.q_norm_x", f"{PEER_ATTN}.norm_q", "weight"),
    *_same(f"{ATTN}.k_norm_x", f"{PEER_ATTN}.norm_k", "weight"),
    *_same(f"{ATTN}.q_norm_y", f"{PEER_ATTN}.norm_added_q", "weight"),
    *_same(f"{ATTN}.k_norm_y", f"{PEER_ATTN}.norm_added_k", "weight"),
    *_same(f"{ATTN}.proj_x", f"{PEER_ATTN}.to_out.0", *WB),
    *_same(f"{ATTN}.proj_y", f"{PEER_ATTN}.to_add_out", *WB),
    *_same(f"{BLOCK}.mlp_x.w1", f"{PEER_BLOCK}.ff.net.0.proj", "weight", swap_halves=True),
    *_same(f"{BLOCK}.mlp_x.w2", f"{PEER_BLOCK}.ff.net.2", "weight"),
    *_same(f"{BLOCK}.mlp_y.w1", f"{PEER_BLOCK}.ff_context.net.0.proj", "weight", swap_halves=True),
    *_same(f"{BLOCK}.mlp_y.w2", f"{PEER_BLOCK}.ff_context.net.2", "weight"),
    *_same("final_layer.mod", "norm_out.linear", *WB, swap_halves=True),
    *_same("final_layer.linear", "proj_out", *WB),
)  # fmt: skip


def _res_block(canonical: str, foreign: str) -> list[Rule]:
    parts = (("0", "norm1.norm_layer"), ("2", "conv1.conv"), ("3", "norm2.norm_layer"), ("5", "conv2.conv"))
    return [
        rule for index, name in parts for rule in _same(f"{canonical}.stack.{index}", foreign.format(part=name), *WB)
    ]


def _attention(canonical: str, place: str, index: str) -> list[Rule]:
    attention, block = f"{place}.attentions.{index}", f"{canonical}.attn_block"
    return [
        *_same(f"{block}.norm", f"{place}.norms.{index}.norm_layer", *WB),
        Rule(f"{block}.attn.qkv.weight", tuple(f"{attention}.to_{name}.weight" for name in "qkv")),
        *_same(f"{block}.attn.out", f"{attention}.to_out.0", *WB),
    ]


def autoencoder_rules(encoder_head: int, encoder_stages: int, decoder_stages: int) -> tuple[Rule, ...]:
    """Names of an autoencoder with so many residual blocks before, and stages after, the first layer.

    `{i+1}` means a number that is larger by one on the canonical side.
    """
    head, middle, tail = 1, 1 + encoder_head, 1 + encoder_head + encoder_stages
    decoder_tail = decoder_stages + 1
    return (
        *_same("decoder.blocks.0.0", "decoder.conv_in", *WB),
        *_res_block("decoder.blocks.0.{i+1}", "decoder.block_in.resnets.{{i}}.{part}"),
        *_res_block("decoder.blocks.{i+1}.blocks.{j}", "decoder.up_blocks.{{i}}.resnets.{{j}}.{part}"),
        *_same("decoder.blocks.{i+1}.proj", "decoder.up_blocks.{i}.proj", *WB),
        *_res_block(f"decoder.blocks.{decoder_tail}.{{i}}", "decoder.block_out.resnets.{{i}}.{part}"),
        *_same("decoder.output_proj", "decoder.proj_out", *WB),
        *_same("encoder.layers.0", "encoder.proj_in", *WB),
        *_res_block(f"encoder.layers.{{i+{head}}}", "encoder.block_in.resnets.{{i}}.{part}"),
        *_attention(f"encoder.layers.{{i+{head}}}", "encoder.block_in", "{i}"),
        *_same(f"encoder.layers.{{i+{middle}}}.layers.0", "encoder.down_blocks.{i}.conv_in.conv", *WB),
        *_res_block(f"encoder.layers.{{i+{middle}}}.layers.{{j+1}}", "encoder.down_blocks.{{i}}.resnets.{{j}}.{part}"),
        *_attention(f"encoder.layers.{{i+{middle}}}.layers.{{j+1}}", "encoder.down_blocks.{i}", "{j}"),
        *_res_block(f"encoder.layers.{{i+{tail}}}", "encoder.block_out.resnets.{{i}}.{part}"),
        *_attention(f"encoder.layers.{{i+{tail}}}", "encoder.block_out", "{i}"),
        *_same("encoder.output_norm", "encoder.norm_out.norm_layer", *WB),
        *_same("encoder.output_proj", "encoder.proj_out", "weight"),
    )


AUTOENCODER_RULES = autoencoder_rules(encoder_head=3, encoder_stages=3, decoder_stages=3)
NUMBER = re.compile(r"\{(\w)(?:\+(\d+))?\}")


def to_canonical(tensors: Tensors, rules: tuple[Rule, ...]) -> Tensors:
    """Rename, merge and swap diffusers' tensors; merging happens when a tensor is read.

    Raises:
        ValueError: names that no rule knows, or a merge of which a part is missing.
    """
    canonical: Tensors = {}
    used: set[str] = set()
    for rule in rules:
        pattern = _pattern(rule.foreign[0])
        for name in tensors:
            if match := pattern.fullmatch(name):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                parts = [_fill(part, numbers, foreign=True) for part in rule.foreign]
                _require(parts, tensors)
                merged = _concatenate([tensors[part] for part in parts])
                canonical[_fill(rule.canonical, numbers)] = _swap_halves(merged) if rule.swap_halves else merged
                used.update(parts)
    _refuse_unknown(set(tensors) - used)
    return canonical


def to_diffusers(tensors: Tensors, rules: tuple[Rule, ...]) -> Tensors:
    """The way back: canonical names to diffusers' names.

    Raises:
        ValueError: names that no rule knows.
    """
    foreign: Tensors = {}
    used: set[str] = set()
    last = max((int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.mod_y", name)), default=None)
    for rule in rules:
        pattern = _pattern(rule.canonical)
        for name, tensor in tensors.items():
            if name in used and ".mod_y." not in name:
                continue
            if not (match := pattern.fullmatch(name)):
                continue
            numbers = {key: int(value) - _offset(rule.canonical, key) for key, value in match.groupdict().items()}
            if min(numbers.values(), default=0) < 0:
                continue
            if ".mod_y." in name and (numbers["i"] == last) != ("linear_1" in rule.foreign[0]):
                continue
            if not _belongs(rule, numbers, tensors):
                continue
            used.add(name)
            source = _swap_halves(tensor) if rule.swap_halves else tensor
            parts = _split(source, len(rule.foreign))
            foreign |= {_fill(part, numbers, foreign=True): t for part, t in zip(rule.foreign, parts, strict=True)}
    _refuse_unknown(set(tensors) - used)
    return foreign


def _belongs(rule: Rule, numbers: dict[str, int], tensors: Tensors) -> bool:
    """Whether a numbered encoder layer lies before or after the down stages, as the rule says."""
    place = rule.foreign[0]
    if (".block_in." not in place and ".block_out." not in place) or not place.startswith("encoder."):
        return True
    index = int(_fill(rule.canonical, numbers).split(".")[2])
    stages = [int(name.split(".")[2]) for name in tensors if re.match(r"encoder\.layers\.\d+\.layers\.", name)]
    return index < min(stages, default=0) if ".block_in." in place else index > max(stages, default=0)


def _pattern(template: str) -> re.Pattern[str]:
    pieces = NUMBER.split(template)
    expression = "".join(
        re.escape(piece) if i % 3 == 0 else rf"(?P<{piece}>\d+)" for i, piece in enumerate(pieces) if i % 3 != 2
    )
    return re.compile(expression)


def _offset(template: str, key: str) -> int:
    return next(int(m[2] or 0) for m in NUMBER.finditer(template) if m[1] == key)


def _fill(template: str, numbers: dict[str, int], *, foreign: bool = False) -> str:
    def number(match: re.Match[str]) -> str:
        return str(numbers[match[1]] + (0 if foreign else int(match[2] or 0)))

    return NUMBER.sub(number, template)


def _concatenate(parts: list[StoredTensor]) -> StoredTensor:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return StoredTensor(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def _split(tensor: StoredTensor, count: int) -> list[StoredTensor]:
    if count == 1:
        return [tensor]
    shape = (tensor.shape[0] // count, *tensor.shape[1:])
    return [StoredTensor(shape, tensor.dtype, lambda i=i: tensor.read().chunk(count)[i]) for i in range(count)]


def _swap_halves(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(tensor.shape, tensor.dtype, lambda: torch.cat(tensor.read().chunk(2)[::-1]))


def _require(parts: list[str], tensors: Tensors) -> None:
    if missing := [part for part in parts if part not in tensors]:
        raise ValueError(
            f"The file lacks {', '.join(missing)}, without which {parts[0]} is of no use; download it again."
        )


def _refuse_unknown(names: set[str]) -> None:
    if names:
        some = ", ".join(sorted(names)[:8])
        raise ValueError(f"{len(names)} tensors have no place in Mochi, e.g. {some}; this is a file of another model.")
