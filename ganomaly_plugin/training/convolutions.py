"""The layers of many models at once, under `torch.func.vmap`: three ways to carry out convolutions, and their precision.

"grouped" makes one convolution of those of all models, with a group for each. "matmul" lays the images out in patches and
multiplies matrices in a batch, a model each, which tensor cores take; it needs memory for the patches. "implicit" does the same
without laying them out, and takes convolutions, and BatchNorm in training, as one layer with the activation after them. Any way
the maps of all models lie side by side as channels of one image, `(n, m·c, h, w)`, so that BatchNorm is one BatchNorm of more
channels. They lie in channels-last order, pixel by pixel, and so do the kernels: then no product needs a copy of its factors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ganomaly_plugin.recipe import Precision
from ganomaly_plugin.training import implicit as implicit_products
from ganomaly_plugin.training.cpu_convolutions import is_usual, pair, transposed_size
from ganomaly_plugin.training.joined import activated, batch_norm_activated, conv2d_activated
from ganomaly_plugin.training.normalise import normalise_all, suits
from ganomaly_plugin.training.products import Geometry, lay_out, multiply, put_together

Convolutions = Literal["grouped", "matmul", "implicit"]


def layers_of_all(how: Convolutions, precision: Precision, *, mapped: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Within it, the layers of models that `vmap` maps are carried out as `how` says; the results are the same up to rounding.

    With "bf16" convolutions and linear layers take their factors in bfloat16 and answer in it, as they do in autocast, which
    `vmap` passes by. Where nothing is `mapped` that is all.
    """
    forms = _FORMS[how] if mapped else {}
    return _Layers(forms, torch.bfloat16 if precision == "bf16" else None)


class _Layers(TorchFunctionMode):
    def __init__(self, forms: Mapping[Any, Callable[..., Tensor]], dtype: torch.dtype | None) -> None:
        super().__init__()
        self.forms, self.dtype = forms, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:  # as the forms have it, and nearly everybody writes it
            args = (kwargs.pop("input"),)
        if self.dtype is not None and func in self.forms and func in _PRODUCTS:  # which rounds its kernels itself
            args = (args[0].to(self.dtype), *args[1:])
        elif self.dtype is not None and func in _PRODUCTS:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(self.dtype), (args, kwargs))
        return self.forms.get(func, func)(*args, **kwargs)


def in_order(kernels: Tensor) -> Tensor:
    """Kernels `(m, a, b, k, k)` in channels-last order in memory; other weights as they are."""
    return kernels.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if kernels.ndim == 5 else kernels


