"""Convolutions of many models by kernels of our own, which read the patches where they lie: implicit matrix products.

What `products` lays out in memory, and reads again, is most of what it moves. These kernels leave only layers of a single place
to it. They need a GPU and Triton, which torch brings along on Linux. Their factors are such as tensor cores take: of bfloat16
as they are, in TF32 as halves (see `halves`), and those of float32 as three parts of bfloat16 each, of whose products the six
largest are summed: as exact as float32's own, and faster.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ganomaly_plugin.training.halves import Halved, are_halved, as_halves, halved, remember, to_halve, to_note
from ganomaly_plugin.training.products import Geometry, is_wanted

_WIDTH = 16  # tensor cores take numbers of channels that are multiples of this
_MOST = 128  # numbers along a side of a block of the result
_DEPTH = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # numbers that a block sums at once: 128 bytes
_MAPS = (torch.float32, torch.bfloat16)  # what maps may be
Operation: TypeAlias = Callable[[Halved, Halved, Sequence[int]], Tensor]
_FEW = 64  # products: sums of so many are not much less than what they can be at most
_ENOUGH = 512  # blocks that keep a GPU busy: for fewer results than that, sums are cut into parts


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton was told (TRITON_INTERPRET=1) to carry kernels out on the CPU, slowly, to show what they compute."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def suits(x: Tensor, models: int, channels: Sequence[int], geometry: Geometry) -> bool:
    """Whether the kernels take a convolution of maps like `x` with so many `channels` on the small side, and on the large."""
    o, c = channels
    countable = math.prod(geometry.size) * models * max(channels) < 2**31  # places within an image
    here = x.device.type == "cuda" or is_interpreted()
    even = o % _WIDTH == 0 and _at_once(c, math.prod(geometry.kernel)) % _WIDTH == 0
    return here and even and countable and x.dtype in _MAPS and geometry.places != (1, 1)


def _at_once(channels: int, taps: int) -> int:
    """Numbers that lie side by side in a kernel and of which a block may take any: a tap's, or all where taps are narrow."""
    return channels if channels >= _WIDTH else channels * taps


def _numbers(geometry: Geometry) -> list[int]:
    """A geometry as operations of torch can be given it."""
    return [*geometry.size, *geometry.kernel, *geometry.stride, *geometry.padding]


def _geometry(numbers: Sequence[int]) -> Geometry:
    size, kernel, stride, padding = zip(numbers[::2], numbers[1::2], strict=True)
    return Geometry(size, kernel, stride, padding)


# They are operations of torch so that whoever watches operations, or fakes tensors, sees them. Factors of float16 come with
# what they are scaled by, and of maps that are made of them `largest` is noted, as `halves` has it. No argument has a default:
# torch 2.11 leaves out arguments that are as their default, and then looks for those that are changed in place.
_FACTORS = "int[] geometry, Tensor? largest_one, Tensor? largest_other"
_NOTED = "Tensor(a!) largest"


