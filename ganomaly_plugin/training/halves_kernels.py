"""Triton kernels of `halves`: float32 numbers as float16 ones times a power of two, a model's own.

A model's numbers are `rows` of C that lie side by side, `row_stride` apart, a model's `model_stride` behind those of the one
before. `largest` `(m,)` holds the bits of each model's largest magnitude, which sort as the numbers do, or of more than that.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponent(bits):
    """The power of two that takes the number of these bits to between 2^14 and 2^15, near the largest float16."""
    return tl.minimum(tl.maximum(14 + 127 - (bits >> 23), -100), 100)


@triton.jit
def power(exponent):
    """2^exponent."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def number(bits):
    """The float32 of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """The bits of a float32's magnitude. A number that is none counts as larger than all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _load(x, activated, at, inside, slope, MASKED: tl.constexpr):
    value = tl.load(x + at, mask=inside, other=0.0)
    if MASKED:
        value = tl.where(tl.load(activated + at, mask=inside, other=1.0) > 0, value, value * slope)
    return value


@triton.jit
def measure(
    x,
    activated,  # read if MASKED: what LeakyReLU made of the numbers with respect to which x becomes a gradient
    largest,  # (m,), zeros at first
    rows,
    row_stride,
    model_stride,
    slope,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    TILES: tl.constexpr,
):
    """Each model's largest magnitude."""
    model = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    most = tl.zeros((ROWS, COLUMNS), tl.int32)
    for tile in tl.static_range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < C)[None, :]
        at = model.to(tl.int64) * model_stride + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        most = tl.maximum(most, magnitude(_load(x, activated, at, inside, slope, MASKED)))
    tl.atomic_max(largest + model, tl.max(tl.max(most, 1), 0))


@triton.jit
def halve(
    x,
    activated,
    largest,  # (m,)
    halves,  # float16, written as x lies
    rows,
    row_stride,
    model_stride,
    slope,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows of `halves`; those first that were measured last, as they may still be in the cache."""
    model = tl.num_programs(1) - 1 - tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    at = model.to(tl.int64) * model_stride + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    scaled = _load(x, activated, at, inside, slope, MASKED) * power(exponent(tl.load(largest + model)))
    tl.store(halves + at, scaled.to(tl.float16), mask=inside)
