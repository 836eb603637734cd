"""What may be seen of an image beside itself: levelled, by its gradients, and turned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

DIRECTIONS = 8  # that a gradient may have
TURNS = 4  # quarter turns of an image


def levelled(images: Tensor) -> Tensor:
    """`images` `(n, c, h, w)`, each shifted and scaled to mean 0 and deviation 0.5 over its pixels and channels."""
    centred = images - images.mean((1, 2, 3), keepdim=True)
    return 0.5 * centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-3).sqrt()


def oriented_gradients(images: Tensor) -> Tensor:
    """Lengths, by direction, of the gradients of `images` `(n, c, s, s)`, their channels' mean; the border is repeated.

    Returns:
        `(n, DIRECTIONS, s, s)`, at least 0: each gradient is shared by the one or two directions less than
        360° / DIRECTIONS away.
    """
    grey = nn.functional.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    step = 2 * torch.pi / DIRECTIONS
    angles = (step * torch.arange(DIRECTIONS, device=images.device)).view(-1, 1, 1)
    along = across * angles.cos() + down * angles.sin()  # (n, directions, s, s)
    length = (across.square() + down.square()).sqrt()
    return (along - math.cos(step) * length).relu()


def histograms(gradients: Tensor, cells: int) -> Tensor:
    """Histograms of oriented gradients (HOG; Dalal and Triggs, CVPR 2005).

    Args:
        gradients: Of `oriented_gradients`, `(n, d, s, s)`; s is a multiple of `2 * cells`.
        cells: Windows along a side, each twice as wide as they are apart.

    Returns:
        `(n, d * cells * cells)`: roots of the mean length of each window's gradients in each direction.
    """
    apart = gradients.shape[-1] // cells
    return nn.functional.avg_pool2d(gradients, 2 * apart, apart, apart // 2).sqrt().flatten(1)


def turned(images: Tensor) -> Tensor:
    """`images` `(n, c, s, s)` by no, one, two and three quarter turns, `(4 n, c, s, s)`."""
    return torch.cat([torch.rot90(images, k, (2, 3)) for k in range(TURNS)])
