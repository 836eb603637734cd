"""Images as vectors of standardised pixels, and the shell of scikit-learn models that are fitted to them.

Each pixel is standardised with the mean and standard deviation it has over the training images that are used; a pixel
that is constant there is divided by 1. Standardising gives pixels that are almost always dark (MNIST's border) the
weight of all others, which costs AUROC on such sets; `standardise=False` divides by nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.detectors.base import SUITE_BATCH, SUITE_BATCHES, BaseDetector
from ganomaly_plugin.errors import CorruptFile
from ganomaly_plugin.images import to_float

CHUNK = 4096  # images turned into vectors and scored at once: bounds memory, not the result
CONSTANT = 1e-6  # a smaller deviation is rounding: one grey level in one of a million images gives 8e-6
PROBES = 8  # training images whose scores a saved model must reproduce


def draws_of(max_train: int | None) -> dict[str, str]:
    """What the conformance suite is told of a method that draws `max_train` training images and nothing else at random."""
    if max_train is not None and max_train < SUITE_BATCHES * SUITE_BATCH:
        return {}
    return {"seed_matters": "nothing is drawn at random unless max_train is smaller than the training set"}


@dataclass(frozen=True)
class Scaler:
    """What turns images into vectors: the mean and the divisor of each pixel, float32 `(c·h·w,)`."""

    mean: np.ndarray
    divisor: np.ndarray

    @classmethod
    def of(cls, images: Tensor, standardise: bool) -> Scaler:
        """The scaler of training images `(n, c, h, w)`; with `standardise=False` it only subtracts the mean."""
        # Sums of the distances from the first image: a constant pixel then has a deviation of exactly zero.
        origin = to_float(images[:1]).flatten().double()
        total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
        for part in images.split(CHUNK):
            shifted = to_float(part).flatten(1).double() - origin
            total += shifted.sum(0)
            squares += shifted.square().sum(0)
        shift = total / len(images)
        mean = (origin + shift).float().numpy()
        if not standardise:
            return cls(mean, np.ones_like(mean))
        deviation = (squares / len(images) - shift.square()).clamp_(min=0).sqrt_()
        deviation[deviation < CONSTANT] = 1.0
        return cls(mean, deviation.float().numpy())

    def vectors(self, images: Tensor) -> np.ndarray:
        """Images `(n, c, h, w)` as float32 vectors `(n, c·h·w)`."""
        out = np.empty((len(images), len(self.mean)), np.float32)
        for start in range(0, len(images), CHUNK):
            part = to_float(images[start : start + CHUNK]).flatten(1).numpy()
            out[start : start + CHUNK] = (part - self.mean) / self.divisor
        return out


class PixelModel(BaseDetector):
    """A scikit-learn model of the training images' vectors. It is saved as its images and seed, and refitted on load."""

    max_train: int | None
    standardise: bool

    def _fit(self, images: Tensor, *, seed: int, epochs: int | None, device: torch.device, on_epoch: OnEpoch | None) -> None:
        if self.max_train is not None and self.max_train < len(images):
            chosen = np.random.default_rng(seed).choice(len(images), self.max_train, replace=False)
            self._refit(images[np.sort(chosen)], seed)
        else:
            self._refit(images.clone(), seed)  # the images may share memory with the caller's array

    def _refit(self, images: Tensor, seed: int) -> None:
        self.images_, self.seed_ = images, seed
        self.scaler_ = Scaler.of(images, self.standardise)
        self._fit_vectors(self.scaler_.vectors(images), seed)

    @abstractmethod
    def _fit_vectors(self, vectors: np.ndarray, seed: int) -> None:
        """Fit the model to vectors `(n, d)`."""

    @abstractmethod
    def _score_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """Scores `(n,)` of vectors `(n, d)`; higher is more anomalous."""

    def _score(self, images: Tensor) -> np.ndarray:
        return np.concatenate([self._score_vectors(self.scaler_.vectors(part)) for part in images.split(CHUNK)])

    def _state(self) -> dict[str, Any]:
        probes = torch.from_numpy(np.asarray(self._score(self.images_[:PROBES]), dtype=np.float64))
        return {"images": self.images_, "seed": self.seed_, "probes": probes}

    def _load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self._refit(state["images"], int(state["seed"]))
        # Another release of scikit-learn may fit another model from the same images: say so rather than score with it.
        if not np.allclose(self._score(self.images_[:PROBES]), state["probes"].numpy(), rtol=1e-5, atol=1e-6):
            raise CorruptFile(
                f"The saved {self.name} does not reproduce its scores when it is refitted here, perhaps because another "
                "release of scikit-learn saved it. Fit it again."
            )


def sklearn_seed(seed: int) -> int:
    """A seed for scikit-learn that has nothing to do with other generators of the same seed."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
