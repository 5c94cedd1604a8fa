"""A one-sentence estimate of a run's memory before it starts."""

from __future__ import annotations

from ..config import AsymmDiTConfig
from ..geometry import VideoSize
from ..transformer.memory import modulation_bytes, working_bytes
from .needs import STEPS

GIB, MIB = 2**30, 2**20
ONE_MEMORY = ("cpu", "mps")
"""Devices that use main memory."""


def denoising_bytes(config: AsymmDiTConfig, size: VideoSize, videos: int, window: int | None, itemsize: int) -> int:
    """Bytes that denoising takes besides the weights, with the two halves of guidance run in turn, which takes least.

    `videos` are made at once; `window` is the number of latent frames denoised together, None for all.
    """
    latents = min(window or size.num_latents, size.num_latents)
    tokens = videos * latents * size.num_tokens // size.num_latents
    return working_bytes(config, tokens, itemsize, 1) + modulation_bytes(config, STEPS, itemsize)


def memory_sentence(working: int, weights: int | None, total: int, device: str) -> str:
    """Sentence with a run's bytes, the `total` of `device` and the consequence; `weights` is None if unknown."""
    held = "the weights" if weights is None else f"{_binary(weights)} of weights"
    needs = f"about {_binary(working)} to sample, plus {held}; {device} has {_binary(total)}"
    everything = working + (weights or 0)
    least = everything if device in ONE_MEMORY else working  # weights can stay in main memory
    if least > total:
        return f"{needs}: not enough; make the video smaller or shorter"
    return f"{needs}: weights that do not fit are transferred at every step" if everything > total else needs


def _binary(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.0f} MiB"
