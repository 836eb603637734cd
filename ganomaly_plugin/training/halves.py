"""Float32 numbers in half the bytes at TF32's precision: float16 ones, times a power of two of each model's own.

float16 has the ten bits that TF32 rounds to, but its least number is not far from its largest. Scaled by a power of two, so
that a model's largest number is near float16's, only numbers lose bits that are 2^28 times smaller than it, which sums do not
notice. Tensor cores take float16 at twice the speed, and factors of it as they lie in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_NUMBERS = 4096  # of a tile
_TILES = 4  # that a program measures


class Halved(NamedTuple):
    """Numbers of all models; a model's are `values · 2^-e`, where 2^e takes its `largest` number to between 2^14 and 2^15.

    `largest` may be larger than any number is: each power of two is one of 28 less by which small numbers keep all their bits.
    """

    values: Tensor
    largest: Tensor | None  # int32 (m,), the bits of a float32; None where the values are what they say


# They are operations of torch so that whoever watches operations, or fakes tensors, sees them. Maps are `(n, h, w, m, c)` and
# kernels `(m, o, r, s, c)`, contiguous. `activated` is what LeakyReLU of `slope` made of such maps: then `x` is a gradient with
# respect to it, and the gradient with respect to those maps is meant.


@torch.library.custom_op(
    "ganomaly_plugin::measure",
    mutates_args=(),
    schema="(Tensor x, bool is_kernels, Tensor? activated=None, float slope=1.0) -> Tensor",
)
def measure(x: Tensor, is_kernels: bool, activated: Tensor | None = None, slope: float = 1.0) -> Tensor:
    """Each model's largest magnitude, as `Halved` has it."""
    from ganomaly_plugin.training import halves_kernels

    largest = _measured(x, is_kernels).zero_()
    _launch(halves_kernels.measure, x, (activated, largest), is_kernels, slope, (_TILES,))
    return largest


@measure.register_fake
def _measured(x: Tensor, is_kernels: bool, activated: Tensor | None = None, slope: float = 1.0) -> Tensor:
    return x.new_empty(x.shape[0] if is_kernels else x.shape[3], dtype=torch.int32)


@torch.library.custom_op(
    "ganomaly_plugin::halve",
    mutates_args=(),
    schema="(Tensor x, Tensor largest, bool is_kernels, Tensor? activated=None, float slope=1.0) -> Tensor",
)
def halve(x: Tensor, largest: Tensor, is_kernels: bool, activated: Tensor | None = None, slope: float = 1.0) -> Tensor:
    """The values of `Halved`; `largest` must be no less than what is halved."""
    from ganomaly_plugin.training import halves_kernels

    halves = _halved(x, largest, is_kernels)
    _launch(halves_kernels.halve, x, (activated, largest, halves), is_kernels, slope, ())
    return halves


@halve.register_fake
def _halved(x: Tensor, largest: Tensor, is_kernels: bool, activated: Tensor | None = None, slope: float = 1.0) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float16)


def _launch(
    kernel: Any, x: Tensor, others: Sequence[Tensor | None], is_kernels: bool, slope: float, tiles: tuple[int, ...]
) -> None:
    if is_kernels:
        c = x.shape[4] if x.shape[4] >= 16 else x.shape[2:].numel()
        rows, strides = x[0].numel() // c, (c, x[0].numel())
    else:
        c, rows, strides = x.shape[4], x.shape[:3].numel(), (x.shape[3:].numel(), x.shape[4])
    across = min(128, 1 << (c - 1).bit_length())
    down = _NUMBERS // across
    models = len(x) if is_kernels else x.shape[3]
    grid = -(-rows // (down * math.prod(tiles))), models, -(-c // across)
    masked = others[0] is not None
    tensors = [x if each is None else each for each in (x, *others)]
    with torch.cuda.device_of(x):
        kernel[grid](*tensors, rows, *strides, slope, c, down, across, masked, *tiles, num_warps=4, enable_fp_fusion=True)


def halved(x: Tensor, *, is_kernels: bool = False, activated: Tensor | None = None, slope: float = 1.0) -> Halved:
    """Contiguous `x` in halves: as they were written with it, else by its largest magnitudes if known, else measured."""
    largest, halves = _known(x)
    if halves is not None and activated is None:
        return Halved(halves, largest)
    if largest is None or (activated is not None and slope > 1):  # then more is meant than was noted
        largest = measure(x, is_kernels, activated, slope)
    return Halved(halve(x, largest, is_kernels, activated, slope), largest)


def largest_of(maps: Tensor) -> Tensor:
    """Each model's largest magnitude in contiguous `maps`, or more than that: as it was noted, else measured."""
    largest, _ = _known(maps)
    return measure(maps, False) if largest is None else largest


def as_halves(maps: Tensor) -> Tensor:
    """`maps` in halves if they are known, for who looks at signs only; else as they are."""
    _, halves = _known(maps)
    return maps if halves is None else halves


def are_halved(maps: Tensor) -> bool:
    """Whether products of `maps` are of halves: in TF32."""
    return maps.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def to_note(like: Tensor, models: int, *, wanted: bool) -> Tensor:
    """Where the largest magnitudes of maps can be noted when they are made: zeros `(models,)`, `(0,)` if they aren't wanted."""
    return like.new_zeros(models if wanted else 0, dtype=torch.int32)


def to_halve(like: Tensor, shape: Sequence[int], *, wanted: bool) -> Tensor:
    """Where maps of a `shape` can be written in halves when they are made; `(0,)` if that isn't wanted."""
    return like.new_empty(shape if wanted else (0,), dtype=torch.float16)


# What was noted of maps, so that they need not be read again only to be measured, or halved. Maps changed later are not known.
_notes: dict[int, tuple[StorageWeakRef, int, Tensor, Tensor | None]] = {}


def remember(x: Tensor, largest: Tensor, halves: Tensor | None = None) -> Tensor:
    """`x`, which fills its storage; its `largest` magnitudes, if noted, and `halves`, if written, are known from now on."""
    if len(largest):
        forget_expired()
        storage = StorageWeakRef(x.untyped_storage())
        _notes[storage.cdata] = storage, x._version, largest, halves
    return x


def forget_expired() -> None:
    """Let go of what was noted of maps that are no more."""
    for key in [key for key, (storage, *_) in _notes.items() if storage.expired()]:
        del _notes[key]


def _known(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The largest magnitudes of `x` and `x` in halves, if they were noted."""
    note = _notes.get(StorageWeakRef(x.untyped_storage()).cdata)
    if note is None:
        return None, None
    storage, version, largest, halves = note
    if storage.expired() or x._version != version:
        return None, None
    return largest, halves if halves is not None and halves.shape == x.shape else None