@torch.library.custom_op(
    "ganomaly_plugin::convolve",
    mutates_args=("largest",),
    schema=f"(Tensor x, Tensor kernels, {_FACTORS}, {_NOTED}, float slope, bool with_halves) -> (Tensor, Tensor)",
)
def convolve(
    x: Tensor,
    kernels: Tensor,
    geometry: Sequence[int],
    largest_one: Tensor | None,
    largest_other: Tensor | None,
    largest: Tensor,
    slope: float,
    with_halves: bool,
) -> tuple[Tensor, Tensor]:
    """`(n, h, w, m, c)` → `(n, p, q, m, o)`, and LeakyReLU of it, unless its slope is 1; and that in halves, if wanted.

    Then `largest` is not what the maps have but the most that they can have, which is near it for sums of few products only.
    """
    from ganomaly_plugin.training import implicit_kernels

    y, halves = _convolved(x, kernels, geometry, largest_one, largest_other, largest, slope, with_halves)
    rows, (models, o), c = y.shape[:3].numel(), y.shape[3:], x.shape[4]
    block = _side(rows), _side(o, _across(x)), _dividing(_at_once(c, kernels.shape[2:4].numel()), _DEPTH[x.dtype])
    tiles = -(-rows // block[0]) * -(-o // block[1])
    factors, flags = (x, kernels, largest_one, largest_other, largest, y), (len(largest) > 0, with_halves)
    _multiply(
        implicit_kernels.convolve, (tiles, models), factors, halves, (rows, models, slope), (c, o), geometry, block, *flags
    )
    return y, halves


@convolve.register_fake
def _convolved(
    x: Tensor,
    kernels: Tensor,
    geometry: Sequence[int],
    largest_one: Tensor | None,
    largest_other: Tensor | None,
    largest: Tensor,
    slope: float,
    with_halves: bool,
) -> tuple[Tensor, Tensor]:
    shape = len(x), *_geometry(geometry).places, *kernels.shape[:2]
    return x.new_empty(shape, dtype=_of_products(x)), to_halve(x, shape, wanted=with_halves)


@torch.library.custom_op(
    "ganomaly_plugin::spread", mutates_args=("largest",), schema=f"(Tensor y, Tensor kernels, {_FACTORS}, {_NOTED}) -> Tensor"
)
def spread(
    y: Tensor,
    kernels: Tensor,
    geometry: Sequence[int],
    largest_one: Tensor | None,
    largest_other: Tensor | None,
    largest: Tensor,
) -> Tensor:
    """`(n, p, q, m, o)` → `(n, h, w, m, c)`, which is `convolve` transposed."""
    from ganomaly_plugin.training import implicit_kernels

    x = _spread_out(y, kernels, geometry, largest_one, largest_other, largest)
    (height, width), (down, across) = _geometry(geometry).size, _geometry(geometry).stride
    rows = len(x) * -(-height // down) * -(-width // across)  # pixels that meet the same taps, at most
    models, c, o = x.shape[3], x.shape[4], y.shape[4]
    block = _side(rows), _side(c, _across(y)), _dividing(o, _DEPTH[y.dtype])
    grid = -(-rows // block[0]) * -(-c // block[1]), models, down * across
    factors = y, kernels, largest_one, largest_other, largest
    _multiply(implicit_kernels.spread, grid, factors, x, (len(x), models), (c, o), geometry, block, len(largest) > 0)
    return x


@spread.register_fake
def _spread_out(
    y: Tensor,
    kernels: Tensor,
    geometry: Sequence[int],
    largest_one: Tensor | None,
    largest_other: Tensor | None,
    largest: Tensor,
) -> Tensor:
    return y.new_empty(len(y), *_geometry(geometry).size, len(kernels), kernels.shape[4], dtype=_of_products(y))


@torch.library.custom_op("ganomaly_plugin::correlate", mutates_args=(), schema=f"(Tensor x, Tensor y, {_FACTORS}) -> Tensor")
def correlate(
    x: Tensor,
    y: Tensor,
    geometry: Sequence[int],
    largest_one: Tensor | None,
    largest_other: Tensor | None,
) -> Tensor:
    """`(n, h, w, m, c)` and `(n, p, q, m, o)` → `(m, o, r, s, c)`, the gradient with respect to kernels, as float32."""
    from ganomaly_plugin.training import implicit_kernels

    models, o, r, s, c = _correlated(x, y, geometry, largest_one, largest_other).shape
    rows = y.shape[:3].numel()
    block = _side(o), _dividing(r * s * c, _across(x)), _DEPTH[x.dtype]
    tiles = -(-o // block[0]) * (r * s * c // block[1])
    parts = max(1, min(_ENOUGH // (tiles * models), rows // (8 * block[2])))
    sums = x.new_empty(parts, models, o, r, s, c, dtype=torch.float32)
    factors = x, y, largest_one, largest_other
    _multiply(implicit_kernels.correlate, (tiles, models, parts), factors, sums, (rows, models), (c, o), geometry, block)
    return sums[0] if parts == 1 else sums.sum(0)


@correlate.register_fake
def _correlated(
    x: Tensor,
    y: Tensor,
    geometry: Sequence[int],
    largest_one: Tensor | None,
    largest_other: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[3], y.shape[4], *_geometry(geometry).kernel, x.shape[4], dtype=torch.float32)


def _of_products(factors: Tensor) -> torch.dtype:
    return torch.float32 if factors.dtype == torch.float16 else factors.dtype


@torch.library.custom_op("ganomaly_plugin::fold", mutates_args=(), schema="(Tensor patches, int[] geometry) -> Tensor")
def fold(patches: Tensor, geometry: Sequence[int]) -> Tensor:
    """`(n, p, q, m, r·s·c)` → `(n, h, w, m, c)`, the sum of patches where they overlap."""
    from ganomaly_plugin.training import implicit_kernels

    x, block = _folded(patches, geometry), 1024
    grid = (-(-x.numel() // block),)
    _launch(implicit_kernels.fold, grid, (patches, x), (x.numel(), x.shape[3]), geometry, x.shape[4:], (block,), 4)
    return x


@fold.register_fake
def _folded(patches: Tensor, geometry: Sequence[int]) -> Tensor:
    its, (models, numbers) = _geometry(geometry), patches.shape[3:]
    return patches.new_empty(len(patches), *its.size, models, numbers // math.prod(its.kernel))


def _function(
    forward: Callable[[Halved, Halved, Sequence[int], float], Tensor], backward: Operation, of_kernels: Operation
) -> Callable[[Tensor, Tensor, Geometry, float], Tensor]:
    """A function of maps and float32 kernels, which are rounded to the type of the maps, with gradients; then LeakyReLU.

    `backward` is `forward` transposed, `of_kernels` the gradient with respect to kernels of (maps, gradient).
    """

    class OfAll(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, maps: Tensor, kernels: Tensor, geometry: Geometry, slope: float) -> Tensor:
            ctx.halves = are_halved(maps)
            one, other = _factor(maps, ctx.halves), _factor(kernels.to(maps.dtype), ctx.halves, is_kernels=True)
            ctx.geometry, ctx.slope = _numbers(geometry), slope
            answer = forward(one, other, ctx.geometry, slope)
            ctx.save_for_backward(*one, *other, None if slope == 1 else as_halves(answer))
            return answer

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            *saved, answer = ctx.saved_tensors
            maps, kernels, gradient = Halved(*saved[:2]), Halved(*saved[2:]), gradients[0].contiguous()
            if ctx.halves:
                factor = halved(gradient, activated=answer, slope=ctx.slope)
            elif answer is None:
                factor = Halved(gradient, None)
            else:
                factor = Halved(torch.ops.aten.leaky_relu_backward(gradient, answer, ctx.slope, True), None)
            to_maps = backward(factor, kernels, ctx.geometry) if is_wanted(ctx, 0) else None
            to_kernels = of_kernels(maps, factor, ctx.geometry) if is_wanted(ctx, 1) else None
            return to_maps, to_kernels, None, None

    return OfAll.apply


def _factor(values: Tensor, halves: bool, *, is_kernels: bool = False) -> Halved:
    values = values.contiguous()
    return halved(values, is_kernels=is_kernels) if halves else Halved(values, None)


def _convolve(x: Halved, kernels: Halved, geometry: Sequence[int], slope: float = 1.0, *, noted: bool = True) -> Tensor:
    largest = to_note(x.values, x.values.shape[3], wanted=noted and x.largest is not None)
    few = kernels.values.shape[2:].numel() <= _FEW and slope < 1 and len(largest) > 0
    y, halves = convolve(x.values, kernels.values, geometry, x.largest, kernels.largest, largest, slope, few)
    return remember(y, largest, halves)


def _spread(y: Halved, kernels: Halved, geometry: Sequence[int], *, noted: bool = True) -> Tensor:
    """`spread`; towards maps of few channels, which would leave its blocks all but empty, by way of patches."""
    if kernels.values.shape[4] >= _WIDTH:
        largest = to_note(y.values, y.values.shape[3], wanted=noted and y.largest is not None)
        return remember(spread(y.values, kernels.values, geometry, y.largest, kernels.largest, largest), largest)
    by_pixel = _numbers(Geometry(_geometry(geometry).places, (1, 1), (1, 1), (0, 0)))
    taps = kernels.values.flatten(2).transpose(1, 2).contiguous()[:, :, None, None]  # (m, r·s·c, 1, 1, o)
    return fold(_convolve(y, Halved(taps, kernels.largest), by_pixel, noted=False), geometry)


def _correlate(x: Halved, y: Halved, geometry: Sequence[int]) -> Tensor:
    return correlate(x.values, y.values, geometry, x.largest, y.largest)


def _correlate_turned(y: Halved, x: Halved, geometry: Sequence[int]) -> Tensor:
    return _correlate(x, y, geometry)


def _convolve_forwards(x: Halved, kernels: Halved, geometry: Sequence[int], slope: float) -> Tensor:
    """Noted is what an activation leaves, for the next convolution; without one BatchNorm comes first, and notes."""
    return _convolve(x, kernels, geometry, slope, noted=slope != 1)


def _spread_forwards(y: Halved, kernels: Halved, geometry: Sequence[int], slope: float) -> Tensor:
    assert slope == 1, "nothing after `spread` is carried out with it"
    return _spread(y, kernels, geometry, noted=False)


#: Of all models: maps `(n, h, w, m, c)` and kernels `(m, o, r, s, c)` → `(n, p, q, m, o)`, then LeakyReLU.
conv2d = _function(_convolve_forwards, _spread, _correlate)
#: Of all models: maps `(n, p, q, m, o)` and kernels `(m, o, r, s, c)` → `(n, h, w, m, c)`; the slope must be 1.
conv_transpose2d = _function(_spread_forwards, _convolve, _correlate_turned)


def _side(numbers: int, most: int = _MOST) -> int:
    """How many of so many numbers a block of the result takes: a power of two, the last block may reach beyond."""
    return min(most, max(_WIDTH, 1 << (numbers - 1).bit_length()))


def _across(factors: Tensor) -> int:
    """The most columns of a block."""
    return _MOST // 2 if factors.dtype == torch.float32 else _MOST


def _dividing(numbers: int, most: int) -> int:
    """The largest power of two that divides `numbers`, or `most`."""
    return min(most, numbers & -numbers)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],  # those that are read and one that is written
    numbers: Sequence[float],  # how many rows, images or numbers, and how many models, first
    geometry: Sequence[int],
    channels: Sequence[int],
    block: Sequence[Any],
    warps: int,
) -> None:
    *given, made = tensors
    with torch.cuda.device_of(made):
        kernel[grid](
            *(tensor.contiguous() for tensor in given),
            made,
            *numbers,
            *geometry[:2],
            *_geometry(geometry).places,
            *channels,
            *geometry[2:],
            *block,
            num_warps=warps,
            num_stages=3,
            enable_fp_fusion=True,
        )


def _multiply(
    kernel: Any,
    grid: tuple[int, ...],
    factors: Sequence[Tensor | None],  # the first is one
    made: Tensor,
    numbers: Sequence[float],
    channels: tuple[int, int],
    geometry: Sequence[int],
    block: tuple[int, int, int],
    *flags: bool,
) -> None:
    given = [made if factor is None else factor for factor in factors]
    is_wide = given[0].dtype == torch.float32
    rounding = "bf16x6" if is_wide and not is_interpreted() else "ieee"
    _launch(kernel, grid, (*given, made), numbers, geometry, channels, (*block, rounding, *flags), 8 if is_wide else 4)
