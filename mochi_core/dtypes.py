"""Short names of floating-point dtypes, as users type and read them."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's short name, such as bf16, or PyTorch's, such as float8_e4m3fn, if it has none."""
    return SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))
