"""Parts of the autoencoder that are causal in time: convolution, per-frame norm, residual block, temporal attention.

Frames may arrive in pieces and are worked on in strips of rows (see streaming.py). Statistics of a norm are those of the
whole frame, and a convolution sees the rows beside its strip, so that strips leave no trace. Shapes: (B, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .streaming import Cache, ClipLayer, Footprint, Layer, Plan, Runner, by_strips

NORM_GROUPS = 32
CONV_SIZE = 3
CACHED_PER_BLOCK = 2 * (CONV_SIZE - 1)  # frames: each of two convolutions remembers as many
FRAMES_AT_WORK = 3  # of a residual block: input, hidden, output
# CUDA refuses attention over more batch entries than fit a 16-bit grid, and every pixel is one.
MAX_ATTENTION_BATCH = 2**15
# Of temporal attention, for each value that it takes: itself, normed and attended; and then q, k, v and copies of them.
STRIP_GROWTH, ATTENTION_GROWTH = 3, 8


def norm_silu_conv(
    norm: nn.GroupNorm, conv: nn.Conv3d, x: Tensor, past: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """`conv(silu(norm(x)))` that never sees later frames; borders are replicated in space, the first frame in time.

    Returns the output and what the next call needs as `past`: the last two frames that went into the convolution.
    """
    strips, height = plan.strips(x), x.shape[3]
    normed = frame_norm(norm, x, strips)
    kept = torch.empty((*x.shape[:2], CONV_SIZE - 1, *x.shape[3:]), dtype=x.dtype, device=plan.cache_device)

    def convolved(rows: slice) -> Tensor:
        top, bottom = max(rows.start - 1, 0), min(rows.stop + 1, height)
        frames = F.silu(normed(slice(top, bottom)), inplace=True)  # (B, C, f, r + 2, W)
        before = frames[:, :, :1] if past is None else past[..., top:bottom, :]
        padded = pad_causal(before, frames, above=rows.start == top, below=rows.stop == bottom)
        kept[..., rows, :] = padded[:, :, 1 - CONV_SIZE :, 1:-1, 1:-1]
        return conv(padded)  # (B, C, f, r, W)

    return by_strips(strips, convolved), kept


def pad_causal(before: Tensor, frames: Tensor, *, above: bool, below: bool) -> Tensor:
    """Two frames in front, and a replicated pixel left, right and where there is no row above or below.

    `before` (B, C, 2 or 1, r, W) on any device and `frames` (B, C, f, r, W), to (B, C, 2 + f, r + above + below, W + 2);
    written once, where padding and joining would each copy everything.
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


