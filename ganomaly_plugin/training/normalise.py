"""BatchNorm in training and the activation after it as one layer of many models, by kernels of our own.

Such layers only move memory. Forwards these kernels read the maps twice and write them once; backwards they read the maps and
the gradient twice and write one gradient. In TF32 they write what they make in halves too, which the next convolution takes.
What the activation needs is computed again from BatchNorm's input. They are part of the way "implicit", and need what that
needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ganomaly_plugin.training import implicit
from ganomaly_plugin.training.halves import are_halved, largest_of, remember, to_halve, to_note
from ganomaly_plugin.training.joined import activated

_WARPS = 4
_LINE = 128  # bytes of a row that a program reads at once
_HELD = 32  # bytes that each of its threads reads at once
_STAGES = 3  # so many such reads are on their way at a time
_CHUNKS = 16  # at most: each program of the second kernel reads what the first one wrote of every chunk
_PROGRAMS = 256  # for each byte of a number; about so many run at the same time on a large GPU, as registers go
_DTYPES = (torch.float32, torch.bfloat16)


def _blocks(x: Tensor) -> tuple[int, int, int]:
    """How `x` `(n, h, w, m, c)` is cut up: how many chunks of rows, and the rows and columns of a block."""
    size = x.element_size()
    across = _LINE // size
    down = _WARPS * 32 * _HELD // _LINE
    rows, columns = x.shape[:3].numel(), x.shape[3:].numel()
    most = min(_CHUNKS, _PROGRAMS * size // -(-columns // across), -(-rows // down))
    return 1 << (max(most, 1).bit_length() - 1), down, across


def _launch(kernel: Any, blocks: tuple[int, int, int], tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Launch `kernel` on `tensors`, of which the first is `(n, h, w, m, c)`, and further `numbers`."""
    x = tensors[0]
    chunks, down, across = blocks
    rows, columns = x.shape[:3].numel(), x.shape[3:].numel()
    chunk = -(-rows // (chunks * down)) * down
    grid = -(-columns // across), chunks
    with torch.cuda.device_of(x):
        kernel[grid](*tensors, rows, columns, chunk, *numbers, *blocks, _STAGES, num_warps=_WARPS, enable_fp_fusion=True)


# They are operations of torch so that whoever watches operations, or fakes tensors, sees them.


@torch.library.custom_op(
    "ganomaly_plugin::normalise",
    mutates_args=("running_mean", "running_var", "largest"),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps,"
    " float slope, Tensor(c!) largest) -> (Tensor, Tensor, Tensor, Tensor)",
)
def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    slope: float,
    largest: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(n, h, w, m, c)` normalised and activated, the means and 1 / standard deviations `(m, c)`, and the maps in halves.

    Weights and running statistics are `(m, c)` and contiguous; the latter are updated. In `largest` `(m,)`, zeros, the largest
    magnitude that each model's maps can have is noted, as `halves` has it; if it is `(0,)` there are no halves.
    """
    from ganomaly_plugin.training import normalise_kernels

    x, blocks = x.contiguous(), _blocks(x)
    y, mean, scale, halves = _normalised(x, weight, bias, running_mean, running_var, momentum, eps, slope, largest)
    parts = mean.new_empty(2, blocks[0], mean.numel())
    _launch(normalise_kernels.measure, blocks, (x, weight, bias, largest, parts), (_reach(x), *_noting(largest)))
    tensors = x, weight, bias, parts, largest, y, halves, mean, scale, running_mean, running_var
    _launch(normalise_kernels.normalise, blocks, tensors, (momentum, eps, slope, *_noting(largest)))
    return y, mean, scale, halves


def _reach(x: Tensor) -> float:
    """How far from their mean numbers of a column of `x` can be, in standard deviations, and a little more for rounding."""
    return 1.001 * math.sqrt(x.shape[:3].numel())


def _noting(largest: Tensor) -> tuple[int, bool]:
    """How many models there are to note something of, and whether there are any."""
    return len(largest), len(largest) > 0


@normalise.register_fake
def _normalised(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    slope: float,
    largest: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, scale = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    return x.new_empty(x.shape), mean, scale, to_halve(x, x.shape, wanted=len(largest) > 0)


@torch.library.custom_op(
    "ganomaly_plugin::normalise_backward",
    mutates_args=("largest",),
    schema="(Tensor x, Tensor gradient, Tensor weight, Tensor bias, Tensor mean, Tensor scale, float slope,"
    " Tensor largest_gradient, Tensor(a!) largest) -> (Tensor, Tensor, Tensor, Tensor)",
)
def normalise_backward(
    x: Tensor,
    gradient: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: float,
    largest_gradient: Tensor,
    largest: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients with respect to the maps `(n, h, w, m, c)`, the weight and the bias `(m, c)`, and the first in halves.

    `largest_gradient` is what is known of the `gradient` where halves are wanted, `largest` as in `normalise`.
    """
    from ganomaly_plugin.training import normalise_kernels

    given = x.contiguous(), gradient.contiguous(), weight, bias, mean, scale
    blocks, made = _blocks(x), _normalised_backward(x, gradient, weight, bias, mean, scale, slope, largest_gradient, largest)
    parts = mean.new_empty(2, blocks[0], mean.numel())
    tensors = *given, largest_gradient, largest, parts
    _launch(normalise_kernels.measure_gradients, blocks, tensors, (slope, _reach(x), *_noting(largest)))
    to_x, to_weight, to_bias, halves = made
    others = parts, largest, to_x, halves, to_weight, to_bias
    _launch(normalise_kernels.differentiate, blocks, (*given, *others), (slope, *_noting(largest)))
    return made


@normalise_backward.register_fake
def _normalised_backward(
    x: Tensor,
    gradient: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: float,
    largest_gradient: Tensor,
    largest: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        to_halve(x, x.shape, wanted=len(largest) > 0),
    )


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        ctx.slope = rest[-1]
        largest = to_note(x, len(weight), wanted=are_halved(x) and ctx.slope <= 1)
        y, mean, scale, halves = normalise(x, weight, bias, *rest, largest)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return remember(y, largest, halves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        gradient, wanted = gradients[0].contiguous(), are_halved(x) and ctx.slope <= 1
        largest = to_note(x, len(others[0]), wanted=wanted)
        of_gradient = largest_of(gradient) if wanted else largest
        to_x, *to_others, halves = normalise_backward(x, gradient, *others, ctx.slope, of_gradient, largest)
        return remember(to_x, largest, halves), *to_others, *(None,) * 5


#: Of all models, with gradients: `(x, weight, bias, running_mean, running_var, momentum, eps, slope)`, as for `normalise`.
normalise_all = _Normalise.apply


def error(device: torch.device, dtype: torch.dtype) -> Tensor:
    """How far the kernels are from torch's own layers on small maps, as a share of the largest number."""
    rng, slope = torch.Generator().manual_seed(0), 0.2
    x, towards = (torch.randn(8, 12, 12, 2, 64, generator=rng).to(dtype) for _ in range(2))
    weights = [torch.rand(2, 64, generator=rng) for _ in range(4)]

    def of(run: Any, *given: Tensor) -> list[Tensor]:
        *inputs, mean, variance = (each.clone() for each in given[:-1])
        inputs = [each.requires_grad_() for each in inputs]
        y = run(*inputs, mean, variance)
        return [y.detach(), mean, variance, *torch.autograd.grad(y, inputs, given[-1])]

    def usual(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        weight, bias, mean, variance = (each.view(-1) for each in (weight, bias, mean, variance))
        y = functional.batch_norm(x.view(-1, len(weight)), mean, variance, weight, bias, True, 0.1, 1e-5)
        return activated(y, slope).view(x.shape)

    mine = of(lambda *all_: normalise_all(*all_, 0.1, 1e-5, slope), *(each.to(device) for each in (x, *weights, towards)))
    theirs = of(usual, *(each.double() for each in (x, *weights, towards)))
    errors = [(got.double().cpu() - wanted).abs().max() / wanted.abs().max() for got, wanted in zip(mine, theirs, strict=True)]
    return torch.stack(errors).max()


def suits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take maps `x` `(m, n, c, h, w)`, weights and running statistics `others` in training."""
    if x.ndim != 5 or x.dtype not in _DTYPES or not (x.device.type == "cuda" or implicit.is_interpreted()):
        return False
    pixels = len(x[0]) * x[0, 0, 0].numel()
    usual = (each is not None and each.dtype == torch.float32 and each.is_contiguous() for each in others)
    return pixels > 1 and all(usual)
