"""Convolutions of many models as products of matrices, one a model: images are laid out in patches and put together again.

Maps lie pixel by pixel, `(n, h, w, m, c)` for m models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


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
        to_rows = _by_row(gradients[0], matrices.transpose(1, 2)) if is_wanted(ctx, 0) else None
        to_matrices = None
        if is_wanted(ctx, 1):
            of_model = rows.transpose(0, 1)
            if matrices.stride(1) == 1:  # laid out the other way round, and so is its gradient
                to_matrices = torch.bmm(gradient.transpose(1, 2), of_model).transpose(1, 2)
            else:
                to_matrices = torch.bmm(of_model.transpose(1, 2), gradient)
        return to_rows, to_matrices


def is_wanted(ctx: Any, k: int) -> bool:
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
class Geometry:
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


def _patches(pixels: Tensor, geometry: Geometry) -> Tensor:
    """What the kernel covers at each of its places: `(n, h, w, m, c)` → `(n·h'·w', m, k·k·c)`.

    (torch's `unfold` launches a kernel for each image on a GPU, and has the places last, where a product wants them first.)
    """
    (down, across), (step_down, step_across), (py, px) = geometry.kernel, geometry.stride, geometry.padding
    padded = functional.pad(pixels, (0, 0, 0, 0, px, px, py, py)) if px or py else pixels
    windows = padded.unfold(1, down, step_down).unfold(2, across, step_across)  # (n, h', w', m, c, k, k)
    return windows.permute(0, 1, 2, 3, 5, 6, 4).flatten(0, 2).flatten(2)


def _image(patches: Tensor, geometry: Geometry) -> Tensor:
    """The sum of patches where they overlap, which is `_patches` transposed: `(n·h'·w', m, k·k·c)` → `(n, h, w, m, c)`."""
    taps = patches.unflatten(2, (*geometry.kernel, -1)).unflatten(0, (-1, *geometry.places))
    if geometry.places == (1, 1) and geometry.size == geometry.kernel and geometry.padding == (0, 0):  # nothing overlaps
        return taps[:, 0, 0].permute(0, 2, 3, 1, 4)
    taps = taps.permute(0, 1, 4, 2, 5, 3, 6)  # (n, h', k, w', k, m, c)
    (height, width), (down, across) = geometry.size, geometry.step
    image = patches.new_zeros(len(taps), -(-height // down), down, -(-width // across), across, *taps.shape[5:])
    for rows, row, places_down, taps_down in geometry.meetings(0):
        for columns, column, places_across, taps_across in geometry.meetings(1):
            image[:, rows, row, columns, column].add_(taps[:, places_down, taps_down, places_across, taps_across])
    return image.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _linear(
    forward: Callable[[Tensor, Geometry], Tensor], transposed: Callable[[Tensor, Geometry], Tensor]
) -> Callable[[Tensor, Geometry], Tensor]:
    """`forward`, a linear map, with gradients: by its transpose, which needs nothing saved."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor, geometry: Geometry) -> Tensor:
            ctx.geometry = geometry
            return forward(values, geometry)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
            return transposed(gradients[0], ctx.geometry), None

    return Linear.apply


multiply = _Products.apply  # (rows, matrices)
lay_out = _linear(_patches, _image)
put_together = _linear(_image, _patches)
