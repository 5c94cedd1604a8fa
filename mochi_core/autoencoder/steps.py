"""Run the modules of the autoencoder on a clip in pieces: a few frames at a time, in strips of rows.

A second way through the modules of layers.py, encoder.py and decoder.py: it gives the results of their forward methods, without
gradients and in a bounded working set (see streaming.py). Norms use the statistics of the whole frame, and convolutions see the
rows next to their strip, so there are no seams. Clips are (B, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import kernels
from .decoder import Decoder, DecoderStage
from .encoder import Encoder, EncoderStage, fourier_features
from .layers import CONV_SIZE, RGB, ResBlock, TemporalAttentionBlock, convolve, frame_norm, pointwise
from .plan import Plan
from .streaming import Cache, ClipStep, Neighbour, OomRetry, Step, StreamStep, by_strips, empty_cache, store, strip_step

# Values that temporal attention holds per input value: the strip itself, normed and attended; then q, k, v and their copies.
STRIP_EXPANSION, ATTENTION_EXPANSION = 3, 8


def decoder_steps(decoder: Decoder) -> list[Step]:
    """Steps from latents (B, 12, T, H, W) to video (B, 3, F, 8H, 8W)."""
    head, *stages, tail = decoder.blocks
    conv_in, *blocks = head.children()
    expansion = decoder.config.decoder_channels[0] / decoder.config.latent_channels
    return [
        strip_step(conv_in, expansion),
        *stream_steps(*blocks, *stages, *tail.children()),
        strip_step(lambda x: pointwise(decoder.output_proj, F.silu(x))),
    ]


def encoder_steps(encoder: Encoder, dtype: torch.dtype) -> list[Step]:
    """Steps from video (B, 3, F, 8H, 8W), at least in float32, to moments (B, 2 * 12, T, H, W), computed in `dtype`."""
    proj_in, *blocks_and_stages = encoder.layers
    expansion = encoder.config.encoder_channels[0] / RGB
    return [
        strip_step(lambda video: pointwise(proj_in, fourier_features(video).to(dtype)), expansion),
        *stream_steps(*blocks_and_stages),
        StreamStep(partial(_encoder_output, encoder.output_norm, encoder.output_proj)),
    ]


def stream_steps(*modules: nn.Module) -> list[Step]:
    """The steps of blocks and stages, in order."""
    steps: list[Step] = []
    for module in modules:
        if isinstance(module, ResBlock):
            steps.append(StreamStep(partial(res_block, module), convolutions=2))
            if module.attn_block:
                steps.append(ClipStep(partial(attend, module.attn_block)))
        elif isinstance(module, EncoderStage):
            _, *blocks = module.layers
            steps += [StreamStep(partial(downsample, module.down)), *stream_steps(*blocks)]
        elif isinstance(module, DecoderStage):
            steps += [
                *stream_steps(*module.blocks),
                StreamStep(partial(upsample, module), module.expansion, time=module.temporal_expansion),
            ]
        else:
            raise TypeError(f"{type(module).__name__} does not stream")
    return steps


def _encoder_output(norm: nn.GroupNorm, linear: nn.Linear, x: Tensor, _: Cache, plan: Plan) -> tuple[Tensor, Cache]:
    strips = plan.strips(x)
    normed = strip_norm(norm, x, strips)
    return by_strips(strips, lambda rows: pointwise(linear, F.silu(normed(rows)))), ()


def res_block(block: ResBlock, x: Tensor, cache: Cache, plan: Plan) -> tuple[Tensor, Cache]:
    """The convolutions of a `ResBlock` and its skip connection; the cache holds each convolution's last two input frames."""
    norm_1, conv_1, norm_2, conv_2 = block.norms_and_convs()
    past_1, past_2 = cache or (None, None)
    h, past_1 = norm_silu_conv(norm_1, conv_1, x, past_1, plan)
    h, past_2 = norm_silu_conv(norm_2, conv_2, h, past_2, plan)
    h += x
    return h, (past_1, past_2)


