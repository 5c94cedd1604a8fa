"""Choose which kernels run: Triton's or plain PyTorch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

from .probe import probe

Kernels = Literal["auto", "triton", "plain"]
CHOICES = get_args(Kernels)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels read and write; others take the plain path."""
INTERPRET = "TRITON_INTERPRET"
"""Environment variable that makes Triton run kernels on the CPU, in NumPy."""
OLDEST_TRITON = (((10, 0), (3, 3)), ((8, 0), (3, 2)), ((7, 5), (3, 3)), ((0, 0), None))
"""The oldest Triton that compiles the kernels for cards of at least each compute capability; bf16 on 7.5 needs 3.3."""

_default: Kernels = "auto"
_choice: ContextVar[Kernels | None] = ContextVar("mochi_kernels", default=None)
_verdicts: dict[tuple[torch.device, torch.dtype], str | None] = {}
_LOCK = threading.Lock()
"""Held while a device is probed."""


@contextmanager
def using(choice: Kernels) -> Iterator[None]:
    """Choose kernels for the duration, in this thread or task: "auto", "triton" or "plain".

    "auto" uses Triton's on a CUDA or ROCm device where a small trial call of each gives the right result, and plain PyTorch
    elsewhere and under torch.compile, which fuses plain operations itself. "triton" always uses Triton's; on the CPU they run
    only in its interpreter.

    Raises:
        ValueError: there is no such choice.
    """
    token = _choice.set(_checked(choice))
    try:
        yield
    finally:
        _choice.reset(token)


def set_default(choice: Kernels) -> None:
    """Choose kernels, as in `using`, for all code in the process outside `using`.

    Raises:
        ValueError: there is no such choice.
    """
    global _default
    _default = _checked(choice)


def _checked(choice: Kernels) -> Kernels:
    if choice not in CHOICES:
        raise ValueError(f"kernels must be one of {', '.join(CHOICES)}, not {choice!r}.")
    return choice


def chosen(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Literal["triton", "plain"]:
    """Kernels for tensors on `device` of that dtype.

    Raises:
        ValueError: Triton's were requested and cannot run there.
    """
    choice = _choice.get() or _default
    if choice == "plain":
        return "plain"
    if choice == "triton":
        _require_triton(device)
        return "triton"
    if device.type != "cuda" or torch.compiler.is_compiling() or _refusal(device, dtype):
        return "plain"
    return "triton"


def reason(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why Triton's kernels do not run on `device` for tensors of that dtype, as a clause; None if they do."""
    choice = _choice.get() or _default
    if choice == "plain":
        return "plain kernels were requested"
    if choice == "triton":
        _require_triton(device)
        return None
    return (
        _refusal(device, dtype)
        if device.type == "cuda"
        else f"the Triton kernels are for CUDA and ROCm, not for {device.type}"
    )


def fused(*tensors: Tensor) -> bool:
    """Whether to use a Triton kernel for these tensors: it is the choice for the first one's device, and none needs gradients."""
    first = tensors[0]
    if first.dtype not in DTYPES or chosen(first.device, first.dtype) == "plain":
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _require_triton(device: torch.device) -> None:
    if device.type != "cuda" and os.environ.get(INTERPRET) != "1":
        raise ValueError(
            f"Triton kernels do not run on {device.type}; choose auto or plain, or set TRITON_INTERPRET=1 to try them in "
            "Triton's interpreter."
        )


@torch.compiler.assume_constant_result
def _refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a CUDA or ROCm device cannot run the kernels for tensors of that dtype, or None; each pair is probed once."""
    if device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    with _LOCK:
        if (device, dtype) not in _verdicts:
            # In a new thread, none of the caller's modes apply: fake tensors, autocast, tracing.
            with ThreadPoolExecutor(1) as thread:
                refusal, lasts = thread.submit(_tried, device, dtype).result()
            if not lasts:
                return refusal
            _verdicts[device, dtype] = refusal
        return _verdicts[device, dtype]


def _tried(device: torch.device, dtype: torch.dtype) -> tuple[str | None, bool]:
    """Why the kernels cannot run, or None; and whether that is permanent: memory or a disk may be full only for now."""
    try:
        return _unsuited(device) or probe(device, dtype), True
    except Exception as error:  # a compiler, a driver or Triton itself can raise anything
        said = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {said}", not isinstance(error, torch.OutOfMemoryError | OSError)


def _unsuited(device: torch.device) -> str | None:
    """Why the kernels cannot run, as far as known without a trial, which on old cards or compilers could crash the process."""
    if not torch.cuda.is_available():
        return "there is no such device"
    if os.environ.get(INTERPRET) == "1":
        return f"{INTERPRET}=1 is set, which is for tests"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip:
        return None
    version = tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("triton"))[:2])
    capability = torch.cuda.get_device_capability(device)
    needed = next(triton for card, triton in OLDEST_TRITON if capability >= card)
    if needed is None or version < needed:
        wanted = (
            f"Triton {'.'.join(map(str, needed))} or newer" if needed else "a card of compute capability 7.5 or more"
        )
        return f"they need {wanted}"
    return None
