"""The machine: versions, driver, devices and their memory."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..autoencoder.plan import free_memory
from ..transformer.attention import BACKENDS
from .attempt import attempt

ROOT = Path(__file__).parents[2]
SECONDS = 10
"""Timeout for external programs."""
OPTIONAL = ("triton", *sorted({backend.package.split(".")[0] for backend in BACKENDS.values() if backend.package}))
"""Optional modules, used if installed."""
NOT_INSTALLED = "not installed"


def system() -> str:
    """Operating system and processor."""
    return f"{platform.system()} {platform.release()}, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of the pack, of what it runs on, and of optional packages; those that do not apply are left out."""
    host = sys.modules.get("comfyui_version")
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    found = {
        "mochi-nodes": _known(_own_version),
        "ComfyUI": getattr(host, "__version__", None),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "cuDNN": cudnn,
        **{module: _known(_version, module) for module in OPTIONAL},
    }
    return {name: str(version) for name, version in found.items() if version is not None}


def _own_version() -> str:
    """Version and commit of the pack that contains this file; the version of the installed core if there is none."""
    project = ROOT / "pyproject.toml"
    if not project.exists():
        return importlib.metadata.version("mochi-nodes")
    match = re.search(r'^version = "(.+)"$', project.read_text(encoding="utf-8"), re.M)
    commit = (
        attempt(_answer, "git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") if (ROOT / ".git").exists() else ""
    )
    return (match[1] if match else "unknown") + (f" ({commit})" if isinstance(commit, str) and commit else "")


def _known(version: Callable[..., str], *arguments: str) -> str:
    found = attempt(version, *arguments)
    return found if isinstance(found, str) else f"unknown ({found['problem']})"


def _version(module: str) -> str:
    distributions = importlib.metadata.packages_distributions().get(module)
    return importlib.metadata.version(distributions[0]) if distributions else NOT_INSTALLED


def driver() -> str:
    """Version of the NVIDIA or AMD driver, or a sentence if there is none."""
    if torch.version.hip:
        return f"amdgpu {Path('/sys/module/amdgpu/version').read_text(encoding='utf-8').strip()}"
    if not torch.cuda.is_available():
        return "none in use: PyTorch sees no NVIDIA or AMD GPU"
    query = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return f"NVIDIA {query.splitlines()[0]}"


def _answer(*command: str) -> str:
    """Output of a program; raises if it does not exist, takes too long or fails."""
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout.strip()


def devices(chosen: torch.device) -> list[dict[str, Any]]:
    """Every device that PyTorch can use, with bytes of memory; the CPU's is main memory.

    Only the CPU and the chosen device are queried for free memory: on a GPU this needs a CUDA context, which takes hundreds of
    MiB of its memory until the process ends.
    """
    if chosen.type == "cuda" and chosen.index is None and torch.cuda.is_available():
        chosen = torch.device("cuda", torch.cuda.current_device())
    return [{"device": str(device), **attempt(_describe, device, device == chosen)} for device in _all_devices()]


def _all_devices() -> list[torch.device]:
    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found += [torch.device("mps")] if torch.backends.mps.is_available() else []
    found += [torch.device("xpu", i) for i in range(torch.xpu.device_count())] if torch.xpu.is_available() else []
    return [*found, torch.device("cpu")]


def _describe(device: torch.device, is_chosen: bool) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        architecture = architecture or f"sm_{properties.major}{properties.minor}"
        free = free_memory(device) if is_chosen else None
        return _memory(f"{properties.name}, {architecture}", properties.total_memory, free)
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return _memory(properties.name, properties.total_memory, None)
    import psutil  # as `free_memory` does

    name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return _memory(name if device.type == "cpu" else device.type, psutil.virtual_memory().total, free_memory(device))


def _memory(name: str, total: int, free: int | None) -> dict[str, Any]:
    return {"name": name, "total_bytes": total, "free_bytes": free}
