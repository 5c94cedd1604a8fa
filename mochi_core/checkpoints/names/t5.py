"""A T5 v1.1 encoder: canonical names, shapes from its sizes, and its configuration in Hugging Face's terms."""

from __future__ import annotations

import re
from typing import Any

from ...config import T5EncoderConfig
from ..tensors import Checkpoint, LazyStateDict
from .sizes import check_depth, shape_of

ATTENTION, FEED_FORWARD = "encoder.block.{}.layer.0.SelfAttention", "encoder.block.{}.layer.1.DenseReluDense"
POSITION_BIAS = ATTENTION.format(0) + ".relative_attention_bias.weight"
# Names within a block in llama.cpp's GGUF files (gguf-py/gguf/constants.py), and Hugging Face's.
LLAMA_CPP_T5 = {
    "attn_norm": "0.layer_norm", "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    **{f"attn_{part}": f"0.SelfAttention.{part}" for part in "qkvo"},
    "ffn_norm": "1.layer_norm", "ffn_gate": "1.DenseReluDense.wi_0", "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}  # fmt: skip
# What files hold besides the encoder: the decoder of a full T5 under either naming, and what ComfyUI saves with a CLIP.
COMPANIONS = re.compile(
    r"decoder\.(block\.\d+\.layer|embed_tokens|final_layer_norm)\..*|lm_head\.weight|dec\.(blk\.\d+|output_norm)\..*"
    r"|output\.weight|logit_scale|text_projection(\.weight)?|spiece_model"
)

# In a T5, only the first block has position biases; in a umT5 (Wan's text encoder, with its own vocabulary), every block does.
UMT5 = re.compile(
    r"encoder\.block\.[1-9]\d*\.layer\.0\.SelfAttention\.relative_attention_bias\.weight|enc\.blk\.[1-9]\d*\.attn_rel_b\.weight"
)


def canonical_t5(tensors: LazyStateDict) -> LazyStateDict:
    """Rename to canonical names: files hold the token embedding under either or both of two names, and GGUF has its own names."""
    tensors = {_from_llama_cpp(name): tensor for name, tensor in tensors.items()}
    canonical = {name: tensor for name, tensor in tensors.items() if name != "encoder.embed_tokens.weight"}
    if "encoder.embed_tokens.weight" in tensors:
        canonical.setdefault("shared.weight", tensors["encoder.embed_tokens.weight"])
    return canonical


def _from_llama_cpp(name: str) -> str:
    names = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
    if (match := re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", name)) and match[2] in LLAMA_CPP_T5:
        return f"encoder.block.{match[1]}.layer.{LLAMA_CPP_T5[match[2]]}.weight"
    return names.get(name, name)


def t5_config(checkpoint: Checkpoint) -> T5EncoderConfig:
    """Read the sizes of an encoder from its canonical tensors; ValueError if they do not determine them."""
    tensors = checkpoint.tensors
    with checkpoint.named_errors():
        vocabulary, width = shape_of(tensors, "shared.weight")
        buckets, heads = shape_of(tensors, POSITION_BIAS)
        inner, _ = shape_of(tensors, ATTENTION.format(0) + ".q.weight")
        _, mlp_size = shape_of(tensors, FEED_FORWARD.format(0) + ".wo.weight")
        depth = check_depth(sum(ATTENTION.format(i) + ".q.weight" in tensors for i in range(len(tensors))))
    return T5EncoderConfig(
        depth=depth,
        width=width,
        num_heads=heads,
        head_dim=inner // heads,
        mlp_size=mlp_size,
        vocabulary=vocabulary,
        position_buckets=buckets,
    )


def t5_shapes(config: T5EncoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an encoder; the embedding occurs once, as `shared.weight`."""
    width, inner = config.width, config.num_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (config.vocabulary, width),
        "encoder.final_layer_norm.weight": (width,),
        POSITION_BIAS: (config.position_buckets, config.num_heads),
    }
    for i in range(config.depth):
        attention, feed_forward = ATTENTION.format(i), FEED_FORWARD.format(i)
        shapes |= {f"{attention}.{part}.weight": (inner, width) for part in "qkv"}
        shapes |= {f"{feed_forward}.{part}.weight": (config.mlp_size, width) for part in ("wi_0", "wi_1")}
        shapes |= {f"{attention}.o.weight": (width, inner), f"{feed_forward}.wo.weight": (width, config.mlp_size)}
        shapes |= {f"encoder.block.{i}.layer.{j}.layer_norm.weight": (width,) for j in range(2)}
    return shapes


def hugging_face_entries(config: T5EncoderConfig) -> dict[str, Any]:
    """Entries of config.json, which are also the arguments of transformers' T5Config."""
    return {
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_size,
        "num_layers": config.depth,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.position_buckets,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }
