"""Conversion of old widget values: a new value, and the end of a sentence about it if its meaning changes.

Every function takes the old value and all old values of the node by name.
"""

from __future__ import annotations

import os
import re

Adapted = tuple[object, str]
"""The new value and a remark; "" if there is nothing to say."""

WEIGHT_DTYPES = {
    "default": "auto",
    **{name: name for name in ("fp32", "bf16", "fp16", "fp8_e4m3fn")},
    "fp8_e4m3fn_fast": "fp8_e4m3fn",
    "fp8_e5m2": "fp8_e4m3fn",
}
WEIGHT_DTYPE_REASONS = {
    "fp8_e4m3fn_fast": "products are computed in 16 bits",
    "fp8_e5m2": "it is as small, and rounds less",
}
NO_SUCH_PRECISION = "the loader has no such precision"


def weight_dtype(old: object, values: dict[str, object]) -> Adapted:
    """Precision of the transformer's weights. GGUF files are loaded as they are, whatever the old node specified."""
    if any("gguf" in str(value).lower() for value in values.values()):
        return "auto", ""
    if str(old) not in WEIGHT_DTYPES:
        return "auto", NO_SUCH_PRECISION
    return WEIGHT_DTYPES[str(old)], WEIGHT_DTYPE_REASONS.get(str(old), "")


def vae_dtype(old: object, _: dict[str, object]) -> Adapted:
    """Precision of the autoencoder."""
    return (old, "") if old in ("fp32", "bf16", "fp16") else ("auto", NO_SUCH_PRECISION)


def at_most_1(old: object, _: dict[str, object]) -> Adapted:
    """A share that old nodes allow to exceed 1."""
    return (1.0, "more goes beyond what it aims at") if isinstance(old, int | float) and old > 1 else (old, "")


def pull(old: object, values: dict[str, object]) -> Adapted:
    """The pull of a resampler; there is none if its steps end before they begin."""
    start, end = values["start_step"], values["end_step"]
    if isinstance(start, int) and isinstance(end, int) and end <= start:
        return 0.0, "its steps ended before they began"
    return at_most_1(old, values)


def local_file(old: object, _: dict[str, object]) -> Adapted:
    """A file's name with this system's path separator: the workflow may have been saved on another system."""
    return re.sub(r"[\\/]", re.escape(os.sep), str(old)), ""


def in_mochi_folder(old: object, _: dict[str, object]) -> Adapted:
    """A file's name in the folder `mochi` of the model folder, where the wrapper's downloading loader put files."""
    return f"mochi{os.sep}{old}", ""


def empty_is_nothing(old: object, _: dict[str, object]) -> Adapted:
    """A prompt, and a remark if it is empty: Genmo's code then has no tokens, other encoders have the end token."""
    return old, "" if old else "an empty prompt now means no text at all, as in Genmo's code; it was one end token"


def plain_text(old: object, values: dict[str, object]) -> Adapted:
    """A prompt of ComfyUI's encoder, and a remark if it weights words with brackets, such as (red:1.2)."""
    if not old:
        return empty_is_nothing(old, values)
    weighted = re.search(r"\(.+:\s*[\d.]+\)", str(old), re.DOTALL)
    return old, "brackets are text for T5 Encode, no weights" if weighted else ""
