"""What streaming a clip through one half of the autoencoder will take: bytes, and units of progress."""

from __future__ import annotations

from typing import NamedTuple

from ..config import AsymmVAEConfig
from .layers import CONV_SIZE
from .plan import MemoryEstimate

CACHED_PER_BLOCK = 2 * (CONV_SIZE - 1)  # frames: each of two convolutions remembers as many
FRAMES_AT_WORK = 3  # of a residual block: input, hidden, output


class EncoderLevel(NamedTuple):
    """The encoder's residual blocks of one width and resolution."""

    channels: int
    blocks: int
    attends: bool
    reduction: int
    """Frames that become one after these blocks."""
    pixels: int
    """Values of one channel of one frame."""
    frames: int


def decoder_memory_estimate(config: AsymmVAEConfig, height: int, width: int, itemsize: int) -> MemoryEstimate:
    """Bytes to decode latents of `height` rows and `width` columns, whatever their number."""
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
    """Bytes to encode a video; the clip that gathers for temporal attention grows with its length."""
    cached = widest = waiting = gathered = 0
    for level in _encoder_levels(config, frames, height, width):
        frame = level.channels * level.pixels
        # Where a clip gathers behind every block, the caches of the block before are gone.
        cached, widest = cached + (1 if level.attends else level.blocks) * frame, max(widest, frame)
        waiting, gathered = waiting + level.reduction * frame, max(gathered, level.attends * frame * level.frames)
    convolutions = _block_memory(cached, widest, waiting, itemsize)
    return convolutions._replace(cache_bytes=convolutions.cache_bytes + gathered * itemsize)


def encoder_progress_units(config: AsymmVAEConfig, frames: int) -> int:
    """Frames in front of all steps that take the whole clip, and latent frames at the end."""
    levels = _encoder_levels(config, frames, 1, 1)
    return sum(level.blocks * level.attends * level.frames for level in levels) + levels[-1].frames


def _block_memory(cached: int, widest: int, waiting: int, itemsize: int) -> MemoryEstimate:
    """Memory of residual blocks from values: in a frame of each, in a frame of the widest, and waiting between stages."""
    # While a block makes its next caches, its present ones still exist.
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