def norm_silu_conv(
    norm: nn.GroupNorm, conv: nn.Conv3d, x: Tensor, past: Tensor | Neighbour | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Causal convolution of silu(norm(x)), and its last two input frames, which the next call needs as `past`."""
    past = past if past is None or isinstance(past, Tensor) else past(norm, x)
    strips, height = plan.strips(x), x.shape[3]
    padded_rows = _padded_rows(norm, x, strips)
    kept = empty_cache(x, CONV_SIZE - 1, plan.cache_device)

    def convolved(rows: slice) -> Tensor:
        seen = slice(max(rows.start - 1, 0), min(rows.stop + 1, height))
        before = None if past is None else past[..., seen, :].to(x.device, non_blocking=x.is_cuda)
        borders = {"above": rows.start == seen.start, "below": rows.stop == seen.stop}
        return convolve(conv, padded_rows(seen, before, kept[..., rows, :], **borders))  # (B, C, f, r, W)

    return by_strips(strips, convolved), kept


def _padded_rows(norm: nn.GroupNorm, x: Tensor, strips: list[slice]) -> Callable[..., Tensor]:
    """A function that computes some rows of silu(norm(x)), preceded by the same rows of the past, padded as by `pad_causal`.

    It writes the last two frames, without the padding or neighbouring rows, to its argument `kept`.
    """
    if kernels.fused(x, norm.weight):
        mean, variance = kernels.merge_sums(kernels.frame_sums(x), norm.num_groups, x.shape[3] * x.shape[4])
        weight, bias = norm.weight.to(x.device), norm.bias.to(x.device)

        def fused(seen: slice, before: Tensor | None, kept: Tensor, *, above: bool, below: bool) -> Tensor:
            statistics = mean, variance, weight, bias, norm.eps
            made = kept if kept.device == x.device else torch.empty_like(kept, device=x.device)
            padded = kernels.norm_silu_pad(x[..., seen, :], before, *statistics, above, below, made)
            if made is not kept:
                store(made, kept)
            return padded

        return fused
    normed = strip_norm(norm, x, strips)

    def plain(seen: slice, before: Tensor | None, kept: Tensor, *, above: bool, below: bool) -> Tensor:
        frames = F.silu(normed(seen), inplace=True)  # (B, C, f, r + 2, W)
        before = frames[:, :, :1] if before is None else before
        return _keep(pad_causal(before, frames, above=above, below=below), kept)

    return plain


def _keep(padded: Tensor, kept: Tensor) -> Tensor:
    store(padded[:, :, 1 - CONV_SIZE :, 1:-1, 1:-1], kept)
    return padded


def pad_causal(before: Tensor, frames: Tensor, *, above: bool, below: bool) -> Tensor:
    """Prepend two frames, and replicate a pixel left, right, and above or below where asked.

    `before` (B, C, 2 or 1, r, W) and `frames` (B, C, f, r, W) to (B, C, 2 + f, r + above + below, W + 2);
    written once, where `cat` and `pad` would each copy everything.
    """
    batch, channels, count, rows, width = frames.shape
    padded = frames.new_empty(batch, channels, CONV_SIZE - 1 + count, above + rows + below, width + 2)
    inner = padded[..., above : above + rows, 1:-1]
    inner[:, :, : CONV_SIZE - 1], inner[:, :, CONV_SIZE - 1 :] = before, frames
    if above:
        padded[..., 0, :] = padded[..., 1, :]
    if below:
        padded[..., -1, :] = padded[..., -2, :]
    padded[..., 0], padded[..., -1] = padded[..., 1], padded[..., -2]
    return padded


def downsample(conv: nn.Conv3d, x: Tensor, cache: Cache, plan: Plan) -> tuple[Tensor, Cache]:
    """Convolve non-overlapping blocks of frames and pixels; the first frame is repeated to fill the first block.

    The cache holds the frames that did not fill a block; the cache and the output may each be empty.
    """
    time, space, _ = conv.kernel_size
    before = x[:, :, :1].expand(-1, -1, time - 1, -1, -1)
    if cache and isinstance(cache[0], Tensor):
        before = cache[0].to(x.device, non_blocking=x.is_cuda)
    x = torch.cat((before, x), dim=2)
    whole = x.shape[2] // time * time
    kept = empty_cache(x, x.shape[2] - whole, plan.cache_device)
    store(x[:, :, whole:], kept)
    if whole == 0:
        return x.new_empty(x.shape[0], conv.out_channels, 0, x.shape[3] // space, x.shape[4] // space), (kept,)
    blocks = x[:, :, :whole]
    strips = plan.strips(blocks[..., ::space, :], expansion=space)
    return by_strips(strips, lambda rows: conv(blocks[..., rows.start * space : rows.stop * space, :])), (kept,)


def upsample(stage: DecoderStage, x: Tensor, cache: Cache, plan: Plan) -> tuple[Tensor, Cache]:
    """`DecoderStage.unfold`; surplus frames are dropped only at the start of a clip, when there is no cache yet."""
    strips = plan.strips(x, stage.expansion)
    x = by_strips(strips, lambda rows: stage.unfold(x[..., rows, :]), scale=stage.spatial_expansion)
    return (x[:, :, stage.surplus :] if cache is None else x), ()


def attend(block: TemporalAttentionBlock, pieces: list[Tensor], retry: OomRetry) -> None:
    """Add attention over all frames to the pieces (B, C, f, H, W) of one clip, in place, in strips of rows."""
    statistics = [_piece_statistics(block.norm, piece, retry) for piece in pieces]
    mean, variance = (torch.cat(parts, dim=2) for parts in zip(*statistics, strict=True))
    row, height = 0, pieces[0].shape[3]
    while row < height:
        row = retry.run(_attend_rows, block, pieces, row, mean, variance) or row


def _piece_statistics(norm: nn.GroupNorm, piece: Tensor, retry: OomRetry) -> tuple[Tensor, Tensor]:
    def statistics(plan: Plan) -> tuple[Tensor, Tensor]:
        return frame_statistics(piece, norm.num_groups, plan.strips(piece), plan.device)

    while (found := retry.run(statistics)) is None:
        pass
    return found


def _attend_rows(
    block: TemporalAttentionBlock, pieces: list[Tensor], top: int, mean: Tensor, variance: Tensor, plan: Plan
) -> int:
    """Attend in as many rows from `top` as the plan allows; returns the first row left to do."""
    frames = [piece.shape[2] for piece in pieces]
    rows = slice(top, top + plan.rows(pieces[0][:, :, :1], STRIP_EXPANSION * sum(frames)))
    strip = torch.cat([piece[..., rows, :].to(plan.device) for piece in pieces], dim=2)  # (B, C, T, r, W)
    pixels = rearrange(norm_with(block.norm, strip, mean, variance), "b c t h w -> (b h w) t c")
    batch = plan.items(pixels[0], ATTENTION_EXPANSION)
    attended = torch.cat([block.attn(some) for some in pixels.split(batch)])  # (B * r * W, T, C)
    strip += rearrange(attended, "(b h w) t c -> b c t h w", b=strip.shape[0], w=strip.shape[4])
    # Nothing is overwritten until everything is computed: after running out of memory halfway, rows would be done twice.
    done = [part.to(piece.device) for part, piece in zip(strip.split(frames, dim=2), pieces, strict=True)]
    for piece, part in zip(pieces, done, strict=True):
        piece[..., rows, :] = part
    return top + strip.shape[3]


def strip_norm(norm: nn.GroupNorm, x: Tensor, strips: list[slice]) -> Callable[[slice], Tensor]:
    """`frame_norm(norm, x)` as a function that computes a slice of its rows."""
    if len(strips) == 1:
        return lambda _: frame_norm(norm, x)
    statistics = frame_statistics(x, norm.num_groups, strips)
    return lambda rows: norm_with(norm, x[..., rows, :], *statistics)


def norm_with(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Group norm of x (B, C, T, r, W) with given statistics (B, groups, T), in the dtype of x."""
    batch, channels, frames = x.shape[:3]
    mean, variance = (s.repeat_interleave(channels // norm.num_groups, dim=1).flatten() for s in (mean, variance))
    weight, bias = (p.to(mean)[None, :, None].expand(batch, -1, frames).flatten() for p in (norm.weight, norm.bias))
    # Batch norm accepts given statistics: every channel of every frame becomes one of its channels.
    return F.batch_norm(x.flatten(0, 2)[None], mean, variance, weight, bias, eps=norm.eps).view(x.shape)


def frame_statistics(
    x: Tensor, groups: int, strips: list[slice], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, groups, T) of each frame's channel groups, at least in float32, on `device` or that of x.

    Strips are merged by count, mean and sum of squared deviations (Chan, Golub & LeVeque, 1979): averaging the variances
    would ignore the differences between the means of the strips.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = deviations = x.new_zeros(x.shape[0], groups, x.shape[2], dtype=dtype, device=device)
    count = 0
    for rows in strips:
        strip = x[..., rows, :].to(mean).unflatten(1, (groups, -1))  # (B, G, C/G, T, r, W)
        added = strip[0, 0, :, 0].numel()
        strip_variance, strip_mean = torch.var_mean(strip, dim=(2, 4, 5), correction=0)
        difference, total = strip_mean - mean, count + added
        mean = mean + difference * (added / total)
        deviations = deviations + strip_variance * added + difference.square() * (count * added / total)
        count = total
    return mean, deviations / count