def strided_conv(conv: nn.Conv3d, x: Tensor, past: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """Convolve blocks of frames and pixels that do not overlap; the first frame is repeated to fill the first block.

    Returns the output and the frames that did not fill a block; both may have no frame.
    """
    time, space, _ = conv.kernel_size
    before = x[:, :, :1].expand(-1, -1, time - 1, -1, -1) if past is None else past.to(x.device)
    x = torch.cat((before, x), dim=2)
    whole = x.shape[2] // time * time
    kept = x[:, :, whole:].to(plan.cache_device, copy=True)
    if whole == 0:
        return x.new_empty(x.shape[0], conv.out_channels, 0, x.shape[3] // space, x.shape[4] // space), kept
    blocks = x[:, :, :whole]
    strips = plan.strips(blocks[..., ::space, :], growth=space)
    return by_strips(strips, lambda rows: conv(blocks[..., rows.start * space : rows.stop * space, :])), kept


def frame_norm(norm: nn.GroupNorm, x: Tensor, strips: list[slice]) -> Callable[[slice], Tensor]:
    """Group norm with the statistics of each frame alone, as a function that makes some rows of it."""
    if len(strips) == 1:
        return lambda _: norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    statistics = frame_statistics(x, norm.num_groups, strips)
    return lambda rows: norm_with(norm, x[..., rows, :], *statistics)


def norm_with(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Group norm of x (B, C, T, r, W) with given statistics (B, groups, T), in the dtype of x."""
    batch, channels, frames = x.shape[:3]
    mean, variance = (s.repeat_interleave(channels // norm.num_groups, dim=1).flatten() for s in (mean, variance))
    weight, bias = (p.to(mean)[None, :, None].expand(batch, -1, frames).flatten() for p in (norm.weight, norm.bias))
    # Given statistics are what a batch norm takes: every channel of every frame is one of its channels.
    return F.batch_norm(x.flatten(0, 2)[None], mean, variance, weight, bias, eps=norm.eps).view(x.shape)


def frame_statistics(
    x: Tensor, groups: int, strips: list[slice], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, groups, T) of the channel groups of each frame, at least in float32, on `device` or that of x.

    Strips are merged by count, mean and sum of squared deviations (Chan, Golub & LeVeque, 1979): an average of variances
    would leave out how the means of the strips differ.
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


class ResBlock(nn.Module):
    """Two normed causal convolutions around a skip, optionally followed by temporal attention."""

    def __init__(self, channels: int, head_dim: int | None = None, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.stack = nn.ModuleList(
            layer
            for _ in range(2)
            for layer in (
                ops.GroupNorm(NORM_GROUPS, channels, **factory),
                nn.SiLU(),
                ops.Conv3d(channels, channels, kernel_size=CONV_SIZE, **factory),
            )
        )
        self.attn_block = TemporalAttentionBlock(channels, head_dim, ops=ops, **factory) if head_dim else None

    def flattened(self) -> list[Layer | ClipLayer]:
        """The convolutions, and the attention if there is one."""
        return [Layer(self), *([ClipLayer(self.attn_block.attend)] if self.attn_block else [])]

    def forward(self, x: Tensor, cache: Cache, plan: Plan) -> tuple[Tensor, Cache]:
        norm_1, _, conv_1, norm_2, _, conv_2 = self.stack
        past_1, past_2 = cache or (None, None)
        h, past_1 = norm_silu_conv(norm_1, conv_1, x, past_1, plan)  # pyright: ignore[reportArgumentType]
        h, past_2 = norm_silu_conv(norm_2, conv_2, h, past_2, plan)  # pyright: ignore[reportArgumentType]
        h += x
        return h, (past_1, past_2)


def block_footprint(cached: int, widest: int, waiting: int, itemsize: int) -> Footprint:
    """Of residual blocks: values in one frame of all of them together, of the widest, and in frames between stages."""
    # While a block makes its next caches, its present ones still exist.
    caches, frames = CACHED_PER_BLOCK * (cached + widest), FRAMES_AT_WORK * widest + waiting
    return Footprint(caches * itemsize, frames * itemsize)


class TemporalAttentionBlock(nn.Module):
    """Each pixel attends to itself in this and earlier frames; added to the input."""

    def __init__(self, channels: int, head_dim: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = ops.GroupNorm(NORM_GROUPS, channels, **factory)
        self.attn = TemporalAttention(channels, head_dim, ops=ops, **factory)

    def attend(self, pieces: list[Tensor], runner: Runner) -> None:
        """Add attention over all frames to the pieces (B, C, f, H, W) of one clip, in place, in strips of rows."""
        statistics = [self._statistics(piece, runner) for piece in pieces]
        mean, variance = (torch.cat(parts, dim=2) for parts in zip(*statistics, strict=True))
        row, height = 0, pieces[0].shape[3]
        while row < height:
            row = runner.attempt(self._attend_rows, pieces, row, mean, variance) or row

    def _statistics(self, piece: Tensor, runner: Runner) -> tuple[Tensor, Tensor]:
        while True:
            found = runner.attempt(
                lambda plan: frame_statistics(piece, self.norm.num_groups, plan.strips(piece), plan.device)
            )
            if found is not None:
                return found

    def _attend_rows(self, pieces: list[Tensor], top: int, mean: Tensor, variance: Tensor, plan: Plan) -> int:
        """As many rows from `top` as the plan allows; returns the first row that is left."""
        frames = [piece.shape[2] for piece in pieces]
        rows = slice(top, top + plan.rows(pieces[0][:, :, :1], STRIP_GROWTH * sum(frames)))
        strip = torch.cat([piece[..., rows, :].to(plan.device) for piece in pieces], dim=2)  # (B, C, T, r, W)
        pixels = rearrange(norm_with(self.norm, strip, mean, variance), "b c t h w -> (b h w) t c")
        batch = min(plan.items(pixels[0], ATTENTION_GROWTH), MAX_ATTENTION_BATCH)
        attended = torch.cat([self.attn(some) for some in pixels.split(batch)])
        strip += rearrange(attended, "(b h w) t c -> b c t h w", b=strip.shape[0], w=strip.shape[4])
        # All is made before anything is overwritten: running out of memory halfway would leave rows done twice.
        done = [part.to(piece.device) for part, piece in zip(strip.split(frames, dim=2), pieces, strict=True)]
        for piece, part in zip(pieces, done, strict=True):
            piece[..., rows, :] = part
        return top + strip.shape[3]


class TemporalAttention(nn.Module):
    def __init__(self, channels: int, head_dim: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = ops.Linear(channels, 3 * channels, bias=False, **factory)
        self.out = ops.Linear(channels, channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(pixels, T, C) to the same shape."""
        q, k, v = rearrange(self.qkv(x), "b t (qkv h d) -> qkv b h t d", qkv=3, d=self.head_dim)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(out, "b h t d -> b t (h d)"))
