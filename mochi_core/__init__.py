"""Mochi 1, self-contained: denoiser, autoencoder, text encoder, sampling and checkpoints.

Names are imported on first use: importing PyTorch takes seconds, and a command should report a wrong argument at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import interrupts, packages

if TYPE_CHECKING:
    from .autoencoder.latents import denormalize_latents, normalize_latents
    from .autoencoder.model import AsymmVAE, Posterior
    from .checkpoints import load_transformer, load_vae
    from .config import AsymmDiTConfig, AsymmVAEConfig
    from .geometry import VideoSize, seconds_to_frames
    from .io.video import save_video
    from .lora import Lora, fuse_loras, load_lora
    from .pipeline import MochiPipeline
    from .sampling.block_cache import BlockCache
    from .sampling.guidance import Guidance, guided
    from .sampling.sample import euler, sample
    from .sampling.schedule import guidance_schedule, linear_quadratic_schedule
    from .text_encoder import TextEncoder, load_text_encoder
    from .transformer.attention import Attention, sdpa
    from .transformer.model import AsymmDiT

interrupts.end_at_once()
packages.check()

_NAMES = {
    "autoencoder.latents": ("denormalize_latents", "normalize_latents"),
    "autoencoder.model": ("AsymmVAE", "Posterior"),
    "checkpoints": ("load_transformer", "load_vae"),
    "config": ("AsymmDiTConfig", "AsymmVAEConfig"),
    "geometry": ("VideoSize", "seconds_to_frames"),
    "io.video": ("save_video",),
    "lora": ("Lora", "fuse_loras", "load_lora"),
    "pipeline": ("MochiPipeline",),
    "sampling.block_cache": ("BlockCache",),
    "sampling.guidance": ("Guidance", "guided"),
    "sampling.sample": ("euler", "sample"),
    "sampling.schedule": ("guidance_schedule", "linear_quadratic_schedule"),
    "text_encoder": ("TextEncoder", "load_text_encoder"),
    "transformer.attention": ("Attention", "sdpa"),
    "transformer.model": ("AsymmDiT",),
}
"""The module of each public name; must agree with the imports above, which only type checkers see."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "AsymmDiT",
    "AsymmDiTConfig",
    "AsymmVAE",
    "AsymmVAEConfig",
    "Attention",
    "BlockCache",
    "Guidance",
    "Lora",
    "MochiPipeline",
    "Posterior",
    "TextEncoder",
    "VideoSize",
    "denormalize_latents",
    "euler",
    "fuse_loras",
    "guidance_schedule",
    "guided",
    "linear_quadratic_schedule",
    "load_lora",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "normalize_latents",
    "sample",
    "save_video",
    "sdpa",
    "seconds_to_frames",
]


if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
