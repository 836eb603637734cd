"""Running a recipe's functions over images with networks as they score: no gradients, in chunks, evaluation mode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ganomaly_plugin.images import to_float
from ganomaly_plugin.recipe import Networks, Recipe
from ganomaly_plugin.training.cpu_convolutions import cpu_convolutions
from ganomaly_plugin.training.plain import resident
from ganomaly_plugin.training.precision import precision
from ganomaly_plugin.training.room import make_room, out_of_memory

SCORE_CHUNK = 256  # images scored at once when a score does not depend on its batch: on a CPU, and at least on a GPU
_TURNS = threading.RLock()  # threads that score with batch statistics change the same networks meanwhile
_GPU_PIXELS = 2**21  # of a channel: images of so many keep a GPU busy; 2048 of 32×32


def batches(recipe: Recipe, images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Checked images `(n, c, h, w)` in chunks, on `device`, in the recipe's input range; batches if scores depend on them."""
    return _chunks(recipe, images, device, _usual(recipe))


def in_chunks(
    recipe: Recipe, networks: Networks, images: Tensor, function: Callable[[Networks, Tensor], Tensor], device: torch.device
) -> Tensor:
    """`function(networks, chunk)` over all images, put together on the CPU; fewer at once where the memory does not do."""

    def of(x: Tensor) -> Tensor:
        several = recipe.batchnorm == "batch" and len(x) > recipe.batch_size
        with _ByBatch(len(x) // recipe.batch_size, recipe.batch_size) if several else nullcontext():
            return function(networks, x)

    with torch.no_grad(), scoring_mode(networks, recipe.batchnorm), cpu_convolutions(device):
        at_once = _at_once(recipe, images, device)
        while True:
            try:
                pieces = [_light(of(x)) for x in _chunks(recipe, images, device, at_once)]
                return torch.cat(pieces).cpu()
            except Exception as error:
                if not out_of_memory(error) or at_once <= _own(recipe):
                    raise
            at_once //= 2
            make_room()


def _light(y: Tensor) -> Tensor:
    """`y` where it may stay until all images are through: maps and images would fill a device, of scores none is waited for."""
    return y.cpu() if y.ndim > 2 else y


def _usual(recipe: Recipe) -> int:
    """Images of a chunk that keeps a CPU busy: a batch if scores depend on it."""
    return SCORE_CHUNK if recipe.batchnorm == "running" else recipe.batch_size


def _at_once(recipe: Recipe, images: Tensor, device: torch.device) -> int:
    """How many images are scored at once: more only by a GPU, and not in a search, which is work enough and drops images."""
    if device.type == "cpu" or not recipe.exportable:
        return _usual(recipe)
    return max(_usual(recipe), _GPU_PIXELS // images[0, 0].numel())


def _own(recipe: Recipe) -> int:
    """The fewest images that must be scored together."""
    return 1 if recipe.batchnorm == "running" else recipe.batch_size


def _chunks(recipe: Recipe, images: Tensor, device: torch.device, at_once: int) -> Iterator[Tensor]:
    """As `batches`, about so many at once: where scores depend on batches whole ones, and a last short one by itself."""
    given, own = resident(images, device), _own(recipe)
    whole = len(given) // own * own
    for part in (*given[:whole].split(max(1, at_once // own) * own), given[whole:]):
        if len(part):
            x = to_float(part.to(device), recipe.input_range)
            yield x.contiguous(memory_format=torch.channels_last)


class _ByBatch(TorchFunctionMode):
    """Within it BatchNorm that uses a batch's statistics takes those of each of `count` batches of `size` passed at once.

    Views of the images that a method passes together, all of one view first, are normalised with their batch.
    """

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self._count, self._size = count, size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm and kwargs["training"]:  # which names all but its first three arguments
            return self._normalised(args[0], kwargs["weight"], kwargs["bias"], kwargs["eps"])
        return func(*args, **kwargs)

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        views = x.unflatten(0, (-1, self._count, self._size))  # (views, count, size, c, ...)
        variance, mean = torch.var_mean(views, [0, 2, *range(4, views.ndim)], correction=0, keepdim=True)
        y = (views - mean) * (variance + eps).rsqrt()
        if weight is not None and bias is not None:
            of_channel = (-1, *(1 for _ in x.shape[2:]))
            y = torch.addcmul(bias.view(of_channel), y, weight.view(of_channel))
        return y.flatten(0, 2)


@contextmanager
def scoring_mode(networks: Networks, batchnorm: str) -> Iterator[None]:
    """Evaluation mode, float32; with `batchnorm="batch"` BatchNorm uses, but does not remember, the batch's statistics."""
    norms = [m for net in networks.values() for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = norms if batchnorm == "batch" else []
    with _TURNS if norms else nullcontext():
        for network in networks.values():
            network.eval()
        for norm in norms:
            norm.train()
            norm.track_running_stats = False
        try:
            with precision("float32"):
                yield
        finally:
            for norm in norms:
                norm.eval()
                norm.track_running_stats = True
