"""Convolutions of many models by kernels of our own, which read the patches where they lie: implicit matrix products.

What `products` lays out in memory, and reads again, is most of what it moves. These kernels take wide layers only, which are
nearly all of the arithmetic. They need a GPU and Triton, which torch brings along on Linux.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ganomaly_plugin.errors import one_line
from ganomaly_plugin.training.precision import precision
from ganomaly_plugin.training.products import Geometry, by_row, is_wanted

_WIDTH = 16  # tensor cores take numbers of channels that are multiples of this
_MOST = 128  # numbers along a side of a block of the result
_DEPTH = {torch.float32: 32, torch.bfloat16: 64}  # numbers that a block of the result sums at once: 128 bytes
Operation: TypeAlias = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
#: How the factors of float32 products are rounded, by torch's precision of them and by kernel, in Triton's terms.
_ROUNDINGS = {
    "ieee": {"convolve": "ieee", "spread": "ieee", "correlate": "ieee"},
    "tf32": {"convolve": "tf32", "spread": "bf16x3", "correlate": "bf16x3"},
}
_ENOUGH = 512  # blocks that keep a GPU busy: for fewer results than that, sums are cut into parts
_TRUSTED = 0.02  # of the largest number: what rounding to bfloat16 may change


def why_not_implicit(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`; None where they can.

    On a GPU they are held to torch's own convolutions first, once, on small maps: Triton compiles them there, which takes a C
    compiler, and not every GPU has the memory that they share within a block.
    """
    try:
        return _why_not(device)
    except torch.OutOfMemoryError as error:  # which may pass
        return one_line(error)


