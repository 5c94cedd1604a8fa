"""Attention functions for the denoiser, and their backends. No other file of the core names a backend.

`BACKENDS` lists what each backend needs. `choose_attention` returns the fastest exact one for a device ("auto") or the one
requested, or raises an error that says why it cannot be used and which others can.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> output; all (B, heads, length, head_dim); softmax(q k^T / sqrt(head_dim)) v, no mask."""

Dtypes = tuple[torch.dtype, ...]
HALF: Dtypes = (torch.float16, torch.bfloat16)
FULL_PRECISION: Dtypes = (torch.float32, torch.float64)
PROBE_LENGTH = 128
"""Length of the tensors with which backends are probed."""
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""PyTorch's own kernels, all exact."""
_SDP_LOCK = threading.Lock()
"""Held while PyTorch's setting of allowed kernels is changed and used, because it is shared by all threads of the process."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention, which picks a kernel for the device."""
    return F.scaled_dot_product_attention(q, k, v)


def _kernels(*names: str, flash: Literal["FA3", "FA4"] | None = None) -> Attention:
    """`sdpa` with the first of these kernels that supports the tensors.

    `flash` is the implementation in PyTorch's registry to use for flash attention; None is PyTorch's own. PyTorch keeps it
    for the whole process until another one is activated.
    """
    order = [KERNELS[name] for name in names]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if torch.compiler.is_compiling() else _SDP_LOCK:  # compilers do not support locks
            if "flash" in names:
                _activate(flash)
            with sdpa_kernel(order, set_priority=True):
                return F.scaled_dot_product_attention(q, k, v)

    return attend


def _active() -> str | None:
    """The implementation in its registry that PyTorch uses for flash attention; None is its own."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # PyTorch 2.11 or newer
    return current() if current else None


def _activate(implementation: str | None) -> None:
    """Make PyTorch use this implementation in its registry for flash attention; None is its own."""
    if _active() == implementation:
        return
    if implementation is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(cast(Literal["FA3", "FA4"], implementation))


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    return sageattn(q, k, v, tensor_layout="HND")


@dataclass(frozen=True)
class Backend:
    """One way to compute attention, and what it needs."""

    run: Attention
    supported_dtypes: Mapping[str, Dtypes]
    """By device type; it does not run on others."""
    package: str | None = None
    """Module that must be installed for it."""


BACKENDS = {
    "cudnn": Backend(_kernels("cudnn"), {"cuda": HALF}),
    "flash": Backend(_kernels("flash"), {"cuda": HALF, "cpu": HALF + FULL_PRECISION}),
    "efficient": Backend(_kernels("efficient"), {"cuda": (*HALF, torch.float32)}),
    "math": Backend(_kernels("math"), {"cuda": HALF + FULL_PRECISION, "cpu": HALF + FULL_PRECISION}),
    "fa3": Backend(_kernels("flash", flash="FA3"), {"cuda": HALF}, "flash_attn_interface"),
    "fa4": Backend(_kernels("flash", flash="FA4"), {"cuda": HALF}, "flash_attn.cute"),
    "flash_attn": Backend(_flash_attn, {"cuda": HALF}, "flash_attn"),
    "sage": Backend(_sage, {"cuda": HALF}, "sageattention"),
}
"""Every backend by name; all are exact but sage, which multiplies in 8 bits."""
ATTENTIONS = ("auto", *BACKENDS)

FLASH_FIRST = ("flash", "cudnn", "efficient", "math")
"""Exact kernels, fastest first; we have not measured this order ourselves.

Source for flash before efficient and math: `priority_order` in PyTorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp,
which calls FlashAttention-2 universally faster. PyTorch has cudnn last there; here it is tried before the kernels slower than
flash, for tensors that flash does not support.
"""
CUDNN_FIRST = ("cudnn", "flash", "efficient", "math")
"""The order where cuDNN is fastest."""
CUDNN_IS_FASTEST_ON = (9, 10)
"""Major versions of NVIDIA's compute capability on which cuDNN comes first: Hopper, and data-centre Blackwell.

