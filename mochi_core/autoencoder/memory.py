"""Estimates for streaming a clip through the encoder or decoder: bytes, and units of progress."""

from __future__ import annotations

from typing import NamedTuple

from ..config import AsymmVAEConfig
from .layers import CONV_SIZE
from .plan import MemoryEstimate

CACHED_PER_BLOCK = 2 * (CONV_SIZE - 1)  # frames: each of the two convolutions caches CONV_SIZE - 1
FRAMES_AT_WORK = 3  # in a residual block: input, hidden, output


class EncoderLevel(NamedTuple):
    """The encoder's residual blocks of one width and resolution."""

    channels: int
    blocks: int
    attends: bool
    reduction: int
    """Frames that become one after these blocks."""
    pixels: int
    """Pixels per frame at this level."""
    frames: int


def decoder_memory_estimate(config: AsymmVAEConfig, height: int, width: int, itemsize: int) -> MemoryEstimate:
    """Bytes to decode any number of latent frames of `height` rows and `width` columns."""
    pixels = height * width
    head, *counts = config.decoder_blocks
    cached, widest, waiting = head * config.decoder_channels[0] * pixels, 0, 0
    expansions = (1, *config.temporal_expansions), (*config.spatial_expansions, 1)
    for channels, count, time, space in zip(config.decoder_channels, counts, *expansions, strict=True):
        frame = channels * pixels
        cached, widest, waiting = cached + count * frame, max(widest, frame), waiting + time * frame
        pixels *= space**2
    return _block_memory(cached, widest, waiting, itemsize)


def encoder_memory_estimate(
    config: AsymmVAEConfig, frames: int, height: int, width: int, itemsize: int
) -> MemoryEstimate:
    """Bytes to encode a video; the clip collected for temporal attention grows with the video's length."""
    cached = widest = waiting = gathered = 0
    for level in _encoder_levels(config, frames, height, width):
        frame = level.channels * level.pixels
        # Where the clip is collected after every block, the previous block's caches are already freed.
        cached, widest = cached + (1 if level.attends else level.blocks) * frame, max(widest, frame)
        waiting, gathered = waiting + level.reduction * frame, max(gathered, level.attends * frame * level.frames)
    convolutions = _block_memory(cached, widest, waiting, itemsize)
    return convolutions._replace(cache_bytes=convolutions.cache_bytes + gathered * itemsize)


def encoder_progress_units(config: AsymmVAEConfig, frames: int) -> int:
    """Frames collected before each step that takes the whole clip, plus the latent frames at the end."""
    levels = _encoder_levels(config, frames, 1, 1)
    return sum(level.blocks * level.attends * level.frames for level in levels) + levels[-1].frames


def _block_memory(cached: int, widest: int, waiting: int, itemsize: int) -> MemoryEstimate:
    """Memory of residual blocks; arguments count values: one frame of every block, one of the widest, waiting between stages."""
    # While a block computes its next caches, its current ones still exist.
    caches, frames = CACHED_PER_BLOCK * (cached + widest), FRAMES_AT_WORK * widest + waiting
    return MemoryEstimate(caches * itemsize, frames * itemsize)


def _encoder_levels(config: AsymmVAEConfig, frames: int, height: int, width: int) -> list[EncoderLevel]:
    levels, pixels = [], height * width
    widths = (*config.encoder_channels, config.encoder_channels[-1])
    reductions = (*config.temporal_reductions, 1, 1), (*config.spatial_reductions, 1, 1)
    rows = zip(widths, config.encoder_blocks, config.encoder_attention, *reductions, strict=True)
    for channels, blocks, attends, time, space in rows:
        levels.append(EncoderLevel(channels, blocks, attends, time, pixels, frames))
        pixels, frames = pixels // space**2, (frames - 1) // time + 1
    return levels
