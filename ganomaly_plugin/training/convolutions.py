"""The layers of many models at once, under `torch.func.vmap`: two ways to carry out convolutions, and their precision.

"grouped" makes one convolution of those of all models, with a group for each. "matmul" lays the images out in patches and
multiplies matrices in a batch, a model each, which tensor cores take; it needs memory for the patches. Either way the maps of
all models lie side by side as channels of one image, `(n, m·c, h, w)`, so that BatchNorm is one BatchNorm of more channels. For
"matmul" they lie in channels-last order, pixel by pixel, and so do the kernels: then no product needs a copy of its factors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ganomaly_plugin.recipe import Precision
from ganomaly_plugin.training.cpu_convolutions import is_usual, pair, transposed_size

Convolutions = Literal["grouped", "matmul"]


def layers_of_all(how: Convolutions, precision: Precision, *, mapped: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Within it, the layers of models that `vmap` maps are carried out as `how` says; the results are the same up to rounding.

    With "bf16" convolutions and linear layers take their factors in bfloat16 and answer in it, as they do in autocast, which
    `vmap` passes by. Where nothing is `mapped` that is all.
    """
    forms = {} if not mapped else _MATMUL if how == "matmul" else _GROUPED
    return _Layers(forms, torch.bfloat16 if precision == "bf16" else None)


class _Layers(TorchFunctionMode):
    def __init__(self, forms: Mapping[Any, Callable[..., Tensor]], dtype: torch.dtype | None) -> None:
        super().__init__()
        self.forms, self.dtype = forms, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not None and func in _PRODUCTS:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(self.dtype), (args, kwargs))
        return self.forms.get(func, func)(*args, **kwargs)


def in_order(kernels: Tensor, how: Convolutions) -> Tensor:
    """Kernels `(m, a, b, k, k)` in the order in memory that `how` wants them in; other weights as they are."""
    if how == "matmul" and kernels.ndim == 5:
        return kernels.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return kernels


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
) -> Tensor:
    side_by_side = x.transpose(0, 1).flatten(1, 2)  # (n, m·c, ...)
    mean, variance = (None if each is None else each.view(-1) for each in (mean, variance))  # which it changes in place
    weight, bias = (None if each is None else each.flatten() for each in (weight, bias))
    y = functional.batch_norm(side_by_side, mean, variance, weight, bias, training, momentum, eps)
    return y.unflatten(1, (len(x), -1)).transpose(0, 1)


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
) -> Tensor:
    return _of_all_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def _leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Not in place: what it would change is a view of all models' maps, which autograd then copies twice and more."""
    return functional.leaky_relu(x, negative_slope)


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    return functional.relu(x)


def _conv2d_of_all(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    geometry = _Geometry((x.shape[3], x.shape[4]), (weight.shape[3], weight.shape[4]), stride, padding)
    patches = _Patches.apply(_pixels(x), geometry)
    y = _Products.apply(patches, weight.permute(0, 3, 4, 2, 1).flatten(1, 3))
    return _maps(_biased(y.view(x.shape[1], *geometry.places, *y.shape[1:]), bias))


def _conv_transpose2d_of_all(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int], more: tuple[int, int]
) -> Tensor:
    kernel = weight.shape[3], weight.shape[4]
    geometry = _Geometry(transposed_size(x[0], kernel, stride, padding, more), kernel, stride, padding)
    patches = _Products.apply(_pixels(x).flatten(0, 2), weight.permute(0, 1, 3, 4, 2).flatten(2))
    return _maps(_biased(_Image.apply(patches, geometry), bias))


def _pixels(x: Tensor) -> Tensor:
    """`(m, n, c, h, w)` → `(n, h, w, m, c)`, a view."""
    return x.permute(1, 3, 4, 0, 2)


def _maps(pixels: Tensor) -> Tensor:
    """`(n, h, w, m, c)` → `(m, n, c, h, w)`, a view."""
    return pixels.permute(3, 0, 4, 1, 2)


def _biased(pixels: Tensor, bias: Tensor | None) -> Tensor:
    return pixels if bias is None else pixels + bias


_of_all_conv2d = _mapped(_conv2d_of_all)
_of_all_conv_transpose2d = _mapped(_conv_transpose2d_of_all)


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    if not is_usual(padding, dilation, groups):  # torch carries it out with a group for each model
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _of_all_conv2d(x, weight, bias, pair(stride), pair(padding))


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
    if not is_usual(padding, dilation, groups):  # torch carries it out with a group for each model
        return torch.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _of_all_conv_transpose2d(x, weight, bias, pair(stride), pair(padding), pair(output_padding))


