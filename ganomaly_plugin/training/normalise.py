"""BatchNorm in training and the activation after it as one layer of many models, by kernels of our own.

Such layers only move memory. Forwards these kernels read the maps twice and write them once; backwards they read the maps and
the gradient twice and write one gradient. What the activation needs is computed again from BatchNorm's input. They are part of
the way "implicit" and need what that needs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from ganomaly_plugin.training import implicit

_WARPS = 4
_LINE = 128  # bytes of a row that a program reads at once
_HELD = 32  # bytes that each of its threads reads at once
_STAGES = 3  # so many such reads are on their way at a time
_CHUNKS = 16  # at most: each program of the second kernel reads what the first one wrote of every chunk
_PROGRAMS = 256  # for each byte of a number; about so many run at the same time on a large GPU, as registers go
_DTYPES = (torch.float32, torch.bfloat16)
_Module = TypeVar("_Module", bound=nn.Module)


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
    on = torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
    grid = -(-columns // across), chunks
    with on:
        kernel[grid](*tensors, rows, columns, chunk, *numbers, *blocks, _STAGES, num_warps=_WARPS, enable_fp_fusion=True)


# They are operations of torch so that whoever watches operations, or fakes tensors, sees them.


@torch.library.custom_op(
    "ganomaly_plugin::normalise",
    mutates_args=("running_mean", "running_var"),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps,"
    " float slope) -> (Tensor, Tensor, Tensor)",
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`(n, h, w, m, c)` normalised and activated, the means and 1 / standard deviations `(m, c)`.

    Weights and running statistics are `(m, c)` and contiguous; the latter are updated.
    """
    from ganomaly_plugin.training import normalise_kernels

    x, blocks = x.contiguous(), _blocks(x)
    y, mean, scale = _normalised(x, weight, bias, running_mean, running_var, momentum, eps, slope)
    parts = mean.new_empty(2, blocks[0], mean.numel())
    _launch(normalise_kernels.measure, blocks, (x, parts), ())
    tensors = x, weight, bias, parts, y, mean, scale, running_mean, running_var
    _launch(normalise_kernels.normalise, blocks, tensors, (momentum, eps, slope))
    return y, mean, scale


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
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@torch.library.custom_op(
    "ganomaly_plugin::normalise_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor gradient, Tensor weight, Tensor bias, Tensor mean, Tensor scale, float slope)"
    " -> (Tensor, Tensor, Tensor)",
)
def normalise_backward(
    x: Tensor, gradient: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with respect to the maps `(n, h, w, m, c)`, the weight and the bias `(m, c)`."""
    from ganomaly_plugin.training import normalise_kernels

    given = x.contiguous(), gradient.contiguous(), weight, bias, mean, scale
    blocks, made = _blocks(x), _normalised_backward(x, gradient, weight, bias, mean, scale, slope)
    parts = mean.new_empty(2, blocks[0], mean.numel())
    _launch(normalise_kernels.measure_gradients, blocks, (*given, parts), (slope,))
    _launch(normalise_kernels.differentiate, blocks, (*given, parts, *made), (slope,))
    return made


@normalise_backward.register_fake
def _normalised_backward(
    x: Tensor, gradient: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        y, mean, scale = normalise(x, weight, bias, *rest)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.slope = rest[-1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        return *normalise_backward(x, gradients[0], *others, ctx.slope), *(None,) * 5


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
    if x.ndim != 5 or x.dtype not in _DTYPES or not (x.device.type == "cuda" or implicit._is_interpreted()):
        return False
    pixels = len(x[0]) * x[0, 0, 0].numel()
    usual = (each is not None and each.dtype == torch.float32 and each.is_contiguous() for each in others)
    return pixels > 1 and all(usual)


def activated(y: Tensor, slope: float) -> Tensor:
    """LeakyReLU, which for a slope of 0 is ReLU and for a slope of 1 nothing."""
    if slope == 1:
        return y
    return functional.leaky_relu(y, slope) if slope else functional.relu(y)


def batch_norm_activated(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    slope: float,
) -> Tensor:
    """BatchNorm and LeakyReLU of torch, which a mode for functions of torch can replace as it can replace those."""
    tensors = x, running_mean, running_var, weight, bias
    if has_torch_function(tensors):
        return handle_torch_function(batch_norm_activated, tensors, *tensors, training, momentum, eps, slope)
    return activated(functional.batch_norm(*tensors, training, momentum, eps), slope)


def _slope(norm: nn.Module, activation: nn.Module | None) -> float | None:
    """The slope of `activation` where it and `norm` before it can be carried out at once; None where they cannot."""
    if type(norm) is not nn.BatchNorm2d or activation is None or _is_hooked(norm) or _is_hooked(activation):
        return None
    if not (norm.training and norm.affine and norm.track_running_stats) or norm.momentum is None:
        return None
    if type(activation) is nn.ReLU:
        return 0.0
    return activation.negative_slope if type(activation) is nn.LeakyReLU and activation.negative_slope >= 0 else None


def _is_hooked(module: nn.Module) -> bool:
    kinds = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(kinds)


def _both(norm: nn.BatchNorm2d, x: Tensor, slope: float) -> Tensor:
    """What `norm` in training does, and the activation after it."""
    norm._check_input_dim(x)
    assert norm.num_batches_tracked is not None and norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    state = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return batch_norm_activated(x, *state, True, norm.momentum, norm.eps, slope)


class _Joined(nn.Sequential):
    """A Sequential that carries out BatchNorm in training and the activation after it at once; its layers stay two."""

    def forward(self, x: Any) -> Any:
        waiting = list(self)[::-1]
        while waiting:
            layer = waiting.pop()
            slope = _slope(layer, waiting[-1] if waiting else None)
            if slope is None:
                x = layer(x)
            else:
                waiting.pop()
                x = _both(cast(nn.BatchNorm2d, layer), x, slope)
        return x


def joined(network: _Module) -> _Module:
    """A copy of `network`, with the same weights, whose Sequentials carry out BatchNorm and the activation after it at once."""
    kept = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    network = copy.deepcopy(network, kept)
    for module in network.modules():
        if type(module) is nn.Sequential:
            module.__class__ = _Joined
    return network
