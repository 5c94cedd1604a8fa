"""Which of the host's attention functions the denoiser calls."""

from __future__ import annotations

from collections.abc import Callable

import comfy.ldm.modules.attention as host
import comfy.model_management as mm
from comfy.cli_args import args


def attention_function() -> Callable:
    """The host's choice; on a CPU PyTorch's, unless the server was started with another one."""
    return host.attention_pytorch if _host_is_slow() else host.optimized_attention


def attention_reason() -> str:
    """The same, in words."""
    chosen = host.optimized_attention.__name__.removeprefix("attention_")
    return f"pytorch (faster on a CPU than {chosen})" if _host_is_slow() else f"{chosen} (the server's)"


def _host_is_slow() -> bool:
    """Without a flag the host takes sub-quadratic attention on a CPU, where PyTorch has a kernel as lean and faster."""
    asked = args.use_split_cross_attention or args.use_quad_cross_attention
    return mm.cpu_mode() and host.optimized_attention is host.attention_sub_quad and not asked
