"""Upright and flat stripes: a small data set from start to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ganomaly_plugin.datasets.base import ImageDataset
from ganomaly_plugin.errors import InvalidInput


def load(*, root: Path, image_size: int = 16, width: int = 2) -> ImageDataset:
    """Forty noisy images of stripes, half of them upright; nothing is read from `root`.

    Args:
        root: The data root.
        image_size: Side of the images, pixels.
        width: Width of a stripe, pixels.

    Raises:
        InvalidInput: A stripe has no width.
    """
    if width < 1:
        raise InvalidInput(f"width must be at least 1, got {width}.")
    line = np.arange(image_size) // width % 2 * 200
    upright = np.broadcast_to(line, (image_size, image_size))
    noise = np.random.default_rng(0).integers(0, 56, (40, 1, image_size, image_size))
    images = (np.tile([upright, upright.T], (20, 1, 1))[:, None] + noise).astype(np.uint8)
    return ImageDataset("stripes", images, np.tile([0, 1], 20), ("upright", "flat"))
