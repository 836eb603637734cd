"""Float32 numbers in half the bytes at TF32's precision: float16 ones, times a power of two of each model's own.

float16 has the ten bits that TF32 rounds to, but its least number is not far from its largest. Scaled by a power of two, so
that a model's largest number is near float16's, only numbers lose bits that are 2^28 times smaller than it, which sums do not
notice. Tensor cores take float16 at twice the speed, and factors of it as they lie in memory.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

_NUMBERS = 4096  # of a tile
_TILES = 4  # that a program measures


class Halved(NamedTuple):
    """Numbers of all models; a model's are `values · 2^-e`, where 2^e takes its `largest` number to between 2^14 and 2^15."""

    values: Tensor
    largest: Tensor | None  # int32 (m,), the bits of a float32; None where the values are what they say


# They are operations of torch so that whoever watches operations, or fakes tensors, sees them.


@torch.library.custom_op(
    "ganomaly_plugin::halve",
    mutates_args=(),
    schema="(Tensor x, bool is_kernels, Tensor? activated=None, float slope=1.0) -> (Tensor, Tensor)",
)
def halve(x: Tensor, is_kernels: bool, activated: Tensor | None = None, slope: float = 1.0) -> tuple[Tensor, Tensor]:
    """The parts of `Halved`, of maps `(n, h, w, m, c)` or kernels `(m, o, r, s, c)`, both contiguous.

    `activated` is what LeakyReLU of `slope` made of such maps: then `x` is a gradient with respect to it, and the gradient with
    respect to those maps is halved.
    """
    from ganomaly_plugin.training import halves_kernels

    halves, largest = _halved(x, is_kernels)
    largest.zero_()
    if is_kernels:
        c = x.shape[4] if x.shape[4] >= 16 else x.shape[2:].numel()
        rows, strides = x[0].numel() // c, (c, x[0].numel())
    else:
        c, rows, strides = x.shape[4], x.shape[:3].numel(), (x.shape[3:].numel(), x.shape[4])
    across = min(128, 1 << (c - 1).bit_length())
    down = _NUMBERS // across
    on = torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
    models, columns = len(largest), -(-c // across)
    given, masked = (x, x if activated is None else activated), activated is not None
    with on:
        grid = -(-rows // (down * _TILES)), models, columns
        halves_kernels.measure[grid](
            *given, largest, rows, *strides, slope, c, down, across, masked, _TILES, num_warps=4, enable_fp_fusion=True
        )
        grid = -(-rows // down), models, columns
        halves_kernels.halve[grid](
            *given, largest, halves, rows, *strides, slope, c, down, across, masked, num_warps=4, enable_fp_fusion=True
        )
    return halves, largest


@halve.register_fake
def _halved(x: Tensor, is_kernels: bool, activated: Tensor | None = None, slope: float = 1.0) -> tuple[Tensor, Tensor]:
    models = x.shape[0] if is_kernels else x.shape[3]
    return x.new_empty(x.shape, dtype=torch.float16), x.new_empty(models, dtype=torch.int32)