@functools.cache
def _why_not(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return None if _is_interpreted() else f"its kernels are for a GPU, and this is {device.type}"
    try:
        error = _trial(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as refused:
        return f"Triton refuses: {one_line(refused)}"
    return None if error < _TRUSTED else f"its kernels are wrong by {error:.1%} of what is right on this {device.type}"


def _trial(device: torch.device) -> float:
    """How far the kernels are from torch's own layers, as a share of the largest number."""
    from ganomaly_plugin.training import normalise  # which imports this module

    geometry = Geometry((8, 8), (4, 4), (2, 2), (1, 1))
    errors: list[Tensor] = []
    rng = torch.Generator().manual_seed(0)
    for dtype in _DEPTH:
        x, kernels, towards = (
            torch.randn(*shape, generator=rng).to(device, dtype)
            for shape in ((8, 8, 8, 2, 128), (2, 128, 4, 4, 128), (8, 4, 4, 2, 128))
        )
        numbers = _numbers(geometry)
        with precision("tf32"):
            mine = [convolve(x, kernels, numbers), spread(towards, kernels, numbers), correlate(x, towards, numbers)]
        theirs: list[list[Tensor]] = []
        for k in range(2):
            image, kernel, weights = (each.double().cpu() for each in (x[:, :, :, k], kernels[k], towards[:, :, :, k]))
            image, kernel, weights = (each.permute(0, 3, 1, 2).requires_grad_() for each in (image, kernel, weights))
            y = torch.conv2d(image, kernel, stride=2, padding=1)
            its = [y, *torch.autograd.grad((y * weights).sum(), (image, kernel))]
            theirs.append([each.detach().permute(0, 2, 3, 1) for each in its])
        for got, wanted, models_at in zip(mine, zip(*theirs, strict=True), (3, 3, 0), strict=True):
            expected = torch.stack(wanted, models_at)
            errors.append((got.double().cpu() - expected).abs().max() / expected.abs().max())
        errors.append(normalise.error(device, dtype))
    return float(torch.stack(errors).max())  # which is no number where one of them is none


@functools.cache
def _is_interpreted() -> bool:
    """Whether Triton was told (TRITON_INTERPRET=1) to carry kernels out on the CPU, slowly, to show what they compute."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def suits(x: Tensor, models: int, channels: Sequence[int], geometry: Geometry) -> bool:
    """Whether the kernels take a convolution of maps like `x` with so many `channels` on the small side, and on the large."""
    o, c = channels
    countable = math.prod(geometry.size) * models * max(channels) < 2**31  # places within an image
    here = x.device.type == "cuda" or _is_interpreted()
    even = o % _WIDTH == 0 and _at_once(c, math.prod(geometry.kernel)) % _WIDTH == 0
    return here and even and countable and x.dtype in _DEPTH and geometry.places != (1, 1)


def _at_once(channels: int, taps: int) -> int:
    """Numbers that lie side by side in a kernel and of which a block may take any: a tap's, or all where taps are narrow."""
    return channels if channels >= _WIDTH else channels * taps


def _numbers(geometry: Geometry) -> list[int]:
    """A geometry as operations of torch can be given it."""
    return [*geometry.size, *geometry.kernel, *geometry.stride, *geometry.padding]


def _geometry(numbers: Sequence[int]) -> Geometry:
    size, kernel, stride, padding = zip(numbers[::2], numbers[1::2], strict=True)
    return Geometry(size, kernel, stride, padding)


# They are operations of torch so that whoever watches operations, or fakes tensors, sees them.


@torch.library.custom_op(
    "ganomaly_plugin::convolve", mutates_args=(), schema="(Tensor x, Tensor kernels, int[] geometry) -> Tensor"
)
def convolve(x: Tensor, kernels: Tensor, geometry: Sequence[int]) -> Tensor:
    """`(n, h, w, m, c)` → `(n, p, q, m, o)`."""
    from ganomaly_plugin.training import implicit_kernels

    y = _convolved(x, kernels, geometry)
    rows, (models, o), c = y.shape[:3].numel(), y.shape[3:], x.shape[4]
    block = _side(rows), _side(o), _dividing(_at_once(c, kernels.shape[2:4].numel()), _DEPTH[x.dtype])
    tiles = -(-rows // block[0]) * -(-o // block[1])
    _multiply(implicit_kernels.convolve, (tiles, models), (x, kernels, y), rows, (c, o), geometry, block)
    return y


@convolve.register_fake
def _convolved(x: Tensor, kernels: Tensor, geometry: Sequence[int]) -> Tensor:
    return x.new_empty(len(x), *_geometry(geometry).places, *kernels.shape[:2])


@torch.library.custom_op(
    "ganomaly_plugin::spread", mutates_args=(), schema="(Tensor y, Tensor kernels, int[] geometry) -> Tensor"
)
def spread(y: Tensor, kernels: Tensor, geometry: Sequence[int]) -> Tensor:
    """`(n, p, q, m, o)` → `(n, h, w, m, c)`, which is `convolve` transposed."""
    from ganomaly_plugin.training import implicit_kernels

    x = _spread_out(y, kernels, geometry)
    (height, width), (down, across) = _geometry(geometry).size, _geometry(geometry).stride
    rows = len(x) * -(-height // down) * -(-width // across)  # pixels that meet the same taps, at most
    models, c, o = x.shape[3], x.shape[4], y.shape[4]
    block = _side(rows), _side(c), _dividing(o, _DEPTH[y.dtype])
    tiles = -(-rows // block[0]) * -(-c // block[1])
    _multiply(implicit_kernels.spread, (tiles, models, down * across), (y, kernels, x), len(x), (c, o), geometry, block)
    return x


@spread.register_fake
def _spread_out(y: Tensor, kernels: Tensor, geometry: Sequence[int]) -> Tensor:
    return y.new_empty(len(y), *_geometry(geometry).size, len(kernels), kernels.shape[4])


@torch.library.custom_op("ganomaly_plugin::correlate", mutates_args=(), schema="(Tensor x, Tensor y, int[] geometry) -> Tensor")
def correlate(x: Tensor, y: Tensor, geometry: Sequence[int]) -> Tensor:
    """`(n, h, w, m, c)` and `(n, p, q, m, o)` → `(m, o, r, s, c)`, the gradient with respect to kernels, as float32."""
    from ganomaly_plugin.training import implicit_kernels

    models, o, r, s, c = _correlated(x, y, geometry).shape
    rows = y.shape[:3].numel()
    block = _side(o), _dividing(_at_once(c, r * s), _MOST), _DEPTH[x.dtype]
    tiles = -(-o // block[0]) * (r * s * c // block[1])
    parts = max(1, min(_ENOUGH // (tiles * models), rows // (8 * block[2])))
    sums = x.new_empty(parts, models, o, r, s, c, dtype=torch.float32)
    _multiply(implicit_kernels.correlate, (tiles, models, parts), (x, y, sums), rows, (c, o), geometry, block)
    return sums[0] if parts == 1 else sums.sum(0)


@correlate.register_fake
def _correlated(x: Tensor, y: Tensor, geometry: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[3], y.shape[4], *_geometry(geometry).kernel, x.shape[4], dtype=torch.float32)


@torch.library.custom_op("ganomaly_plugin::fold", mutates_args=(), schema="(Tensor patches, int[] geometry) -> Tensor")
def fold(patches: Tensor, geometry: Sequence[int]) -> Tensor:
    """`(n·p·q, m, r·s·c)` → `(n, h, w, m, c)`, the sum of patches where they overlap."""
    from ganomaly_plugin.training import implicit_kernels

    x, block = _folded(patches, geometry), 1024
    grid, counts = (-(-x.numel() // block),), (x.numel(), x.shape[3])
    _launch(implicit_kernels.fold, grid, (patches, x), counts, geometry, x.shape[4:], (block,), 4)
    return x


@fold.register_fake
def _folded(patches: Tensor, geometry: Sequence[int]) -> Tensor:
    its = _geometry(geometry)
    n, c = len(patches) // math.prod(its.places), patches.shape[2] // math.prod(its.kernel)
    return patches.new_empty(n, *its.size, patches.shape[1], c)


def _spread(y: Tensor, kernels: Tensor, geometry: Sequence[int]) -> Tensor:
    """`spread`; towards maps of few channels, which would leave its blocks all but empty, by way of patches."""
    if kernels.shape[4] >= _WIDTH:
        return spread(y, kernels, geometry)
    return fold(by_row(y.flatten(0, 2), kernels.flatten(2)), geometry)


def _function(forward: Operation, backward: Operation, of_kernels: Operation) -> Callable[[Tensor, Tensor, Geometry], Tensor]:
    """A function of maps and float32 kernels, which are rounded to the type of the maps, with gradients.

    `backward` is `forward` transposed, `of_kernels` the gradient with respect to kernels of (maps, gradient).
    """

    class OfAll(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, maps: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
            rounded = kernels.to(maps.dtype)
            ctx.save_for_backward(maps, rounded)
            ctx.geometry = _numbers(geometry)
            return forward(maps, rounded, ctx.geometry)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
            maps, kernels = ctx.saved_tensors
            to_maps = backward(gradients[0], kernels, ctx.geometry) if is_wanted(ctx, 0) else None
            to_kernels = of_kernels(maps, gradients[0], ctx.geometry) if is_wanted(ctx, 1) else None
            return to_maps, to_kernels, None

    return OfAll.apply


#: Of all models: maps `(n, h, w, m, c)` and kernels `(m, o, r, s, c)` → `(n, p, q, m, o)`.
conv2d = _function(convolve, _spread, lambda maps, gradient, geometry: correlate(maps, gradient, geometry))
#: Of all models: maps `(n, p, q, m, o)` and kernels `(m, o, r, s, c)` → `(n, h, w, m, c)`.
conv_transpose2d = _function(_spread, convolve, lambda maps, gradient, geometry: correlate(gradient, maps, geometry))


def _side(numbers: int) -> int:
    """How many of so many numbers a block of the result takes: a power of two, the last block may reach beyond."""
    return min(_MOST, max(_WIDTH, 1 << (numbers - 1).bit_length()))


def _dividing(numbers: int, most: int) -> int:
    """The largest power of two that divides `numbers`, or `most`."""
    return min(most, numbers & -numbers)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],  # those that are read and one that is written
    counts: tuple[int, int],  # of rows, images or numbers, and of models
    geometry: Sequence[int],
    channels: Sequence[int],
    block: Sequence[Any],
    warps: int,
) -> None:
    *given, made = tensors
    on = torch.cuda.device_of(made) if made.is_cuda else contextlib.nullcontext()
    with on:
        kernel[grid](
            *(tensor.contiguous() for tensor in given),
            made,
            *counts,
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
    tensors: Sequence[Tensor],  # two that are read and one that is written
    count: int,  # of rows or images
    channels: tuple[int, int],
    geometry: Sequence[int],
    block: tuple[int, int, int],
) -> None:
    dtype = tensors[0].dtype
    is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and not _is_interpreted()  # which knows no parts of bfloat16
    warps = 8 if dtype == torch.float32 and block[0] * block[1] > 64 * 64 else 4
    rounding = _ROUNDINGS["tf32" if is_tf32 else "ieee"][kernel.__name__]
    _launch(kernel, grid, tensors, (count, grid[1]), geometry, channels, (*block, rounding), warps)
