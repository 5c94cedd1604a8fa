"""The autoencoder's Triton kernels: computed in float32, rounded once when stored.

A program works on a block of pixels of one channel of one frame. Arguments in capitals are constants of the compiled kernel;
`*_sample`, `*_channel`, `*_frame` and `*_row` are strides.
"""

import triton
import triton.language as tl


@triton.jit
def frame_sums(x, out, channels, frames, pixels, sample_, channel_, frame_, row_, width, BLOCK: tl.constexpr):
    """Mean and sum of squared deviations of one block."""
    plane = tl.program_id(0).to(tl.int64)
    channel, frame, sample = plane % channels, plane // channels % frames, plane // channels // frames
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < pixels
    start = x + sample * sample_ + channel * channel_ + frame * frame_
    values = tl.load(start + pixel // width * row_ + pixel % width, valid, 0).to(tl.float32)
    mean = tl.sum(values) / tl.minimum(pixels - tl.program_id(1) * BLOCK, BLOCK)
    deviations = tl.where(valid, values - mean, 0)
    place = out + (plane * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(place, mean)
    tl.store(place + 1, tl.sum(deviations * deviations))


@triton.jit
def merge_sums(
    sums, mean, variance, frames, groups, pieces, pixels,
    MEMBERS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """Mean and variance of one group of one frame from those of its pieces (Chan, Golub & LeVeque, 1979)."""
    row = tl.program_id(0)
    group, frame, sample = row % groups, row // groups % frames, row // groups // frames
    start = sums + row.to(tl.int64) * MEMBERS * 2
    total = MEMBERS // pieces * pixels
    member = tl.arange(0, BLOCK)
    mean_sum = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, MEMBERS, BLOCK):
        valid = first + member < MEMBERS
        count = tl.minimum(pixels - (first + member) % pieces * PIECE, PIECE).to(tl.float32)
        mean_sum += tl.load(start + (first + member) * 2, valid, 0) * (count / total)
    center = tl.sum(mean_sum)
    deviations = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, MEMBERS, BLOCK):
        valid = first + member < MEMBERS
        count = tl.minimum(pixels - (first + member) % pieces * PIECE, PIECE).to(tl.float32)
        difference = tl.load(start + (first + member) * 2, valid, 0) - center
        squares = tl.load(start + (first + member) * 2 + 1, valid, 0)
        deviations += tl.where(valid, squares + count * difference * difference, 0)
    place = (sample * groups + group) * frames + frame
    tl.store(mean + place, center)
    tl.store(variance + place, tl.sum(deviations) / total)


@triton.jit
def norm_silu_pad(
    x, past, mean, variance, weight, bias, out, kept, channels, frames, height, width, groups, above, own_rows, pixels,
    x_sample, x_channel, x_frame, x_row, past_sample, past_channel, past_frame, past_row,
    kept_sample, kept_channel, kept_frame, kept_row,
    EPS: tl.constexpr, HAS_PAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of one padded frame: copied from the past, or normed and activated."""
    plane = tl.program_id(0).to(tl.int64)
    place, channel, sample = plane % (frames + 2), plane // (frames + 2) % channels, plane // (frames + 2) // channels
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < pixels
    row = tl.minimum(tl.maximum(pixel // (width + 2) - above, 0), height - 1)
    column = tl.minimum(tl.maximum(pixel % (width + 2) - 1, 0), width - 1)
    frame = tl.maximum(place - 2, 0)
    is_past = place < 2 if HAS_PAST else False
    source = x + sample * x_sample + channel * x_channel + frame * x_frame + row * x_row + column
    values = tl.load(source, valid & (not is_past), 0).to(tl.float32)
    statistic = (sample * groups + channel // (channels // groups)) * frames + frame
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.load(variance + statistic) + EPS))
    factor = tl.load(weight + channel).to(tl.float32)
    normed = (values - tl.load(mean + statistic)) * scale * factor + tl.load(bias + channel).to(tl.float32)
    activated = normed / (1 + tl.exp(-normed))
    if HAS_PAST:
        earlier = past + sample * past_sample + channel * past_channel + place * past_frame + row * past_row + column
        activated = tl.where(is_past, tl.load(earlier, valid & is_past, 0).to(tl.float32), activated)
    tl.store(out + plane * pixels + pixel, activated, valid)
    own_row = pixel // (width + 2) - 1  # row 0 is padding, or a neighbour's row in its place
    inside = (own_row >= 0) & (own_row < own_rows) & (pixel % (width + 2) == column + 1) & (place >= frames)
    later = kept + sample * kept_sample + channel * kept_channel + (place - frames) * kept_frame
    tl.store(later + own_row * kept_row + column, activated, valid & inside)
