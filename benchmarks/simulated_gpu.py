"""A simulated GPU: counts, on any machine, what a call would start, move, hold and wait for on a GPU.

PyTorch's fake tensors have a device, a shape and strides, but no memory: a forward of the released model takes seconds and
computes nothing. They refuse operations across devices, as a GPU would. What happens inside an operation (workspaces, several
kernels for one call) and time are not visible.

It is in this folder because benchmarks must not import tests, while tests may import benchmarks.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mochi_core import AsymmDiT
from mochi_core.transformer.conditioning import TextConditioning

PRODUCTS = ("mm", "convolution", "linear")
"""Substrings of the names of operations that multiply matrices."""
NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach", "prim.")
"""Name prefixes of operations that start nothing on a device."""
OVERWRITING = ("aten.copy_.", "aten.fill_.", "aten.zero_.")
"""Name prefixes of operations that do not read what they change."""
COPIES = ("aten.copy_.", "aten._to_copy.")
"""Name prefixes of operations that may copy between devices."""
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations that give the host a number or a shape depending on what the device computed."""
KERNELS = ("triton", "plain") if find_spec("mochi_core.kernels") else ("plain",)
"""Our implementations of the operations between matrix products."""
PROJECT = f"{Path(__file__).parents[1]}{os.sep}"
ELSEWHERE = (__file__.removeprefix(PROJECT), ".")
"""Path prefixes in the project that never call a model's operations: this file, and installed packages."""


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """Within it, tensors are fake, even on "cuda", and without gradients; real ones become fake on use."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def using(kernels: str) -> AbstractContextManager:
    """Make our models use one of `KERNELS`."""
    if KERNELS == ("plain",):
        return nullcontext()
    from mochi_core.kernels import using  # pyright: ignore[reportMissingImports]

    return using(kernels)


class GpuCounter(TorchDispatchMode):
    """Counts the operations called while active, within `simulated_gpu`.

    Every operation counts as one kernel, and each of its operands once; views and allocations are not counted.
    """

    def __init__(self, numbers: Iterable[float] = ()) -> None:
        """`numbers` are returned in turn when the host reads a number from the device; running out is an error."""
        super().__init__()
        self._numbers = iter(numbers)
        self.starts = 0
        """Kernels started, including matrix products."""
        self.moved: Counter[str] = Counter()
        """Bytes read and written outside matrix products, by operation."""
        self.products: list[tuple[int, int]] = []
        """FLOPs and bytes of each matrix product or convolution."""
        self.waits: list[str] = []
        """Operations for which the host waits for the device, and where they are called."""
        self.peak = 0
        """Peak bytes on the device, of tensors made while counting."""
        self._live = 0
        self._storages: dict[int, weakref.ref] = {}

    @property
    def product_bytes(self) -> int:
        return sum(moved for _, moved in self.products)

    def __torch_dispatch__(self, func: OpOverload, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func).startswith("prim."):  # queries about a tensor
            return func(*args, **kwargs)
        given = _tensors((args, kwargs))
        if any(tensor.is_cuda for tensor in given) and WAITING & {*func.tags} and not _takes_indices(func, given):
            self._wait(func)
            if func is torch.ops.aten._local_scalar_dense.default:
                return next(self._numbers)
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, given, out)
        return out

    def _count(self, func: OpOverload, args: Any, kwargs: dict[str, Any], given: list[Tensor], out: Any) -> None:
        known = {id(tensor.untyped_storage()) for tensor in given}
        made = _tensors(out)
        new = [tensor for tensor in made if id(tensor.untyped_storage()) not in known]
        for tensor in new:
            self._hold(tensor)
        name, mutates = str(func), func._schema.is_mutable
        if not (new or mutates) or name.startswith(NO_KERNEL) or not any(t.is_cuda for t in (*given, *new)):
            return
        if (
            name.startswith(COPIES)
            and _crosses(given, made)
            and not (_queued(args, kwargs) and _alike(given[-1], made[0]))
        ):
            self._wait(func)
        written = new if new else [] if name.startswith(OVERWRITING) else made
        moved = sum(_touched(tensor) for tensor in (*given, *written) if tensor.is_cuda)
        self.starts += 1
        if any(word in name for word in PRODUCTS):
            self.products.append((_flops(name, args, made[0]), moved))
        else:
            self.moved[name] += moved

    def _wait(self, func: OpOverload) -> None:
        frames = ((frame.f_code.co_filename, line) for frame, line in walk_stack(None))
        ours = ((name.removeprefix(PROJECT), line) for name, line in frames if name.startswith(PROJECT))
        path, line = next(place for place in ours if not place[0].startswith(ELSEWHERE))
        self.waits.append(f"{func} at {path}:{line}")

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_cuda and id(storage) not in self._storages:
            key, size = id(storage), storage.nbytes()
            self._storages[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self._live += size
            self.peak = max(self.peak, self._live)

    def _free(self, key: int, size: int) -> None:
        del self._storages[key]
        self._live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _takes_indices(func: OpOverload, given: Sequence[Tensor]) -> bool:
    """Whether this is `tensor[indices]`, whose shape the host knows, and not `tensor[mask]`."""
    return func is torch.ops.aten.index.Tensor and all(index.dtype == torch.int64 for index in given[1:])


def _crosses(given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Whether a copy moves any data between device types."""
    return len({tensor.device.type for tensor in (*given, *made)}) > 1 and given[-1].numel() > 0 and given[-1].ndim > 0


def _queued(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a copy may overlap with the host; without `non_blocking`, PyTorch waits, in both directions."""
    return kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])


def _alike(source: Tensor, made: Tensor) -> bool:
    """Whether both tensors are dense with the same strides; otherwise PyTorch copies through unpinned memory."""
    dense = torch.empty_like(source, device="meta").stride()  # strides of a dense tensor in the same order
    return source.stride() == made.stride() == dense


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor, with expanded axes counted as 1."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in axes if stride or not size) * tensor.element_size()


def _flops(name: str, args: Sequence[Any], out: Tensor) -> int:
    """FLOPs of a matrix product or convolution: each value of the result is a sum of products, two FLOPs each."""
    if "convolution" in name:
        return 2 * out.numel() * args[1][0].numel()
    left = args[1] if "add" in name else args[0]
    return 2 * out.numel() * left.shape[-1]


def no_attention(q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
    """An empty result in the layout of q, as from flash attention: PyTorch would count a matrix of all token pairs."""
    return torch.empty_like(q)


def text_of_lengths(dit: AsymmDiT, *lengths: int) -> TextConditioning:
    """The result of `prepare_text` for prompts of these lengths; it reads their mask, and fake tensors have no values."""
    weight = dit.t5_y_embedder.to_out.bias
    features = weight.new_empty(len(lengths), max(lengths), dit.config.text_width)
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return TextConditioning(dit.t5_yproj(features), lengths, dit.t5_y_embedder(features, mask))
