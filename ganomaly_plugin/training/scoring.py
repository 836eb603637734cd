"""Running a recipe's functions over images with networks as they score: no gradients, in chunks, evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ganomaly_plugin.images import to_float
from ganomaly_plugin.recipe import Networks, Recipe
from ganomaly_plugin.training.cpu_convolutions import cpu_convolutions
from ganomaly_plugin.training.plain import resident
from ganomaly_plugin.training.precision import precision

SCORE_CHUNK = 256  # images scored at once when a score does not depend on its batch


def batches(recipe: Recipe, images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Checked images `(n, c, h, w)` in chunks, on `device`, in the recipe's input range."""
    size = recipe.batch_size if recipe.batchnorm == "batch" else SCORE_CHUNK
    for part in resident(images, device).split(size):
        x = to_float(part.to(device), recipe.input_range)
        yield x.contiguous(memory_format=torch.channels_last)


def in_chunks(
    recipe: Recipe, networks: Networks, images: Tensor, function: Callable[[Networks, Tensor], Tensor], device: torch.device
) -> Tensor:
    """`function(networks, chunk)` over all images, put together on the CPU."""
    with torch.no_grad(), scoring_mode(networks, recipe.batchnorm), cpu_convolutions(device):
        return torch.cat([function(networks, x) for x in batches(recipe, images, device)]).cpu()


@contextmanager
def scoring_mode(networks: Networks, batchnorm: str) -> Iterator[None]:
    """Evaluation mode, float32; with `batchnorm="batch"` BatchNorm uses, but does not remember, the batch's statistics."""
    norms = [m for net in networks.values() for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for network in networks.values():
        network.eval()
    if batchnorm == "running":
        with precision("float32"):
            yield
        return
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
