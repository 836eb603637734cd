"""scikit-learn's optical digits: 1,797 images of 8×8 pixels and 17 grey levels, in the package, no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ganomaly_plugin.datasets.base import ImageDataset, resize


def load(*, root: Path, image_size: int = 16) -> ImageDataset:
    """The digits upsampled bilinearly to `image_size`; there is no official split.

    Source: UCI "Optical Recognition of Handwritten Digits", the test part, as scikit-learn ships it.
    """
    from sklearn.datasets import load_digits  # slow to import, and tables only ask for the options

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    classes = tuple(str(k) for k in range(10))
    return ImageDataset("digits", resize(images, image_size), labels.astype(np.int64), classes)
