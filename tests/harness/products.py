"""How this CPU multiplies matrices: in bf16, 10 to 100 times slower without native units; and in parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# All accumulate in float32 and round once, natively too. Without attention: its native kernel is as fast as in float32.
PRODUCTS = {F.linear, F.conv2d, F.conv3d, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__}


def are_native() -> bool:
    """Whether this CPU has units for bf16 products."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def are_alike_in_parts() -> bool:
    """Whether a product of some rows equals those of the whole bit for bit: MKL's AVX2 code sums differently for few rows."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(count, 192, generator=generator) for count in (300, 512))
    whole = F.linear(rows, weight)
    return all(torch.equal(F.linear(rows[:count], weight), whole[:count]) for count in (37, 100, 150))


def is_the_same(found: Tensor, expected: Tensor, *, rounded: bool = False, limit: float = 2e-6) -> bool:
    """Whether a result computed in parts equals that of one device: bit for bit, or up to summation order."""
    alike = torch.equal(found, expected)
    return alike or ((rounded or not are_alike_in_parts()) and (found - expected).norm() < limit * expected.norm())


class Float32Products(TorchFunctionMode):
    """Context manager: products of bf16 and fp16 tensors on a CPU are computed in float32 and rounded at the end.

    The results are equal up to summation order: operands are exact in float32, and native products also accumulate in float32.
    """

    def __torch_function__(self, function: Callable, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        first = args[0] if args else None
        if function not in PRODUCTS or not is_half(first):
            return function(*args, **kwargs or {})
        upcast = {name: float32(value) for name, value in (kwargs or {}).items()}
        return function(*map(float32, args), **upcast).to(first.dtype)


def is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) and value.device.type == "cpu"


def float32(value: Any) -> Any:
    return value.float() if is_half(value) else value
