"""Triton kernels compiled for absent GPUs, with the actual arguments that the operators launch them with."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
ALIGNED = 16  # alignment of pointers and divisibility of numbers that Triton exploits
OPTIONS = ("num_warps",)


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    arguments: tuple
    constants: dict[str, Any]


def recorder(launches: list[Launch]):
    """A stand-in for `kernels.launch.launch` that runs nothing and adds to `launches`."""

    def launch(kernel, grid, *arguments, **constants):
        assert 0 not in grid
        launches.append(Launch(kernel, arguments, constants))

    return launch


def build(launch: Launch, target):
    """The kernel compiled for `target` as Triton would for this launch: types, and which numbers are 1 or multiples of 16."""
    import triton
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    constants = {name: value for name, value in launch.constants.items() if name not in OPTIONS}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (value and value % ALIGNED == 0):
            attributes[i,] = [["tt.divisibility", ALIGNED]]
    signature = {name: signature.get(name, "constexpr") for name in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.constants["num_warps"]})


def spilled_bytes(compiled, folder: Path) -> int:
    """Bytes of registers that a program spills to memory, from ptxas' output or AMD's assembly."""
    if "amdgcn" in compiled.asm:
        return sum(map(int, re.findall(r"[vs]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])))
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    architecture = re.search(r"\.target (sm_\d+\w*)", ptx)[1]
    (folder / "kernel.ptx").write_text(ptx)
    ptxas = get_ptxas(int(re.sub(r"\D", "", architecture))).path
    command = [ptxas, "-v", f"-arch={architecture}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))
