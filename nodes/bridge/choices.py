"""One console line for every model: what was chosen for this machine, and why."""

from __future__ import annotations

import logging
import math
from collections import Counter

import torch

from ...mochi_core.checkpoints import LazyStateDict

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def log_choice(model: str, *choices: str) -> None:
    """Log what was chosen for a model, or for a decode, in one line."""
    logging.info("Mochi %s: %s.", model, "; ".join(choices))


def dtype_name(dtype: torch.dtype) -> str:
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))


def stored_form(tensors: LazyStateDict) -> str:
    """What most of the weights of a file are in: bf16, float8_e4m3fn, Q4_0 ..."""
    sizes = Counter[str]()
    for tensor in tensors.values():
        sizes[tensor.block_type or dtype_name(tensor.dtype)] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0]


def weights_choice(stored: str, held: str, asked: bool, device: torch.device) -> str:
    """`stored` is what the file holds, `held` what is kept in memory; `asked` if a person chose it."""
    if asked:
        return f"weights {held}, as asked for"
    return f"weights {held}, as in the file" if held == stored else f"weights {held}, which suits {device} best"


def arithmetic_choice(compute: torch.dtype, device: torch.device) -> str:
    return f"arithmetic {dtype_name(compute)} on {device}"
