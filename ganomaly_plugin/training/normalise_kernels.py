"""Triton kernels of `normalise`: BatchNorm in training and the LeakyReLU after it, forwards and backwards.

Maps are matrices: `rows` of pixels by `columns` of all models' channels, a row after another in memory. A program takes a block
of columns and one of CHUNKS chunks of rows, each of `chunk` rows but the last ones. What it sums of a chunk lies in `parts`
`(2, CHUNKS, columns)`, and each program of the following kernel puts the chunks together for its own columns. That kernel goes
through a chunk from its end, which was read last and may still be in the cache. Sums are in float32.

A slope of 0 makes ReLU of LeakyReLU, a slope of 1 leaves it out.

If HALVED the maps that are made are also written as float16, see `halves`. How large they can become is known before they are:
of `rows` numbers none is further than sqrt(rows) standard deviations from their mean. So `largest` `(models,)`, zeros at first,
is written by the first kernel of two and read by the second. `reach` is that root, a little rounded up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ganomaly_plugin.training.halves_kernels import exponent, magnitude, number, power


@triton.jit
def _put_together(counts, means, squares):
    """Of parts with so many numbers `(k,)`, their means and sums of squared deviations `(k, c)`: those of all, `(c,)` each."""
    shares = (counts / tl.sum(counts, 0))[:, None]
    mean = tl.sum(means * shares, 0)
    mean += tl.sum((means - mean[None, :]) * shares, 0)  # which rounding took from it
    apart = means - mean[None, :]
    return mean, tl.sum(squares + apart * apart * counts[:, None], 0)


@triton.jit
def _load_parts(parts, column, columns, CHUNKS: tl.constexpr):
    """Both sums of each chunk, `(CHUNKS, c)` each."""
    at = parts + tl.arange(0, CHUNKS)[:, None] * columns + column[None, :]
    is_column = (column < columns)[None, :]
    return tl.load(at, mask=is_column, other=0.0), tl.load(at + CHUNKS * columns, mask=is_column, other=0.0)


@triton.jit
def _store_parts(parts, one, other, column, columns, CHUNKS: tl.constexpr):
    at = parts + tl.program_id(1) * columns + column
    tl.store(at, one, mask=column < columns)
    tl.store(at + CHUNKS * columns, other, mask=column < columns)


@triton.jit
def _load_layer(saved_mean, saved_scale, weight, bias, column, is_column):
    """What was done to these columns: their mean `(1, c)`, scale `(c,)`, and the factor and shift `(1, c)` of what was left."""
    mean = tl.load(saved_mean + column, mask=is_column, other=0.0)[None, :]
    scale = tl.load(saved_scale + column, mask=is_column, other=0.0)
    by = (scale * tl.load(weight + column, mask=is_column, other=0.0))[None, :]
    return mean, scale, by, tl.load(bias + column, mask=is_column, other=0.0)[None, :]


@triton.jit
def _note(most, largest, column, columns, models):
    """Note the largest magnitude `(COLUMNS,)` that the numbers of each column can have."""
    tl.atomic_max(largest + column // (columns // models), magnitude(most), mask=column < columns)


@triton.jit
def _scale(largest, column, columns, models):
    """The powers of two `(1, COLUMNS)` by which the halves of each column are multiplied."""
    bits = tl.load(largest + column // (columns // models), mask=column < columns, other=0)
    return power(exponent(bits))[None, :]


@triton.jit
def measure(
    x,  # (rows, columns)
    weight,  # (columns,), as the next
    bias,
    largest,
    parts,  # (2, CHUNKS, columns), written: means and sums of squared deviations from them
    rows,
    columns,
    chunk,
    reach,
    models,
    HALVED: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each chunk's statistics, by Welford's algorithm: its own for each of ROWS rows, a step for each ROWS further on."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    first = tl.program_id(1) * chunk
    held = tl.maximum(tl.minimum(chunk, rows - first), 0)
    is_column = (column < columns)[None, :]
    offsets = row[:, None] * columns + column[None, :]
    means = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, tl.cdiv(held, ROWS), num_stages=STAGES):
        is_row = (k * ROWS + row < held)[:, None]
        from_x = x + (first + k * ROWS).to(tl.int64) * columns + offsets
        value = tl.load(from_x, mask=is_row & is_column, other=0.0).to(tl.float32)
        apart = tl.where(is_row, value - means, 0.0)
        means += apart * (1.0 / (k + 1))
        squares += apart * (value - means)
    counts = ((held - row + ROWS - 1) // ROWS).to(tl.float32)
    mean, square = _put_together(tl.where(held > 0, counts, 1.0), means, squares)
    _store_parts(parts, mean, square, column, columns, CHUNKS)
    if HALVED and tl.program_id(1) == 0:
        most = tl.abs(tl.load(weight + column, mask=column < columns, other=0.0)) * reach
        most += tl.abs(tl.load(bias + column, mask=column < columns, other=0.0))
        _note(most, largest, column, columns, models)


@triton.jit
def normalise(
    x,  # (rows, columns)
    weight,  # (columns,), as all that follow but y
    bias,
    parts,  # of `measure`
    largest,
    y,  # (rows, columns), written
    halves,  # (rows, columns), written
    saved_mean,  # written
    saved_scale,  # written: 1 / standard deviation
    running_mean,  # updated
    running_var,  # updated
    rows,
    columns,
    chunk,
    momentum,
    eps,
    slope,
    models,
    HALVED: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows of `y`; the programs of the first chunk also write the statistics."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    is_column = column < columns
    means, squares = _load_parts(parts, column, columns, CHUNKS)
    counts = tl.maximum(tl.minimum(chunk, rows - tl.arange(0, CHUNKS) * chunk), 0).to(tl.float32)
    mean, square = _put_together(counts, means, squares)
    scale = 1.0 / tl.sqrt_rn(square / rows + eps)
    if tl.program_id(1) == 0:
        tl.store(saved_mean + column, mean, mask=is_column)
        tl.store(saved_scale + column, scale, mask=is_column)
        old_mean = tl.load(running_mean + column, mask=is_column, other=0.0)
        old_var = tl.load(running_var + column, mask=is_column, other=0.0)
        tl.store(running_mean + column, (1.0 - momentum) * old_mean + momentum * mean, mask=is_column)
        tl.store(running_var + column, (1.0 - momentum) * old_var + momentum * (square / (rows - 1)), mask=is_column)
    by = (scale * tl.load(weight + column, mask=is_column, other=0.0))[None, :]
    shift = tl.load(bias + column, mask=is_column, other=0.0)[None, :]
    first = tl.program_id(1) * chunk
    held = tl.maximum(tl.minimum(chunk, rows - first), 0)
    offsets = row[:, None] * columns + column[None, :]
    steps = tl.cdiv(held, ROWS)
    by_halves = _scale(largest, column, columns, models) if HALVED else tl.zeros((1, COLUMNS), tl.float32)
    for k in tl.range(0, steps, num_stages=STAGES):
        start = (steps - 1 - k) * ROWS
        inside = (start + row < held)[:, None] & is_column[None, :]
        there = (first + start).to(tl.int64) * columns
        apart = tl.load(x + there + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        z = apart * by + shift
        z = tl.where(z > 0, z, z * slope)
        tl.store(y + there + offsets, z.to(y.dtype.element_ty), mask=inside)
        if HALVED:
            tl.store(halves + there + offsets, (z * by_halves).to(tl.float16), mask=inside)


@triton.jit
def measure_gradients(
    x,  # (rows, columns)
    gradient,  # (rows, columns), with respect to y
    weight,  # (columns,), as the three that follow
    bias,
    saved_mean,
    saved_scale,
    largest_gradient,  # (models,)
    largest,
    parts,  # (2, CHUNKS, columns), written
    rows,
    columns,
    chunk,
    slope,
    reach,
    models,
    HALVED: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each chunk's share in the gradients with respect to bias and weight."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    is_column = column < columns
    mean, scale, by, shift = _load_layer(saved_mean, saved_scale, weight, bias, column, is_column)
    first = tl.program_id(1) * chunk
    held = tl.maximum(tl.minimum(chunk, rows - first), 0)
    offsets = row[:, None] * columns + column[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, tl.cdiv(held, ROWS), num_stages=STAGES):
        inside = (k * ROWS + row < held)[:, None] & is_column[None, :]
        there = (first + k * ROWS).to(tl.int64) * columns
        apart = tl.load(x + there + offsets, mask=inside, other=0.0).to(tl.float32) - mean
        g = tl.load(gradient + there + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(apart * by + shift > 0, g, g * slope)
        sums += g
        products += g * apart
    _store_parts(parts, tl.sum(sums, 0), tl.sum(products, 0) * scale, column, columns, CHUNKS)
    if HALVED and tl.program_id(1) == 0:
        # what is made is `by` times g, less a mean of g, less a deviation times a mean of products with deviations
        steepest = number(tl.load(largest_gradient + column // (columns // models), mask=is_column, other=0))
        _note(tl.abs(tl.sum(by, 0)) * (2.0 + reach) * steepest, largest, column, columns, models)


@triton.jit
def differentiate(
    x,  # (rows, columns)
    gradient,  # (rows, columns), with respect to y
    weight,  # (columns,), as the three that follow
    bias,
    saved_mean,
    saved_scale,
    parts,  # of `measure_gradients`
    largest,
    to_x,  # (rows, columns), written
    halves,  # (rows, columns), written
    to_weight,  # (columns,), written
    to_bias,  # (columns,), written
    rows,
    columns,
    chunk,
    slope,
    models,
    HALVED: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows of the gradient with respect to `x`; the programs of the first chunk also write those of weight and bias."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    is_column = column < columns
    sums, products = _load_parts(parts, column, columns, CHUNKS)
    of_bias, of_weight = tl.sum(sums, 0), tl.sum(products, 0)
    if tl.program_id(1) == 0:
        tl.store(to_bias + column, of_bias, mask=is_column)
        tl.store(to_weight + column, of_weight, mask=is_column)
    mean, scale, by, shift = _load_layer(saved_mean, saved_scale, weight, bias, column, is_column)
    even, steep = (of_bias / rows)[None, :], (of_weight * scale / rows)[None, :]
    first = tl.program_id(1) * chunk
    held = tl.maximum(tl.minimum(chunk, rows - first), 0)
    offsets = row[:, None] * columns + column[None, :]
    steps = tl.cdiv(held, ROWS)
    by_halves = _scale(largest, column, columns, models) if HALVED else tl.zeros((1, COLUMNS), tl.float32)
    for k in tl.range(0, steps, num_stages=STAGES):
        start = (steps - 1 - k) * ROWS
        inside = (start + row < held)[:, None] & is_column[None, :]
        there = (first + start).to(tl.int64) * columns
        apart = tl.load(x + there + offsets, mask=inside, other=0.0).to(tl.float32) - mean
        g = tl.load(gradient + there + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(apart * by + shift > 0, g, g * slope)
        made = (g - even - apart * steep) * by
        tl.store(to_x + there + offsets, made.to(to_x.dtype.element_ty), mask=inside)
        if HALVED:
            tl.store(halves + there + offsets, (made * by_halves).to(tl.float16), mask=inside)
