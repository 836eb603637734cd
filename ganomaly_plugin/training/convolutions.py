"""Convolutions of many models at once, under `torch.func.vmap`: two ways to carry them out, and their precision.

"grouped" is what torch makes of a mapped convolution: one convolution with a group for each model. "matmul" unfolds the
images into patches and multiplies matrices in a batch, a model each, which tensor cores take; it needs memory for the patches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.recipe import Precision
from ganomaly_plugin.training.cpu_convolutions import pair, transposed_size

Convolutions = Literal["grouped", "matmul"]


def convolutions_as(how: Convolutions, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Within it, `conv2d` and `conv_transpose2d` are carried out as `how` says; the results are the same up to rounding.

    With "bf16" they, and linear layers, take their factors in bfloat16 and answer in float32: `vmap` passes autocast by.
    """
    if how == "grouped" and precision != "bf16":
        return contextlib.nullcontext()
    return _Products(_AS_MATMUL if how == "matmul" else {}, torch.bfloat16 if precision == "bf16" else None)


class _Products(TorchFunctionMode):
    def __init__(self, forms: Mapping[Any, Callable[..., Tensor]], dtype: torch.dtype | None) -> None:
        super().__init__()
        self.forms, self.dtype = forms, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        form = self.forms.get(func, func)
        if self.dtype is None or func not in _PRODUCTS:
            return form(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(self.dtype), (args, kwargs))
        return form(*args, **kwargs).float()


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    _check(groups, dilation)
    geometry = _Geometry((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]), pair(stride), pair(padding))
    y = functional.linear(_Patches.apply(x, geometry), weight.flatten(1), bias)  # (n·h'·w', out): one product a model
    return y.view(len(x), *geometry.places, len(weight)).permute(0, 3, 1, 2)


def _conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    _check(groups, dilation)
    kernel, stride, padding = (weight.shape[2], weight.shape[3]), pair(stride), pair(padding)
    geometry = _Geometry(transposed_size(x, kernel, stride, padding, pair(output_padding)), kernel, stride, padding)
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # (n·h·w, c)
    y = _Image.apply(rows @ weight.flatten(1), geometry)
    return y if bias is None else y + bias[:, None, None]


def _batch_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """BatchNorm of what the products leave in channels-last order, which cuDNN's asks for and `vmap` does not know (NYI).

    (A copy, for `contiguous` makes none of maps of one pixel, which are in both orders.)
    """
    return functional.batch_norm(x.clone(memory_format=torch.contiguous_format), *args, **kwargs)


@dataclass(frozen=True)
class _Geometry:
    """Where a kernel is laid on images of height and width `size`."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def places(self) -> tuple[int, int]:
        """How many places there are, down and across."""
        down, across = ((self.size[k] + 2 * self.padding[k] - self.kernel[k]) // self.stride[k] + 1 for k in (0, 1))
        return down, across


class _Laid(torch.autograd.Function):
    """A linear map that depends on a geometry alone; its gradient is the map transposed, which needs nothing saved."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry = inputs[1]


class _Patches(_Laid):
    """What the kernel covers at each of its places: `(n, c, h, w)` → `(n·h'·w', c·k·k)`.

    (torch's `unfold` launches a kernel for each image on a GPU, and has the places last, where a product wants them first.)
    """

    @staticmethod
    def forward(x: Tensor, geometry: _Geometry) -> Tensor:
        (py, px), (sy, sx) = geometry.padding, geometry.stride
        windows = functional.pad(x, (px, px, py, py)).unfold(2, geometry.kernel[0], sy).unfold(3, geometry.kernel[1], sx)
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)  # from (n, c, h', w', k, k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Image.apply(gradients[0], ctx.geometry), None


class _Image(_Laid):
    """The sum of patches where they overlap, which is `_Patches` transposed: `(n·h'·w', c·k·k)` → `(n, c, h, w)`."""

    @staticmethod
    def forward(patches: Tensor, geometry: _Geometry) -> Tensor:
        down, across = geometry.places
        columns = patches.view(-1, down * across, patches.shape[1]).transpose(1, 2)  # (n, c·k·k, h'·w')
        return functional.fold(columns, geometry.size, geometry.kernel, padding=geometry.padding, stride=geometry.stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Patches.apply(gradients[0], ctx.geometry), None


def _check(groups: int, dilation: Any) -> None:
    if groups != 1 or pair(dilation) != (1, 1):
        raise InvalidInput("Grouped and dilated convolutions are not made matrix products. Stack with grouped convolutions.")


_PRODUCTS = {torch.conv2d, torch.conv_transpose2d, functional.linear}
_AS_MATMUL: Mapping[Any, Callable[..., Tensor]] = {
    torch.conv2d: _conv2d,
    torch.conv_transpose2d: _conv_transpose2d,
    functional.batch_norm: _batch_norm,
}
