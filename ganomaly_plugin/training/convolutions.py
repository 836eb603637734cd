"""Convolutions of many models at once, under `torch.func.vmap`: two ways to carry them out.

"grouped" is what torch makes of a mapped convolution: one convolution with a group for each model. "matmul" unfolds the
images into patches and multiplies matrices in a batch, a model each, which tensor cores take; it needs memory for the patches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.training.cpu_convolutions import pair, transposed_size

Convolutions = Literal["grouped", "matmul"]


@contextlib.contextmanager
def convolutions_as(how: Convolutions) -> Iterator[None]:
    """Within it, `conv2d` and `conv_transpose2d` are carried out as `how` says; the results are the same up to rounding."""
    if how == "grouped":
        yield
    else:
        with _AsMatmul():
            yield


class _AsMatmul(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced: dict[Any, Callable[..., Tensor]] = {
            torch.conv2d: _conv2d,
            torch.conv_transpose2d: _conv_transpose2d,
        }
        return replaced.get(func, func)(*args, **(kwargs or {}))


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    _check(groups, dilation)
    n, _, height, width = x.shape
    out, kernel = len(weight), (weight.shape[2], weight.shape[3])
    (sy, sx), (py, px) = pair(stride), pair(padding)
    patches = functional.unfold(x, kernel, padding=(py, px), stride=(sy, sx))  # (n, c·k·k, h'·w')
    y = (weight.flatten(1) @ patches).view(
        n, out, (height + 2 * py - kernel[0]) // sy + 1, (width + 2 * px - kernel[1]) // sx + 1
    )
    return y if bias is None else y + bias[:, None, None]


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
    size = transposed_size(x, kernel, stride, padding, pair(output_padding))
    patches = weight.flatten(1).T @ x.flatten(2)  # (n, o·k·k, h·w)
    y = functional.fold(patches, size, kernel, padding=padding, stride=stride)
    return y if bias is None else y + bias[:, None, None]


def _check(groups: int, dilation: Any) -> None:
    if groups != 1 or pair(dilation) != (1, 1):
        raise InvalidInput("Grouped and dilated convolutions are not made matrix products. Stack with grouped convolutions.")
