"""One console line for every model: what was chosen for this machine, and why."""

from __future__ import annotations

import logging

import torch

from ...mochi_core import kernels
from ...mochi_core.checkpoints import Checkpoint
from ...mochi_core.dtypes import dtype_name


def log_choice(model: str, *choices: str) -> None:
    """Log in one line what was chosen for a model or a decode."""
    logging.info("Mochi %s: %s.", model, "; ".join(choices))


def stored_name(checkpoint: Checkpoint) -> str:
    """The stored dtype or block type of most weights of a file: bf16, float8_e4m3fn, Q4_0 ..."""
    dtype, block_type = checkpoint.main_dtype()
    return block_type or dtype_name(dtype)


def weights_choice(stored: str, held: str, asked: bool, device: torch.device) -> str:
    """`stored` is the file's format, `held` the one in memory; `asked` if the user chose it."""
    if asked:
        return f"weights {held}, as requested"
    return f"weights {held}, as in the file" if held == stored else f"weights {held}, which suits {device} best"


def arithmetic_choice(compute: torch.dtype, device: torch.device) -> str:
    return f"arithmetic {dtype_name(compute)} on {device}"


def kernels_choice(device: torch.device, dtype: torch.dtype) -> str:
    """The kernels used between matrix products, and why not the fused ones."""
    reason = kernels.reason(device, dtype)
    return "kernels fused (Triton)" if reason is None else f"kernels plain ({reason})"
