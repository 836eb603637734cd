"""Models of normal vectors, fitted after training: principal components, a memory of neighbours, and a whitening of scores.

They are `nn.Module`s whose buffers have fixed sizes, so that a detector saves, loads and exports them as it does its weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ganomaly_plugin.recipe import CALIBRATION_LIMIT

STATISTICS = ("outside", "nearest", "inside")
PEAK = "peak"  # a fourth one, of vectors that are images
NEIGHBOURS = 3
_SHRINK = 0.1  # of the mean variance, added to each variance before whitening divides by it
_WINDOW = 4  # windows side by side along an image's side; they overlap by half
_RANK = 1e-6  # components with a smaller share of the largest variance are rounding
_FLAT = 1e-6  # variance of standardised scores under which they are equal
_FLOOR = 1e-4  # of a vector's variance; smaller scores are as good as 0, and have no logarithm


class Components(nn.Module):
    """Mean and principal components of vectors, as buffers of a fixed size; unused components are zero."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("axes", torch.zeros(max(1, min(count, size // 2)), size))
        self.register_buffer("variance", torch.zeros(len(self.axes)))

    mean: Tensor
    axes: Tensor
    variance: Tensor

    def fit(self, vectors: Tensor, limit: int | None = None) -> None:
        """The components of `vectors` `(n, size)`, at most n - 1 and `limit`; none of equal vectors."""
        x = vectors.double()
        centred = x - x.mean(0)
        wide = x.shape[1] > len(x)
        values, sides = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
        values, sides = values.flip(0).clamp(min=0), sides.flip(1)
        kept = min(len(self.axes), len(x) - 1, int((values > _RANK * values[0]).sum()))
        kept = kept if limit is None else min(kept, limit)
        axes = (sides.T @ centred if wide else sides.T)[:kept]
        self.mean.copy_(x.mean(0))
        self.axes.zero_()
        self.variance.zero_()
        self.axes[:kept] = nn.functional.normalize(axes, dim=1).float()
        self.variance[:kept] = (values[:kept] / len(x)).float()

    def coordinates(self, vectors: Tensor) -> Tensor:
        """Where `vectors` `(n, size)` lie along the components, `(n, components)`."""
        return (vectors - self.mean) @ self.axes.T

    def residual(self, vectors: Tensor) -> Tensor:
        """What of `vectors` `(n, size)` lies outside mean and components."""
        return vectors - self.mean - self.coordinates(vectors) @ self.axes

    @property
    def deviation(self) -> Tensor:
        """What to divide each coordinate by, `(components,)`, to make its variance about 1; shrunk towards their mean."""
        return (self.variance + _SHRINK * self.variance.mean().clamp(min=1e-12)).sqrt()


class NormalVectors(nn.Module):
    """What normal vectors of one kind are like, in three or four statistics that higher is stranger in.

    - outside: mean square of what lies outside the principal components (process monitoring's Q, or SPE).
    - nearest: root mean square distance from the NEIGHBOURS nearest known vectors, within the components.
    - inside: mean square of the whitened coordinates within the components (Hotelling's T², shrunk).
    - peak, of images only: the largest such mean square as `outside` is, of windows a quarter of the image's side wide.

    Args:
        size: Length of a vector.
        count: Principal components at most; also at most half of `size`, and in `fit` half of the vectors.
        image: `(c, s, s)` where a vector is an image of that shape.
    """

    def __init__(self, size: int, count: int, image: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.image = image
        self.components = Components(size, count)
        self.register_buffer("bank", torch.zeros(CALIBRATION_LIMIT, len(self.components.axes)))
        self.register_buffer("count", torch.tensor(1))
        self.register_buffer("floor", torch.tensor(1.0))

    bank: Tensor
    count: Tensor
    floor: Tensor

    def fit(self, vectors: Tensor) -> None:
        """Remember `vectors` `(n, size)`, at most CALIBRATION_LIMIT."""
        self.components.fit(vectors, limit=len(vectors) // 2)  # of n vectors, n - 1 components leave nothing outside
        self.bank.zero_()
        self.bank[: len(vectors)] = self.components.coordinates(vectors)
        self.count.fill_(len(vectors))
        self.floor.copy_((_FLOOR * vectors.var(0, correction=0).mean()).clamp(min=1e-10))

    def forward(self, vectors: Tensor) -> dict[str, Tensor]:
        """Logarithm `(n,)` of each statistic: on that scale those of normal vectors are about Gaussian."""
        known = self.bank[: int(self.count)]
        here = self.components.coordinates(vectors)
        squared = here.square().sum(1, keepdim=True) + known.square().sum(1) - 2 * here @ known.T
        nearest = squared.topk(min(NEIGHBOURS, len(known)), dim=1, largest=False).values.clamp(min=0)
        outside = vectors - self.components.mean - here @ self.components.axes
        whitened = here / self.components.deviation
        found = {
            "outside": outside.square().mean(1),
            "nearest": nearest.mean(1) / vectors.shape[1],
            "inside": whitened.square().mean(1) * self.components.variance.sum() / vectors.shape[1],
        }
        if self.image is not None:
            window = max(2, self.image[-1] // _WINDOW)
            local = nn.functional.avg_pool2d(outside.view(-1, *self.image).square(), window, window // 2)
            found[PEAK] = local.mean(1).amax((1, 2))
        return {name: (value + self.floor).log() for name, value in found.items()}


class Whitening(nn.Module):
    """Makes standardised scores uncorrelated, and their variances 1: of each of several subsets of them by itself.

    The matrix of a subset is the symmetric root of its inverse covariance (ZCA), the one that changes each score least:
    what comes out is still that score, less what the others of the subset say too.

    Args:
        subsets: Places of each subset's scores among all.
        size: How many scores there are.
    """

    def __init__(self, subsets: Sequence[Sequence[int]], size: int) -> None:
        super().__init__()
        self.subsets = [list(subset) for subset in subsets]
        matrices = torch.zeros(len(self.subsets), size, size)
        for matrix, subset in zip(matrices, self.subsets, strict=True):
            matrix[subset, subset] = 1.0
        self.register_buffer("matrices", matrices)

    matrices: Tensor

    def fit(self, values: Tensor) -> None:
        """Learn from the standardised scores `values` `(n, size)` of normal images; nothing of equal ones."""
        centred = (values - values.mean(0)).double()
        covariance = centred.T @ centred / len(values)
        for matrix, subset in zip(self.matrices, self.subsets, strict=True):
            places = torch.tensor(subset, device=matrix.device)
            own = covariance[places[:, None], places]
            variance, one = own.diagonal().mean(), torch.eye(len(own), dtype=own.dtype, device=own.device)
            root = one
            if variance > _FLAT:
                axes = torch.linalg.eigh(own + _SHRINK * variance * one)
                root = axes.eigenvectors / axes.eigenvalues.sqrt() @ axes.eigenvectors.T
            matrix[places[:, None], places] = root.to(matrix)

    def forward(self, values: Tensor, k: int) -> Tensor:
        """Whitened `values` `(n, size)`, of the k-th subset; the others are 0."""
        return values @ self.matrices[k]
