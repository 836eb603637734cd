"""Models of normal vectors, fitted after training: principal components, a memory of neighbours, and a scale of scores.

They are `nn.Module`s whose buffers have fixed sizes, so that a detector saves, loads and exports them as it does its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ganomaly_plugin.training.validation import CALIBRATION_LIMIT

STATISTICS = ("outside", "nearest", "inside")
NEIGHBOURS = 3
_SHRINK = 0.1  # of the mean variance, added to each variance before whitening divides by it
_RANK = 1e-6  # components with a smaller share of the largest variance are rounding
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
    """What normal vectors of one kind are like, in three statistics that higher is stranger in.

    - outside: mean square of what lies outside the principal components (process monitoring's Q, or SPE).
    - nearest: root mean square distance from the NEIGHBOURS nearest known vectors, within the components.
    - inside: mean square of the whitened coordinates within the components (Hotelling's T², shrunk).

    Args:
        size: Length of a vector.
        count: Principal components at most; also at most half of `size`, and in `fit` half of the vectors.
    """

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
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
        """Logarithm `(n,)` of each of STATISTICS: on that scale those of normal vectors are about Gaussian."""
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
        return {name: (found[name] + self.floor).log() for name in STATISTICS}
