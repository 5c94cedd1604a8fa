"""Which kernels run: those in Triton, or plain PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

from .denoiser import modulated_norm

Kernels = Literal["auto", "triton", "plain"]
CHOICES = get_args(Kernels)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write; other dtypes take the plain path."""
PROBE_SHAPE = (1, 3, 96)
PROBE_TOLERANCE = 1e-5
"""Largest error of the kernel that a device is tried with, for float32 values around 1."""

_default: Kernels = "auto"
_choice: ContextVar[Kernels | None] = ContextVar("mochi_kernels", default=None)


@contextmanager
def using(choice: Kernels) -> Iterator[None]:
    """Choose kernels for the duration, in this thread or task: "auto", "triton" or "plain".

    "auto" takes Triton's on a CUDA or ROCm device where a first small call of one gives the right result, and plain PyTorch
    elsewhere. "triton" asks for them without that call; on the CPU they run in Triton's interpreter only.

    Raises:
        ValueError: there is no such choice.
    """
    token = _choice.set(_checked(choice))
    try:
        yield
    finally:
        _choice.reset(token)


def set_default(choice: Kernels) -> None:
    """Choose kernels, as in `using`, for all of the process that chooses none.

    Raises:
        ValueError: there is no such choice.
    """
    global _default
    _default = _checked(choice)


def _checked(choice: Kernels) -> Kernels:
    if choice not in CHOICES:
        raise ValueError(f"kernels are {', '.join(CHOICES)}; {choice!r} is none of them.")
    return choice


def chosen(device: torch.device) -> Literal["triton", "plain"]:
    """Kernels for tensors on `device`.

    Raises:
        ValueError: Triton's were asked for and cannot run there.
    """
    choice = _choice.get() or _default
    if choice == "plain":
        return "plain"
    if choice == "triton":
        _require_triton(device)
        return "triton"
    return "plain" if device.type != "cuda" or _refusal(device) else "triton"


def reason(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on `device`, in a clause; None if they do."""
    choice = _choice.get() or _default
    if choice == "plain":
        return "plain kernels were asked for"
    if choice == "triton":
        _require_triton(device)
        return None
    return (
        _refusal(device)
        if device.type == "cuda"
        else f"the kernels in Triton are for CUDA and ROCm, not for {device.type}"
    )


def fused(*tensors: Tensor) -> bool:
    """Whether a kernel in Triton is to work on these tensors: the choice for the device of the first, and no gradients."""
    first = tensors[0]
    if chosen(first.device) == "plain" or first.dtype not in DTYPES:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _require_triton(device: torch.device) -> None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"Kernels in Triton do not run on {device.type}; choose auto or plain, or set TRITON_INTERPRET=1 to try them in "
            "Triton's interpreter."
        )


@torch.compiler.assume_constant_result
def _refusal(device: torch.device) -> str | None:
    """Why a CUDA or ROCm device cannot run the kernels, or None; each device is tried once."""
    return _tried(str(device))


@functools.cache
def _tried(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "there is no such device"
    # In a thread of its own no mode of the caller holds: fake tensors, autocast, a trace.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_probe, torch.device(device)).result()


def _probe(device: torch.device) -> str | None:
    """What a first small call on `device` says against the kernels, or None."""
    try:
        x = torch.linspace(-2, 2, 288, device=device).view(PROBE_SHAPE)
        expected = x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
        error = (modulated_norm(x, torch.zeros_like(x[:, 0]), 1e-6) - expected).abs().max().item()
    except Exception as error:  # a compiler, a driver or Triton itself may refuse in any way
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return None if error < PROBE_TOLERANCE else f"a first call gave a wrong result, off by {error:.2g}"