class _Products(torch.autograd.Function):
    """A product of matrices for each model: `(rows, m, a)` and `(m, a, b)` → `(rows, m, b)`.

    All models' results lie in one tensor, a row of theirs after another, as BatchNorm and the next layer want them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices)
        return _by_row(rows, matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, matrices = ctx.saved_tensors
        gradient = gradients[0].transpose(0, 1)  # (m, rows, b)
        to_rows = _by_row(gradients[0], matrices.transpose(1, 2)) if _is_wanted(ctx, 0) else None
        to_matrices = None
        if _is_wanted(ctx, 1):
            of_model = rows.transpose(0, 1)
            if matrices.stride(1) == 1:  # laid out the other way round, and so is its gradient
                to_matrices = torch.bmm(gradient.transpose(1, 2), of_model).transpose(1, 2)
            else:
                to_matrices = torch.bmm(of_model.transpose(1, 2), gradient)
        return to_rows, to_matrices


def _is_wanted(ctx: Any, k: int) -> bool:
    """Whether the gradients that are now computed depend on that with respect to input `k` of a function.

    (`needs_input_grad` says only whether there could be any that do: a phase asks for those of its own networks.)
    """
    node, _ = ctx.next_functions[k]
    return node is not None and torch._C._will_engine_execute_node(node)


def _by_row(rows: Tensor, matrices: Tensor) -> Tensor:
    result = rows.new_empty(*rows.shape[:2], matrices.shape[2])
    torch.bmm(rows.transpose(0, 1), matrices, out=result.transpose(0, 1))
    return result


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

    @property
    def step(self) -> tuple[int, int]:
        """How far apart places are; so far that they do not overlap where there is but one."""
        return self.kernel if self.places == (1, 1) else self.stride

    def meetings(self, axis: int) -> Iterator[tuple[slice, slice, slice, slice]]:
        """Where pixels and places meet along an axis: `(pixels // step, pixels % step, places, taps)`, slices each.

        Tap t of place p lies on pixel `step·p + t - padding`. Taps that share the quotient of `(t - padding) / step` are one
        meeting.
        """
        size, taps, stride, padding = (each[axis] for each in (self.size, self.kernel, self.step, self.padding))
        rows, places = -(-size // stride), self.places[axis]
        for shift in range(-padding // stride, (taps - 1 - padding) // stride + 1):
            origin = shift * stride + padding  # the tap of remainder 0
            first, end = max(0, origin), min(taps, origin + stride)
            low, high = max(0, -shift), min(places, rows - shift)
            if low < high:
                yield slice(low + shift, high + shift), slice(first - origin, end - origin), slice(low, high), slice(first, end)


def _patches(pixels: Tensor, geometry: _Geometry) -> Tensor:
    """What the kernel covers at each of its places: `(n, h, w, m, c)` → `(n·h'·w', m, k·k·c)`.

    (torch's `unfold` launches a kernel for each image on a GPU, and has the places last, where a product wants them first.)
    """
    (down, across), (step_down, step_across), (py, px) = geometry.kernel, geometry.stride, geometry.padding
    padded = functional.pad(pixels, (0, 0, 0, 0, px, px, py, py)) if px or py else pixels
    windows = padded.unfold(1, down, step_down).unfold(2, across, step_across)  # (n, h', w', m, c, k, k)
    return windows.permute(0, 1, 2, 3, 5, 6, 4).flatten(0, 2).flatten(2)


def _image(patches: Tensor, geometry: _Geometry) -> Tensor:
    """The sum of patches where they overlap, which is `_patches` transposed: `(n·h'·w', m, k·k·c)` → `(n, h, w, m, c)`."""
    taps = patches.unflatten(2, (*geometry.kernel, -1)).unflatten(0, (-1, *geometry.places))
    taps = taps.permute(0, 1, 4, 2, 5, 3, 6)  # (n, h', k, w', k, m, c)
    (height, width), (down, across) = geometry.size, geometry.step
    image = patches.new_zeros(len(taps), -(-height // down), down, -(-width // across), across, *taps.shape[5:])
    for rows, row, places_down, taps_down in geometry.meetings(0):
        for columns, column, places_across, taps_across in geometry.meetings(1):
            image[:, rows, row, columns, column].add_(taps[:, places_down, taps_down, places_across, taps_across])
    return image.flatten(3, 4).flatten(1, 2)[:, :height, :width]


class _Patches(torch.autograd.Function):
    """`_patches`; the gradient of a linear map is the map transposed, which needs nothing saved."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, geometry: _Geometry) -> Tensor:
        ctx.geometry = geometry
        return _patches(pixels, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _image(gradients[0], ctx.geometry), None


class _Image(torch.autograd.Function):
    """`_image`, likewise."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, geometry: _Geometry) -> Tensor:
        ctx.geometry = geometry
        return _image(patches, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _patches(gradients[0], ctx.geometry), None


_PRODUCTS = {torch.conv2d, torch.conv_transpose2d, functional.linear}
_GROUPED: Mapping[Any, Callable[..., Tensor]] = {
    functional.batch_norm: _batch_norm,
    functional.leaky_relu: _leaky_relu,
    functional.relu: _relu,
}
_MATMUL: Mapping[Any, Callable[..., Tensor]] = {
    **_GROUPED,
    torch.conv2d: _conv2d,
    torch.conv_transpose2d: _conv_transpose2d,
}
