"""Triton kernels of `implicit`: convolutions of many models as products of matrices whose patches are never laid out.

All maps lie as `(n, h, w, m, c)` and all kernels as `(m, o, r, s, c)`: m models, c channels on the side of the larger map
(h × w), o on that of the smaller one (p × q), r × s taps. Row (n, p, q) and tap (r, s) meet at the pixel
(stride·p - padding + r, stride·q - padding + s); what lies outside is zero. Sums are in float32. Block sizes are powers of two.
Where one divides the channels c a block is of one tap, else it may be of several.

Factors of float16 are scaled, a power of two for each model, see `halves`: `largest_` names what it goes by, `largest` where
it is noted of the maps that are made, if NOTED. For other factors these are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ganomaly_plugin.training.halves_kernels import exponent, magnitude, number, power


@triton.jit
def _unscaled(sums, factors, largest, largest_others, model):
    if factors.dtype.element_ty == tl.float16:
        sums = sums * power(-exponent(tl.load(largest + model))) * power(-exponent(tl.load(largest_others + model)))
    return sums


@triton.jit
def _note(sums, largest, model, NOTED: tl.constexpr):
    if NOTED:
        tl.atomic_max(largest + model, tl.max(tl.max(magnitude(sums), 1), 0))


@triton.jit
def convolve(
    x,  # (n, h, w, m, c)
    kernels,  # (m, o, r, s, c)
    largest_x,
    largest_kernels,
    largest,  # of y, zeros at first
    y,  # (n, p, q, m, o)
    halves,  # (n, p, q, m, o), y in halves, written if HALVED, by the most that so few products can sum up to
    rows,  # n·p·q
    models,
    slope,  # of LeakyReLU, 1 for none
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
    ROUNDING: tl.constexpr,
    NOTED: tl.constexpr,
    HALVED: tl.constexpr,
):
    """Rows of pixels of `y` by columns of its channels, summed over taps and channels of `x`."""
    model = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(O, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    n = (row // (P * Q)).to(tl.int64)
    down, right = (row // Q % P) * STRIDE_H - PADDING_H, (row % Q) * STRIDE_W - PADDING_W
    k = tl.arange(0, SUMMED)
    images = x + (n * (H * W) * models + model)[:, None] * C + k[None, :]
    taps = kernels + (model * O + column)[None, :] * (R * S * C) + k[:, None]
    pixel = models * C
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, R * S * C, SUMMED):
        if C % SUMMED == 0:
            tap = start // C
            h, w = down + tap // S, right + tap % S
            inside = (row < rows) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            a = tl.load(images + ((h * W + w) * pixel + start - tap * C)[:, None], mask=inside[:, None], other=0.0)
        else:
            tap = ((start + k) // C)[None, :]
            h, w = down[:, None] + tap // S, right[:, None] + tap % S
            inside = (row < rows)[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            a = tl.load(images + (h * W + w) * pixel + start - tap * C, mask=inside, other=0.0)
        b = tl.load(taps + start, mask=column[None, :] < O, other=0.0)
        sums = tl.dot(a, b, sums, input_precision=ROUNDING)
    sums = _unscaled(sums, x, largest_x, largest_kernels, model)
    sums = tl.where(sums > 0, sums, sums * slope)
    to = (row.to(tl.int64) * models + model)[:, None] * O + column[None, :]
    is_y = (row < rows)[:, None] & (column < O)[None, :]
    tl.store(y + to, sums.to(y.dtype.element_ty), mask=is_y)
    if HALVED:
        most = number(tl.load(largest_x + model)) * number(tl.load(largest_kernels + model)) * (1.001 * R * S * C)
        tl.store(largest + model, magnitude(most))
        tl.store(halves + to, (sums * power(exponent(magnitude(most)))).to(tl.float16), mask=is_y)
    else:
        _note(sums, largest, model, NOTED)


@triton.jit
def spread(
    y,  # (n, p, q, m, o)
    kernels,  # (m, o, r, s, c)
    largest_y,
    largest_kernels,
    largest,  # of x, zeros at first
    x,  # (n, h, w, m, c)
    images,  # n
    models,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
    ROUNDING: tl.constexpr,
    NOTED: tl.constexpr,
):
    """Rows of pixels of `x` by columns of its channels, summed over channels of `y` and the taps that meet these pixels.

    Pixels with the same remainders by the strides, given by the third axis of the grid, meet the same taps.
    """
    model = tl.program_id(1).to(tl.int64)
    first_h, first_w = tl.program_id(2) // STRIDE_W, tl.program_id(2) % STRIDE_W  # the remainders
    height, width = tl.cdiv(H - first_h, STRIDE_H), tl.cdiv(W - first_w, STRIDE_W)  # of the pixels with these
    across = tl.cdiv(C, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = row < images * height * width
    n = (row // (height * width)).to(tl.int64)
    down, right = row // width % height, row % width
    top, left = down + (first_h + PADDING_H) // STRIDE_H, right + (first_w + PADDING_W) // STRIDE_W
    first_r, first_s = (first_h + PADDING_H) % STRIDE_H, (first_w + PADDING_W) % STRIDE_W
    taps_across: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W
    taps: tl.constexpr = (R + STRIDE_H - 1) // STRIDE_H * taps_across
    k = tl.arange(0, SUMMED)
    from_y = y + (n * (P * Q) * models + model)[:, None] * O + k[None, :]
    from_kernels = kernels + (model * O + k)[:, None] * (R * S * C) + column[None, :]
    pixel = models * O
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, taps * O, SUMMED):
        tap = start // O
        o = start - tap * O
        i, j = tap // taps_across, tap % taps_across
        p, q, r, s = top - i, left - j, first_r + STRIDE_H * i, first_s + STRIDE_W * j
        is_tap = (r < R) & (s < S)  # a stride that does not divide the kernel leaves some out
        inside = is_row & (p >= 0) & (p < tl.where(is_tap, P, 0)) & (q >= 0) & (q < Q)
        a = tl.load(from_y + ((p * Q + q) * pixel + o)[:, None], mask=inside[:, None], other=0.0)
        b = tl.load(from_kernels + (o * (R * S) + r * S + s) * C, mask=column[None, :] < tl.where(is_tap, C, 0), other=0.0)
        sums = tl.dot(a, b, sums, input_precision=ROUNDING)
    sums = _unscaled(sums, y, largest_y, largest_kernels, model)
    _note(sums, largest, model, NOTED)
    h, w = down * STRIDE_H + first_h, right * STRIDE_W + first_w
    to = x + (((n * H + h) * W + w) * models + model)[:, None] * C + column[None, :]
    tl.store(to, sums.to(x.dtype.element_ty), mask=is_row[:, None] & (column < C)[None, :])


@triton.jit
def correlate(
    x,  # (n, h, w, m, c)
    y,  # (n, p, q, m, o)
    largest_x,
    largest_y,
    kernels,  # (parts, m, o, r, s, c)
    rows,  # n·p·q
    models,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Rows of channels of `y` by columns of taps and channels of `x`; each part sums over its share of the pixels of `y`."""
    model = tl.program_id(1).to(tl.int64)
    part, parts = tl.program_id(2), tl.num_programs(2)
    across: tl.constexpr = R * S * C // COLUMNS
    o = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    start = (tl.program_id(0) % across) * COLUMNS
    column = tl.arange(0, COLUMNS)
    tap = start // C if C % COLUMNS == 0 else (start + column) // C  # of all columns, or of each
    down, right = tap // S - PADDING_H, tap % S - PADDING_W
    k = tl.arange(0, SUMMED)
    from_x = x + model * C + (start + column - tap * C)[None, :]
    from_y = y + model * O + o[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(part * SUMMED, rows, parts * SUMMED):
        row = first + k
        n = (row // (P * Q)).to(tl.int64)
        h, w = (row // Q % P) * STRIDE_H, (row % Q) * STRIDE_W
        if C % COLUMNS == 0:
            h, w = h + down, w + right
            inside = ((row < rows) & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            from_pixel = ((n * H + h) * W + w)[:, None] * models * C
        else:
            h, w = h[:, None] + down[None, :], w[:, None] + right[None, :]
            inside = (row < rows)[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            from_pixel = ((n[:, None] * H + h) * W + w) * models * C
        is_y = (row < rows)[None, :] & (o < O)[:, None]
        a = tl.load(from_y + row.to(tl.int64)[None, :] * models * O, mask=is_y, other=0.0)
        b = tl.load(from_x + from_pixel, mask=inside, other=0.0)
        sums = tl.dot(a, b, sums, input_precision=ROUNDING)
    sums = _unscaled(sums, x, largest_x, largest_y, model)
    to = kernels + ((part * models + model) * O + o)[:, None] * (R * S * C) + start + column[None, :]
    tl.store(to, sums, mask=(o < O)[:, None])


@triton.jit
def fold(
    patches,  # (n, p, q, m, r, s, c)
    x,  # (n, h, w, m, c)
    numbers,  # n·h·w·m·c
    models,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of patches where they overlap."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inner, pixel = at % (models * C), at // (models * C)
    h, w, n = pixel // W % H, pixel % W, pixel // (H * W)
    model, c = inner // C, inner % C
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range((R + STRIDE_H - 1) // STRIDE_H):
        for j in tl.static_range((S + STRIDE_W - 1) // STRIDE_W):
            r, s = (h + PADDING_H) % STRIDE_H + i * STRIDE_H, (w + PADDING_W) % STRIDE_W + j * STRIDE_W
            p, q = (h + PADDING_H - r) // STRIDE_H, (w + PADDING_W - s) // STRIDE_W
            inside = (at < numbers) & (r < R) & (s < S)
            inside &= (h + PADDING_H >= r) & (p < P) & (w + PADDING_W >= s) & (q < Q)
            place = (((n * P + p) * Q + q) * models + model) * (R * S * C) + (r * S + s) * C + c
            sums += tl.load(patches + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, sums.to(x.dtype.element_ty), mask=at < numbers)
