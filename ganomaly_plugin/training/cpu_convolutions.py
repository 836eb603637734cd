"""Convolutions of shapes that a CPU's library is slow at, carried out as matrix products: the same sums in another order.

oneDNN reaches a CPU's full rate on the wide layers of a DCGAN, but a fifth of it and less where a kernel covers the whole
map (the first and last layers of encoder and decoder), and a twentieth where it writes a single channel (the last layer of
a decoder of grey images, and the gradient with respect to a grey image): measured in `results/speed`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def cpu_convolutions(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it, on a CPU, `conv2d` and `conv_transpose2d` take these forms where they are faster; elsewhere nothing."""
    return _AsProducts() if device.type == "cpu" else contextlib.nullcontext()


class _AsProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        form = _FORMS.get(func)
        found = form(*args, **kwargs) if form is not None and args else None  # of `input=x` the library's own
        return func(*args, **kwargs) if found is None else found


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    """The convolution as a product; None where the library's own is to be used."""
    if not _plain_float(x, padding, dilation, groups):
        return None
    padding = pair(padding)
    if x.shape[2:] == weight.shape[2:] and padding == (0, 0):
        y = functional.linear(x.permute(0, 2, 3, 1).flatten(1), weight.permute(0, 2, 3, 1).flatten(1), bias)
        return y[:, :, None, None]  # (b, out) → (b, out, 1, 1)
    if x.shape[1] == 1 and x.requires_grad:
        y = _FromOneChannel.apply(x, weight, pair(stride), padding)
        return y if bias is None else y + bias[:, None, None]
    return None


class _FromOneChannel(torch.autograd.Function):
    """The library's convolution of a grey image, and a gradient with respect to the image that is a product.

    It can be differentiated again, as gradient penalties are. (Were the convolution itself a product, its answer would be a
    view, which the in-place activations after it would copy.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = {"stride": stride, "padding": padding}
        return torch.conv2d(x, weight, None, **ctx.options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            patches = gradient.permute(0, 2, 3, 1).flatten(0, 2) @ weight.flatten(1)  # (b·h·w, k·k)
            patches = patches.view(len(x), -1, weight[0].numel()).transpose(1, 2)
            grad_x = functional.fold(patches, x.shape[2:], weight.shape[2:], **ctx.options)
        if ctx.needs_input_grad[1]:
            stride, padding = ctx.options.values()
            rest = ((1, 1), False, (0, 0), 1, (False, True, False))  # dilation, transposed, output padding, groups, wanted
            grad_weight = torch.ops.aten.convolution_backward(gradient, x, weight, None, stride, padding, *rest)[1]
        return grad_x, grad_weight, None, None


def _conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor | None:
    """The transposed convolution as a product; None where the library's own is to be used."""
    if not _plain_float(x, padding, dilation, groups):
        return None
    channels, kernel = weight.shape[1], (weight.shape[2], weight.shape[3])
    padding, more, stride = pair(padding), pair(output_padding), pair(stride)
    if x.shape[2:] == (1, 1) and padding == more == (0, 0):
        y = x.flatten(1) @ weight.permute(0, 2, 3, 1).flatten(1)  # (b, k·k·out)
        y = y.view(len(x), *kernel, channels).permute(0, 3, 1, 2)
    elif channels == 1:
        patches = x.permute(0, 2, 3, 1).flatten(0, 2) @ weight.flatten(1)  # (b·h·w, k·k)
        patches = patches.view(len(x), -1, weight[0].numel()).transpose(1, 2)
        size = transposed_size(x, kernel, stride, padding, more)
        y = functional.fold(patches, size, kernel, padding=padding, stride=stride)
    else:
        return None
    return y if bias is None else y + bias[:, None, None]


_FORMS: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv2d: _conv2d,
    torch.conv_transpose2d: _conv_transpose2d,
}


def _plain_float(x: Tensor, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether it is a float32 batch without anything unusual; autocast has its own fast kernels."""
    usual = x.ndim == 4 and is_usual(padding, dilation, groups)
    return usual and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def is_usual(padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution is neither grouped nor dilated nor padded by name."""
    return groups == 1 and pair(dilation) == (1, 1) and not isinstance(padding, str)


def transposed_size(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], more: tuple[int, int]
) -> tuple[int, int]:
    """Height and width of a transposed convolution of `x` `(n, c, h, w)`; `more` is what torch calls output padding."""
    height, width = ((x.shape[2 + k] - 1) * stride[k] - 2 * padding[k] + kernel[k] + more[k] for k in (0, 1))
    return height, width


def pair(value: Any) -> tuple[int, int]:
    """Height and width of an option that may be one number for both."""
    return (value, value) if isinstance(value, int) else tuple(value) if len(value) == 2 else (value[0], value[0])