Sources: PyTorch prefers it on 9.0, 10.0 and 10.3 (`check_prefer_cudnn_attention`, same file). On an H100 it reaches 595 TFLOP/s
and FlashAttention-2 370, with 16 k tokens and heads of 128 in fp16 (FlashAttention-3, arXiv 2407.08608). Newer PyTorch also
requires a cuDNN after 9.15.0, for a fault at lengths that are not multiples of 128 (its issue 169849, whose examples take
gradients). The doctor and the tests compare each kernel at such lengths.
"""


@dataclass(frozen=True)
class AttentionChoice:
    """An attention function, its name and the reason why it was chosen."""

    run: Attention
    name: str
    reason: str


def choose_attention(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int = 128) -> AttentionChoice:
    """The attention `name`, one of `ATTENTIONS`, for tensors with this device, dtype and head_dim.

    Raises:
        ValueError: the name is unknown, or it cannot be used here; the message says why, and which others can.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention is {name!r}; use one of {', '.join(ATTENTIONS)}.")
    probe = torch.zeros(1, 1, PROBE_LENGTH, head_dim, device=device, dtype=dtype)
    if name == "auto":
        return _fastest(probe)
    reason = unsupported_reason(name, probe)
    if reason is None:
        return AttentionChoice(BACKENDS[name].run, name, "as requested")
    others = "; ".join(f"{n}: {unsupported_reason(n, probe) or 'can be used'}" for n in BACKENDS if n != name)
    raise ValueError(f"Attention {name} cannot be used: {reason}. Choose auto or another one ({others}).")


def _fastest(probe: Tensor) -> AttentionChoice:
    if probe.device.type != "cuda":
        return AttentionChoice(sdpa, "sdpa", f"PyTorch's own on {probe.device.type}")
    order = _order(probe.device)
    first = next(name for name in order if unsupported_reason(name, probe) is None)
    reason = f"exact, and by published figures the fastest on {torch.cuda.get_device_name(probe.device)}"
    # All of them, so that a shape that the first does not support goes to the next.
    return AttentionChoice(_kernels(*order), first, reason)


def _order(device: torch.device) -> tuple[str, ...]:
    """PyTorch's kernels, fastest on `device` first."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    cudnn = is_nvidia and torch.cuda.get_device_capability(device)[0] in CUDNN_IS_FASTEST_ON
    return CUDNN_FIRST if cudnn else FLASH_FIRST


def unsupported_reason(name: str, probe: Tensor) -> str | None:
    """Why a backend cannot be used for tensors like `probe` (B, heads, length, head_dim), or None if it can."""
    backend, device = BACKENDS[name], probe.device.type
    if backend.package is not None and not _installed(backend.package):
        return f"the package {backend.package} is not installed"
    if device not in backend.supported_dtypes:
        return f"it runs on {' and '.join(backend.supported_dtypes)}, not on {device}"
    dtypes = backend.supported_dtypes[device]
    if probe.dtype not in dtypes:
        return f"it supports {' and '.join(map(str, dtypes))} on {device}, not {probe.dtype}"
    return _error_of(backend.run, probe)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a submodule's parent package is missing, or replaced by a stub
        return False


def _error_of(run: Attention, probe: Tensor) -> str | None:
    """The error of a trial run on one line, or None; restores PyTorch's flash attention implementation."""
    active = _active()
    try:
        run(probe, probe, probe)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        _activate(active)
    return None


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention as in `Attention`, and its log-sum-exp, (B, heads, length of q) float32 or float64.

    The log-sum-exp is needed to merge it with attention over other keys. PyTorch's own kernel for the device computes both.

    Raises:
        ValueError: no kernel for this device and dtype returns it.
    """
    return LSE_KERNELS[_lse_kernel(q.device, q.dtype, q.shape[-1])](q, k, v)


def _of_aten(name: str, *settings: object) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = getattr(torch.ops.aten, f"_scaled_dot_product_{name}")(q, k, v, *settings)
        # Some kernels pad the lengths, and some add an axis.
        return out, lse.flatten(2)[..., : q.shape[2]]

    return attention


LSE_KERNELS = {
    "cudnn": _of_aten("cudnn_attention", None, True),
    "flash": _of_aten("flash_attention"),
    "efficient": _of_aten("efficient_attention", None, True),
    "cpu": _of_aten("flash_attention_for_cpu"),
}
"""Exact kernels that return the log-sum-exp, by their names in `BACKENDS`, and PyTorch's for the CPU."""


@functools.cache
def _lse_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type == "cpu":
        return "cpu"
    probe = torch.zeros(1, 1, PROBE_LENGTH, head_dim, device=device, dtype=dtype)
    for name in _order(device):
        if name in LSE_KERNELS and _error_of(lambda *qkv, name=name: LSE_KERNELS[name](*qkv)[0], probe) is None:
            return name
    raise ValueError(f"No attention for {dtype} on {device} supports a ring; use ulysses instead of ring.")
