"""The one attention contract, and the backends behind it. This is the only file of the core that names a backend.

`BACKENDS` says as data what each one needs. `choose_attention` gives the fastest exact one for a device ("auto"), or the one
asked for, or an error that says of each why it cannot be used.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> output; all (B, heads, length, head_dim); softmax(q k^T / sqrt(head_dim)) v, no mask."""

Dtypes = tuple[torch.dtype, ...]
HALF: Dtypes = (torch.float16, torch.bfloat16)
WIDE: Dtypes = (torch.float32, torch.float64)
PROBE_LENGTH = 128
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""PyTorch's own, all of them exact."""
SWITCHES = threading.Lock()
"""Which kernels PyTorch may use is a setting of the process: threads that change it take turns to call them."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention, which picks a kernel for the device."""
    return F.scaled_dot_product_attention(q, k, v)


def _kernels(*names: str, flash: Literal["FA3", "FA4"] | None = None) -> Attention:
    """`sdpa` with the first of these kernels that takes the tensors.

    `flash` is the implementation in PyTorch's registry that is flash attention then, and stays it in the process until
    another one is asked for: so PyTorch has it. None is its own.
    """
    order = [KERNELS[name] for name in names]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if torch.compiler.is_compiling() else SWITCHES:  # compilers know no locks
            if "flash" in names:
                _activate(flash)
            with sdpa_kernel(order, set_priority=True):
                return F.scaled_dot_product_attention(q, k, v)

    return attention


def _active() -> str | None:
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # PyTorch 2.11 or newer
    return current() if current else None


def _activate(implementation: Any) -> None:
    """Let PyTorch's flash attention be this one of its registry; None is its own."""
    if _active() == implementation:
        return
    if implementation is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(implementation)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    return sageattn(q, k, v, tensor_layout="HND")


@dataclass(frozen=True)
class Backend:
    """What runs, what it takes (kinds of device and their dtypes), and the module that has to be installed for it."""

    run: Attention
    takes: Mapping[str, Dtypes]
    package: str | None = None


BACKENDS = {
    "cudnn": Backend(_kernels("cudnn"), {"cuda": HALF}),
    "flash": Backend(_kernels("flash"), {"cuda": HALF, "cpu": HALF + WIDE}),
    "efficient": Backend(_kernels("efficient"), {"cuda": (*HALF, torch.float32)}),
    "math": Backend(_kernels("math"), {"cuda": HALF + WIDE, "cpu": HALF + WIDE}),
    "fa3": Backend(_kernels("flash", flash="FA3"), {"cuda": HALF}, "flash_attn_interface"),
    "fa4": Backend(_kernels("flash", flash="FA4"), {"cuda": HALF}, "flash_attn.cute"),
    "flash_attn": Backend(_flash_attn, {"cuda": HALF}, "flash_attn"),
    "sage": Backend(_sage, {"cuda": HALF}, "sageattention"),
}
"""All are exact but sage, which multiplies in 8 bits."""
ATTENTIONS = ("auto", *BACKENDS)

FLASH_FIRST = ("flash", "cudnn", "efficient", "math")
CUDNN_FIRST = ("cudnn", "flash", "efficient", "math")
CUDNN_IS_FASTEST_ON = (9, 10)
"""Major numbers of NVIDIA's compute capability: Hopper, and Blackwell in data centres."""


@dataclass(frozen=True)
class Choice:
    """An attention, what it is called and why it was taken."""

    run: Attention
    name: str
    reason: str


def choose_attention(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int = 128) -> Choice:
    """The attention for tensors like these that goes by `name`, one of `ATTENTIONS`.

    Raises:
        ValueError: there is none of that name, or it cannot be used here; says why, and the same of the others.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention is {name!r}; use one of {', '.join(ATTENTIONS)}.")
    like = torch.zeros(1, 1, PROBE_LENGTH, head_dim, device=device, dtype=dtype)
    if name == "auto":
        return _fastest(like)
    reason = refusal(name, like)
    if reason is None:
        return Choice(BACKENDS[name].run, name, "as asked for")
    others = "; ".join(f"{other}: {refusal(other, like) or 'can be used'}" for other in BACKENDS if other != name)
    raise ValueError(f"Attention {name} cannot be used: {reason}. Choose auto or another one ({others}).")


def _fastest(like: Tensor) -> Choice:
    if like.device.type != "cuda":
        return Choice(sdpa, "sdpa", f"PyTorch's own on {like.device.type}")
    architecture, _ = torch.cuda.get_device_capability(like.device)
    order = CUDNN_FIRST if architecture in CUDNN_IS_FASTEST_ON else FLASH_FIRST
    first = next(name for name in order if refusal(name, like) is None)
    # The others stay behind it, for a shape that it does not take.
    reason = f"exact, and by published figures the fastest on {torch.cuda.get_device_name(like.device)}"
    return Choice(_kernels(*order), first, reason)


def refusal(name: str, like: Tensor) -> str | None:
    """Why a backend cannot be used for tensors like this (B, heads, length, head_dim) one; None if it can."""
    backend, device = BACKENDS[name], like.device.type
    if backend.package is not None and not _installed(backend.package):
        return f"the package {backend.package} is not installed"
    if device not in backend.takes:
        return f"it runs on {' and '.join(backend.takes)}, not on {device}"
    if like.dtype not in backend.takes[device]:
        return f"it takes {' and '.join(map(str, backend.takes[device]))} on {device}, not {like.dtype}"
    return _failure(backend.run, like)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # of the package around it
        return False


def _failure(run: Attention, like: Tensor) -> str | None:
    """What an attempt raises, in one line; PyTorch's flash attention stays the one that it was."""
    active = _active()
    try:
        run(like, like, like)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        _activate(active)
    return None
