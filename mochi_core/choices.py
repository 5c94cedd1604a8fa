"""Option values, and checks that need nothing else, so that arguments are parsed before PyTorch is imported."""

from __future__ import annotations

import math

DTYPE_NAMES = ("fp32", "bf16", "fp16")
ATTENTIONS = ("auto", "cudnn", "flash", "efficient", "math", "fa3", "fa4", "flash_attn", "sage")
QUANTIZER_NAMES = ("fp8", "fp8_rowwise", "int8", "q4_0")
FRAME_LEVELS = ("auto", "on", "off")
CACHE_METHODS = ("teacache", "first_block")
PART_NAMES = ("transformer", "vae", "t5", "tiny_vae")
LAYOUTS = ("canonical", "diffusers")
KEEP, FP8_SCALED = "keep", "fp8_scaled"
TARGET_DTYPE_NAMES = (KEEP, *DTYPE_NAMES, FP8_SCALED)


def check_cache(method: str, threshold: float) -> None:
    """Raise a ValueError if the cache method is unknown, or the threshold is not finite or is below 0."""
    if method not in CACHE_METHODS:
        raise ValueError(f"The cache method is {method!r}; use one of {', '.join(CACHE_METHODS)}.")
    if not 0 <= threshold < math.inf:
        raise ValueError(f"The cache threshold is {threshold}; use 0 (off) or more, such as 0.06.")
