"""The one attention contract. This is the only file of the core that names a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> output; all (B, heads, length, head_dim); softmax(q k^T / sqrt(head_dim)) v, no mask."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention, which picks a kernel for the device."""
    return F.scaled_dot_product_attention(q, k, v)