def _mapped(of_all: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What `vmap` maps over models as `of_all` says, whose tensors all have the models first."""

    class Mapped(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Tensor:  # of tensors that are the same for all models, and constants
            return of_all(*(arg[None] if isinstance(arg, Tensor) else arg for arg in args))[0]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            return

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
            return of_all(*(models_first(arg, at, info.batch_size) for arg, at in zip(args, in_dims, strict=True))), 0

    def models_first(arg: Any, at: Any, models: int) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return arg.expand(models, *arg.shape) if at is None else arg.movedim(at, 0)

    return Mapped.apply


def _batch_norm_of_all(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    implicit: bool,
    slope: float,
) -> Tensor:
    if implicit and training and suits(x, mean, variance, weight, bias):
        return _maps(normalise_all(_pixels(x), weight, bias, mean, variance, momentum, eps, slope))
    side_by_side = x.transpose(0, 1).flatten(1, 2)  # (n, m·c, ...)
    mean, variance = (None if each is None else each.view(-1) for each in (mean, variance))  # which it changes in place
    weight, bias = (None if each is None else each.flatten() for each in (weight, bias))
    y = functional.batch_norm(side_by_side, mean, variance, weight, bias, training, momentum, eps)
    return activated(y.unflatten(1, (len(x), -1)).transpose(0, 1), slope)


_of_all_batch_norm = _mapped(_batch_norm_of_all)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 1.0,
    *,
    implicit: bool,
) -> Tensor:
    return _of_all_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, implicit, slope)


def _leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Not in place: what it would change is a view of all models' maps, which autograd then copies twice and more."""
    return functional.leaky_relu(x, negative_slope)


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    return functional.relu(x)


def _conv2d_of_all(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    implicit: bool,
    slope: float = 1.0,
) -> Tensor:
    geometry = Geometry((x.shape[3], x.shape[4]), (weight.shape[3], weight.shape[4]), stride, padding)
    if implicit and implicit_products.suits(x, len(x), weight.shape[1:3], geometry):
        own = slope if bias is None else 1.0
        y = _maps(_biased(implicit_products.conv2d(_pixels(x), _taps(weight), geometry, own), bias))
        return y if own == slope else activated(y, slope)
    patches = lay_out(_pixels(x), geometry)
    y = multiply(patches, weight.to(x.dtype).permute(0, 3, 4, 2, 1).flatten(1, 3))
    return activated(_maps(_biased(y.view(x.shape[1], *geometry.places, *y.shape[1:]), bias)), slope)


def _conv_transpose2d_of_all(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    more: tuple[int, int],
    implicit: bool,
) -> Tensor:
    kernel = weight.shape[3], weight.shape[4]
    geometry = Geometry(transposed_size(x[0], kernel, stride, padding, more), kernel, stride, padding)
    if implicit and implicit_products.suits(x, len(x), weight.shape[1:3], geometry):
        return _maps(_biased(implicit_products.conv_transpose2d(_pixels(x), _taps(weight), geometry, 1.0), bias))
    patches = multiply(_pixels(x).flatten(0, 2), _taps(weight.to(x.dtype)).flatten(2))
    return _maps(_biased(put_together(patches, geometry), bias))


def _taps(weight: Tensor) -> Tensor:
    """`(m, a, b, k, k)` → `(m, a, k, k, b)`, a view."""
    return weight.permute(0, 1, 3, 4, 2)


def _pixels(x: Tensor) -> Tensor:
    """`(m, n, c, h, w)` → `(n, h, w, m, c)`, a view."""
    return x.permute(1, 3, 4, 0, 2)


def _maps(pixels: Tensor) -> Tensor:
    """`(n, h, w, m, c)` → `(m, n, c, h, w)`, a view."""
    return pixels.permute(3, 0, 4, 1, 2)


def _biased(pixels: Tensor, bias: Tensor | None) -> Tensor:
    bias = _like(pixels, bias)
    return pixels if bias is None else pixels + bias


def _like(x: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


_of_all_conv2d = _mapped(_conv2d_of_all)
_of_all_conv_transpose2d = _mapped(_conv_transpose2d_of_all)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    slope: float = 1.0,
    *,
    implicit: bool,
) -> Tensor:
    if x.ndim != 4 or not is_usual(padding, dilation, groups):  # torch carries it out with a group for each model
        y = torch.conv2d(x, weight.to(x.dtype), _like(x, bias), stride, padding, dilation, groups)
        return activated(y, slope)
    return _of_all_conv2d(x, weight, bias, pair(stride), pair(padding), implicit, slope)


def _conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    implicit: bool,
) -> Tensor:
    if x.ndim != 4 or not is_usual(padding, dilation, groups):  # torch carries it out with a group for each model
        kernels, bias = weight.to(x.dtype), _like(x, bias)
        return torch.conv_transpose2d(x, kernels, bias, stride, padding, output_padding, groups, dilation)
    return _of_all_conv_transpose2d(x, weight, bias, pair(stride), pair(padding), pair(output_padding), implicit)


_PRODUCTS = {torch.conv2d, torch.conv_transpose2d, conv2d_activated, functional.linear}
_ANY_WAY: Mapping[Any, Callable[..., Tensor]] = {
    functional.batch_norm: functools.partial(_batch_norm, implicit=False),
    functional.leaky_relu: _leaky_relu,
    functional.relu: _relu,
}
_FORMS: Mapping[Convolutions, Mapping[Any, Callable[..., Tensor]]] = {
    "grouped": _ANY_WAY,
    "matmul": {
        **_ANY_WAY,
        torch.conv2d: functools.partial(_conv2d, implicit=False),
        torch.conv_transpose2d: functools.partial(_conv_transpose2d, implicit=False),
    },
    "implicit": {
        **_ANY_WAY,
        **dict.fromkeys((torch.conv2d, conv2d_activated), functools.partial(_conv2d, implicit=True)),
        torch.conv_transpose2d: functools.partial(_conv_transpose2d, implicit=True),
        **dict.fromkeys((functional.batch_norm, batch_norm_activated), functools.partial(_batch_norm, implicit=True)),
    },
}
