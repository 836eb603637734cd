"""Images as the networks want them, for anomalib: resized, in [-1, 1].

anomalib resizes with antialiasing while it trains and tests, and without it in exported models, since ONNX export
could not express it. A 300-pixel photograph brought to 32 pixels is then quite another image, and its score another.
The resize below is the antialiased one in operations that every format has, so exported scores are those of the test.
"""

from __future__ import annotations

from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize


def to_grey(images: Tensor) -> Tensor:
    """Luma (ITU-R 601, as Pillow's) of `(b, 3, h, w)` images, `(b, 1, h, w)`; exact where all channels are equal."""
    red, green, blue = images.split(1, dim=1)
    return red + 0.587 * (green - red) + 0.114 * (blue - red)


def resize_weights(images: Tensor, dim: int, size: int) -> Tensor:
    """How much each pixel along `dim` of `images` counts for each of `size` new ones, `(size, n)`; rows sum to 1.

    The triangle filter of Pillow and of torch's antialiased bilinear interpolation: as wide as the step from one new
    pixel to the next, and never narrower than two old pixels.
    """
    ones = torch.ones_like(images.select(0, 0).select(0, 0).select(1 - dim, 0))  # its length may be symbolic in an export
    pixels = ones.cumsum(0) - 0.5  # centres of the old pixels
    step = ones.sum() / size
    centres = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) * step
    weights = (1 - (pixels[None, :] - centres[:, None]).abs() / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


class AntialiasedResize(nn.Module):
    """Antialiased bilinear resize to `size` × `size` as two matrix products.

    Args:
        size: Side of the new images, pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """`(b, c, h, w)` float images → `(b, c, size, size)`."""
        rows, columns = resize_weights(images, 0, self.size), resize_weights(images, 1, self.size)
        return rows @ images @ columns.T  # (s, h) @ (b, c, h, w) @ (w, s)


class GanPreProcessor(PreProcessor):
    """anomalib's pre-processor from photographs in [0, 1] to network inputs in [-1, 1].

    Args:
        image_size: Side of the network's images, pixels; other shapes are stretched to it, as anomalib does.
    """

    def __init__(self, image_size: int) -> None:
        half = [0.5, 0.5, 0.5]
        super().__init__(transform=Compose([Resize((image_size, image_size), antialias=True), Normalize(mean=half, std=half)]))
        self._export_antialiased()

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take the transform that a checkpoint holds (anomalib 2.7 and later store one)."""
        super().load_checkpoint_config(config)
        self._export_antialiased()

    def _export_antialiased(self) -> None:
        """Exchange the export transform's resize, which is not antialiased."""
        transform: Any = self.export_transform
        for k, part in enumerate(getattr(transform, "transforms", [])):
            if isinstance(part, Resize) and len(set(part.size)) == 1 and len(part.size) == 2:
                transform.transforms[k] = AntialiasedResize(part.size[0])
