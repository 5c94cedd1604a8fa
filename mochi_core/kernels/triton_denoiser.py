"""The denoiser's Triton kernels: computed in float32, rounded once when stored.

A program works on one token, in blocks whose sizes are powers of two; values beyond the width are masked. Arguments in capitals
are constants of the compiled kernel. `*_sample` and `*_token` are the strides of samples and tokens.
"""

import triton
import triton.language as tl


@triton.jit
def modulated_norm(
    x, scale, out, length, x_sample, x_token, scale_sample, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """rms_norm(x) * (1 + scale)."""
    row, sample, token = _place(length)
    column = tl.arange(0, BLOCK)
    valid = column < WIDTH
    values = _read(x + sample * x_sample + token * x_token + column, valid)
    factor = 1 + _read(scale + sample * scale_sample + column, valid)
    tl.store(out + row * WIDTH + column, _rms_norm(values, WIDTH, EPS) * factor, valid)


@triton.jit
def gated_residual(
    x, branch, gate, scale, out, normed, length, x_sample, x_token, branch_sample, branch_token, gate_sample, scale_sample,
    EPS: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x + rms_norm(branch) * tanh(gate); with NORM, also rms_norm of that times 1 + scale."""
    row, sample, token = _place(length)
    column = tl.arange(0, BLOCK)
    valid = column < WIDTH
    added = _rms_norm(_read(branch + sample * branch_sample + token * branch_token + column, valid), WIDTH, EPS)
    added *= _tanh(_read(gate + sample * gate_sample + column, valid))
    total = _read(x + sample * x_sample + token * x_token + column, valid) + added
    tl.store(out + row * WIDTH + column, total, valid)
    if NORM:
        factor = 1 + _read(scale + sample * scale_sample + column, valid)
        tl.store(normed + row * WIDTH + column, _rms_norm(total, WIDTH, EPS) * factor, valid)


@triton.jit
def swiglu(packed, out, length, packed_sample, packed_token, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * value for one block of one token; the grid's second axis runs over the blocks."""
    row, sample, token = _place(length)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < WIDTH
    start = packed + sample * packed_sample + token * packed_token
    gate = _read(start + column, valid)
    value = _read(start + WIDTH + column, valid)
    tl.store(out + row * WIDTH + column, gate / (1 + tl.exp(-gate)) * value, valid)


@triton.jit
def final_norm(
    x, shift, scale, out, length, x_sample, x_token, shift_sample, scale_sample,
    EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """layer_norm(x) * (1 + scale) + shift."""
    row, sample, token = _place(length)
    column = tl.arange(0, BLOCK)
    valid = column < WIDTH
    values = _read(x + sample * x_sample + token * x_token + column, valid)
    centred = tl.where(valid, values - tl.sum(values) / WIDTH, 0)
    factor = 1 + _read(scale + sample * scale_sample + column, valid)
    offset = _read(shift + sample * shift_sample + column, valid)
    tl.store(out + row * WIDTH + column, _rms_norm(centred, WIDTH, EPS) * factor + offset, valid)


@triton.jit
def quantize_rows(x, values, scale, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """One row divided by its scale, as float8_e4m3fn bytes; a row of zeros gets scale 1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < WIDTH
    numbers = _read(x + row * x_row + column, valid)
    factor = tl.div_rn(tl.max(tl.abs(numbers)), LARGEST)
    factor = tl.where(factor == 0, 1.0, factor)
    tl.store(scale + row, factor)
    tl.store(values + row * WIDTH + column, _e4m3_bytes(tl.div_rn(numbers, factor)), valid)


@triton.jit
def joint_heads(
    visual, text, q_norm_x, k_norm_x, q_norm_y, k_norm_y, frames, spatial, out,
    tokens, num_visual, num_frames, num_patches, skipped, visual_sample, visual_token, text_sample, text_token, out_third,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr
):  # fmt: skip
    """Some heads of one token: q and k are normed and, for a visual token, rotated; v is copied.

    If all frames are complete, consecutive programs take the same patch in all frames, so that its spatial rotation is cached.
    """
    _, sample, place = _place(tokens)
    is_visual = place < num_visual
    whole, position = num_visual == num_frames * num_patches, place + skipped
    frame = tl.where(whole, place % num_frames, position // num_patches)
    patch = tl.where(whole, place // num_frames, position % num_patches)
    token = tl.where(is_visual, frame * num_patches + patch - skipped, place)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    feature = tl.arange(0, FEATURES)[None, :]
    valid = (head < HEADS) & (feature < HEAD_DIM)
    column = head * HEAD_DIM + feature
    valid_x, valid_y = valid & is_visual, valid & (place >= num_visual)
    own_x, own_y = (feature < HEAD_DIM) & is_visual, (feature < HEAD_DIM) & (place >= num_visual)
    source_x = visual + sample * visual_sample + token * visual_token + column
    source_y = text + sample * text_sample + (token - num_visual) * text_token + column
    target = out + (sample * tokens + token) * (HEADS * HEAD_DIM) + column

    of_frame = _read(frames + frame * (HEADS * HEAD_DIM) + column, valid_x)
    of_patch = _read(spatial + patch * (HEADS * HEAD_DIM) + column, valid_x)
    rotation = tl.where(is_visual, _complex_mul(of_frame, of_patch), (feature % 2 == 0).to(tl.float32))  # text: 1 + 0i
    for i in tl.static_range(3):  # pyright: ignore[reportGeneralTypeIssues] - Triton unrolls it
        values = _read(source_x + i * HEADS * HEAD_DIM, valid_x) + _read(source_y + i * HEADS * HEAD_DIM, valid_y)
        if i < 2:
            norm_x, norm_y = (q_norm_x, q_norm_y) if i == 0 else (k_norm_x, k_norm_y)
            weight = _read(norm_x + feature, own_x) + _read(norm_y + feature, own_y)
            values = _complex_mul(_rms_norm(values, HEAD_DIM, EPS) * weight, rotation)
        tl.store(target, values, valid)
        target += out_third


@triton.jit
def _place(length):
    """This program's row among all tokens, its sample, and its token within it; 64 bits, as offsets may need them."""
    row = tl.program_id(0).to(tl.int64)
    return row, row // length, row % length


@triton.jit
def _read(pointers, valid):
    return tl.load(pointers, valid, 0).to(tl.float32)


@triton.jit
def _rms_norm(x, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Norm over the last axis; values beyond the width must be 0. `_rn` operations are correctly rounded, others may not be."""
    square = tl.sum(x * x, axis=-1, keep_dims=True) / WIDTH
    return x * tl.div_rn(1.0, tl.sqrt_rn(square + EPS))


@triton.jit
def _complex_mul(a, b):
    """Multiply two matrices elementwise, taking neighbouring pairs as complex numbers."""
    real, imaginary = tl.split(tl.reshape(a, a.shape[0], a.shape[1] // 2, 2))
    cos, sin = tl.split(tl.reshape(b, b.shape[0], b.shape[1] // 2, 2))
    joined = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    return tl.reshape(joined, a.shape[0], a.shape[1])


@triton.jit
def _tanh(x):
    """tanh; near 0 by Cephes' polynomial (tanhf.c), because 1 - 2 / (exp(2x) + 1) loses precision there."""
    square = x * x
    series = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    series = ((series + 1.33314422036e-1) * square - 3.33332819422e-1) * square
    magnitude = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, x + x * series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def _e4m3_bytes(x):
    """float32 up to a magnitude of 448 to float8_e4m3fn bytes, rounded to nearest, ties to even.

    By hand, because Triton converts to fp8 only on cards that can multiply in it.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    even = (magnitude >> 20) & 1
    normal = ((magnitude + 0x7FFFF + even) >> 20) - (120 << 3)  # 3 mantissa bits; exponent bias 7 instead of 127
    # Below 2 ** -6, all values are multiples of 2 ** -9, to which float32 rounds when 2 ** 14 is added.
    tiny = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    found = tl.where(magnitude < 0x3C800000, tiny, normal)
    found = tl.where(magnitude > 0x7F800000, 0x7F, found)  # NaN
    return (found | ((bits >> 24) & 0x80)).to(tl.uint8)
