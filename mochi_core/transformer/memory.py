"""Estimate the bytes that denoising takes besides the weights, from the sizes of the tensors alive at once."""

from __future__ import annotations

from ..config import MAX_TEXT_TOKENS, AsymmDiTConfig
from .layers import FEED_FORWARD_TOKEN_CHUNK

SMALL_TENSORS = 48 * 2**20
"""Bytes of float32 chunks, text streams and the rotary table, which do not grow with the video."""


def working_bytes(config: AsymmDiTConfig, num_tokens: int, itemsize: int, conditions: int = 2) -> int:
    """Peak bytes of a forward pass over `num_tokens` visual tokens, for `conditions` prompts in one pass.

    A block peaks either when it rearranges packed q, k and v to joint ones, with 7 tensors of the stream's width alive (the
    stream, 3 packed, 3 joint), or in the feed-forward: 3 of the stream's width, and 3 of the hidden width for a chunk of tokens.
    Each further condition holds its stream meanwhile. At 848x480 this is 0 to 10 % above what was measured with 77 text tokens:
    benchmarks/results/memory_cpu.md. Attention is assumed not to hold a tokens-by-tokens matrix.
    """
    tokens = num_tokens + MAX_TEXT_TOKENS
    stream = tokens * config.hidden_size_x
    hidden = min(tokens, FEED_FORWARD_TOKEN_CHUNK) * config.mlp_size_x
    block = max(7 * stream, 3 * stream + 3 * hidden)
    return (block + (conditions - 1) * stream) * itemsize + SMALL_TENSORS


def modulation_bytes(config: AsymmDiTConfig, steps: int, itemsize: int, conditions: int = 2) -> int:
    """Bytes of a schedule's precomputed modulation: scales and gates of all blocks and the final layer, for each prompt."""
    both, width = 4 * (config.hidden_size_x + config.hidden_size_y), config.hidden_size_x
    last = 4 * width + config.hidden_size_y
    return ((config.depth - 1) * both + last + 2 * width) * steps * itemsize * conditions
