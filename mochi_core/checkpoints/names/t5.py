"""A T5 v1.1 encoder from its sizes alone: its tensors' names and shapes, and its configuration in Hugging Face's words."""

from __future__ import annotations

from typing import Any

from ...config import T5EncoderConfig
from ..tensors import LazyStateDict
from .detect import shape_of

ATTENTION, FEED_FORWARD = "encoder.block.{}.layer.0.SelfAttention", "encoder.block.{}.layer.1.DenseReluDense"
POSITION_BIAS = ATTENTION.format(0) + ".relative_attention_bias.weight"


def t5_config(tensors: LazyStateDict) -> T5EncoderConfig:
    """Read the sizes of an encoder from its canonical tensors; ValueError if they do not tell them."""
    vocabulary, width = shape_of(tensors, "shared.weight")
    buckets, heads = shape_of(tensors, POSITION_BIAS)
    return T5EncoderConfig(
        depth=sum(ATTENTION.format(i) + ".q.weight" in tensors for i in range(len(tensors))),
        width=width,
        num_heads=heads,
        head_dim=shape_of(tensors, ATTENTION.format(0) + ".q.weight")[0] // heads,
        mlp_size=shape_of(tensors, FEED_FORWARD.format(0) + ".wo.weight")[1],
        vocabulary=vocabulary,
        position_buckets=buckets,
    )


def t5_shapes(config: T5EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor of an encoder; the embedding is there once, as `shared.weight`."""
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
    """Entries of config.json, and arguments of transformers' T5Config."""
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
