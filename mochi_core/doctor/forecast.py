"""The memory of one run in one sentence, before it begins."""

from __future__ import annotations

from ..config import AsymmDiTConfig
from ..geometry import VideoSize
from ..transformer.memory import modulation_bytes, working_bytes
from .needs import STEPS

GIB, MIB = 2**30, 2**20
ONE_MEMORY = ("cpu", "mps")
"""Devices whose memory is the main memory."""


def denoising_bytes(config: AsymmDiTConfig, size: VideoSize, videos: int, window: int | None, itemsize: int) -> int:
    """Bytes that denoising takes besides the weights, one half of guidance after the other, which is the least.

    `videos` are made at once; `window` is the number of latent frames that are denoised together, None for all.
    """
    latents = min(window or size.num_latents, size.num_latents)
    tokens = videos * latents * size.num_tokens // size.num_latents
    return working_bytes(config, tokens, itemsize, 1) + modulation_bytes(config, STEPS, itemsize)


def memory_sentence(working: int, weights: int | None, total: int, device: str) -> str:
    """What a run takes in bytes, what `device` has in `total`, and what follows; `weights` are None if they are not known."""
    held = "the weights" if weights is None else f"{_binary(weights)} of weights"
    needs = f"about {_binary(working)} to sample, beside {held}; {device} has {_binary(total)}"
    everything = working + (weights or 0)
    least = everything if device in ONE_MEMORY else working  # weights can be left in main memory
    if least > total:
        return f"{needs}: too little; make the video smaller or shorter"
    return f"{needs}: weights that do not fit are fetched in every step" if everything > total else needs


def _binary(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.0f} MiB"
