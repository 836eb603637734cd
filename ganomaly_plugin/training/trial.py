"""Whether the kernels of the way "implicit" can be trusted on a device: there they are held to torch's own layers first."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from ganomaly_plugin.errors import one_line
from ganomaly_plugin.recipe import Precision
from ganomaly_plugin.training import implicit, normalise
from ganomaly_plugin.training.precision import precision
from ganomaly_plugin.training.products import Geometry
from ganomaly_plugin.training.room import out_of_memory

_TRIED = 8, 128  # images and channels of a trial: a whole block
#: What rounding may change, as a share of the largest number.
_MAY_CHANGE: Mapping[Precision, float] = {"float32": 1e-5, "tf32": 5e-3, "bf16": 2e-2}


def why_not_implicit(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`; None where they can.

    On a GPU they are held to torch's own convolutions first, once, on small maps: Triton compiles them there, which takes a C
    compiler, and not every GPU has the memory that they share within a block.
    """
    try:
        return _why_not(device)
    except RuntimeError as error:  # of want of memory, which may pass
        return one_line(error)


@functools.cache
def _why_not(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return None if implicit.is_interpreted() else f"its kernels are for a GPU, and this is {device.type}"
    try:
        error = _trial(device)
    except Exception as refused:
        if out_of_memory(refused):
            raise
        return f"Triton refuses: {one_line(refused)}"
    return None if error < 1 else f"its kernels are wrong by {error:.1f} times what rounding may change on this {device.type}"


def _trial(device: torch.device) -> float:
    """How far the kernels are from torch's own layers, as a multiple of what rounding may change."""
    geometry = Geometry((8, 8), (4, 4), (2, 2), (1, 1))
    rng, (n, c) = torch.Generator().manual_seed(0), _TRIED
    shapes = (n, *geometry.size, 2, c), (2, c, *geometry.kernel, c), (n, *geometry.places, 2, c)
    x, kernels, towards = (torch.randn(*shape, generator=rng) for shape in shapes)
    theirs: list[list[Tensor]] = []
    for k in range(2):
        image, kernel, weights = (each.double() for each in (x[:, :, :, k], kernels[k], towards[:, :, :, k]))
        image, kernel, weights = (each.permute(0, 3, 1, 2).requires_grad_() for each in (image, kernel, weights))
        y = torch.conv2d(image, kernel, stride=2, padding=1)
        its = [y, *torch.autograd.grad((y * weights).sum(), (image, kernel))]
        theirs.append([each.detach().permute(0, 2, 3, 1) for each in its])
    wanted = [torch.stack(each, models_at) for each, models_at in zip(zip(*theirs, strict=True), (3, 3, 0), strict=True)]
    errors: list[Tensor] = []
    for name, may in _MAY_CHANGE.items():
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        with precision(name):
            given = x.to(device, dtype).requires_grad_(), kernels.to(device).requires_grad_()
            maps, taps = (each.view_as(each) for each in given)  # no leaves, of which nobody can say who wants them
            y = implicit.conv2d(maps, taps, geometry, 1.0)
            mine = [y.detach(), *torch.autograd.grad(y, given, towards.to(device, dtype))]
        errors += [(got.double().cpu() - it).abs().max() / it.abs().max() / may for got, it in zip(mine, wanted, strict=True)]
        errors.append(normalise.error(device, dtype) / may)
    return float(torch.stack(errors).max())  # which is no number where one of them is none
