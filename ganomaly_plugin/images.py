"""What counts as a batch of images, checked once at the border."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganomaly_plugin.errors import InvalidInput, one_line

_ALLOWED = "Allowed: a non-empty array (n, c, h, w), uint8 in [0, 255] or float in [-1, 1]"
_SLACK = 1e-3  # float images may leave [-1, 1] by rounding, not by scaling


def check_images(images: Any, *, chw: tuple[int, int, int] | None = None) -> Tensor:
    """`images` as a CPU tensor, uint8 or float32, after checking shape, type and values.

    Args:
        images: NumPy array (a memory map stays one) or tensor, `(n, c, h, w)`.
        chw: When given, the `(c, h, w)` that a fitted detector expects.

    Raises:
        InvalidInput: The array is empty, has another shape or type, holds NaN, or leaves [-1, 1].
    """
    if isinstance(images, Tensor):
        if images.layout != torch.strided or images.is_meta or images.is_quantized:
            raise InvalidInput(
                f"Images are a tensor of layout {images.layout} on {images.device}. {_ALLOWED}, all of it in memory."
            )
        tensor = images.detach().cpu().resolve_neg()  # NumPy takes no view of negatives, such as the part of a complex tensor
    else:
        try:
            array = np.asarray(images)
        except (RuntimeError, TypeError, ValueError) as error:  # a list of several sizes, say
            raise InvalidInput(
                f"Images are a {type(images).__name__} that makes no array: {one_line(error)} {_ALLOWED}."
            ) from error
        if array.dtype.kind not in "fu" or array.dtype == object:
            raise InvalidInput(f"Images have dtype {array.dtype}. {_ALLOWED}.")
        if array.dtype.kind == "f" and array.dtype != np.float32:
            array = array.astype(np.float32)
        if array.dtype.kind == "u" and array.dtype != np.uint8:
            raise InvalidInput(f"Images have dtype {array.dtype}. {_ALLOWED}; scale 16-bit images to uint8 first.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            backwards = any(stride < 0 for stride in array.strides)  # which numpy overlooks along an axis of one
            tensor = torch.from_numpy(array.copy() if backwards else np.ascontiguousarray(array))
    if tensor.ndim != 4:
        raise InvalidInput(f"Images have shape {tuple(tensor.shape)}. {_ALLOWED}.")
    if 0 in tensor.shape:
        raise InvalidInput(f"Images are empty: shape {tuple(tensor.shape)}. {_ALLOWED}.")
    if tensor.dtype != torch.uint8:
        if not tensor.is_floating_point():
            raise InvalidInput(f"Images have dtype {tensor.dtype}. {_ALLOWED}.")
        tensor = tensor.float()
        _check_range(tensor)
    if chw is not None and tuple(tensor.shape[1:]) != tuple(chw):
        raise InvalidInput(
            f"Images are {_describe(tensor.shape[1:])}, but the detector was fitted on {_describe(chw)}. "
            "Give images of that size and channels, or fit again."
        )
    return tensor


def _check_range(tensor: Tensor) -> None:
    low, high = (float(v) for v in torch.aminmax(tensor))
    if np.isnan(low) or np.isnan(high):
        bad = int(torch.isnan(tensor).flatten(1).any(1).nonzero()[0])
        raise InvalidInput(f"Images hold NaN (first in image {bad}). {_ALLOWED}.")
    if low < -1 - _SLACK or high > 1 + _SLACK:
        raise InvalidInput(f"Float images span [{low:g}, {high:g}]. {_ALLOWED}; rescale them.")


def _describe(chw: Any) -> str:
    c, h, w = chw
    return f"{c}×{h}×{w} (channels×height×width)"


def to_float(images: Tensor, input_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """uint8 or [-1, 1] images as float32 in `input_range`, on the device they are on."""
    x = images.float().mul_(2 / 255).sub_(1) if images.dtype == torch.uint8 else images
    low, high = input_range
    if (low, high) == (-1.0, 1.0):
        return x
    return (x + 1) * ((high - low) / 2) + low
