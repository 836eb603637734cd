"""Classical baselines on pixels, through scikit-learn: PCA, nearest neighbours, isolation forest, one-class SVM.

They run on the CPU, and see an image as one vector of standardised pixels (`ganomaly_plugin.detectors.pixels`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import OneClassSVM
from torch import Tensor

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.detectors.base import BaseDetector
from ganomaly_plugin.detectors.pixels import CHUNK, PixelModel, Scaler, draws_of, sklearn_seed
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.recipe import at_least


class Pca(BaseDetector):
    """Reconstruction error after projection on the training images' principal components.

    The score is the mean squared residual over the standardised pixels.

    Args:
        n_components: Components kept, at most as many as the training images have: n images span n - 1 directions at
            best. Must be smaller than the number of pixels, or nothing would be left to reconstruct badly.
        standardise: Divide each pixel by its standard deviation over the training images.

    The components are exact where there are at most 4,096 pixels and as many images or more (eigenvectors of the
    covariance), and where images or pixels are at most 1,024 or over four fifths of all components are kept (full SVD).
    Else, as of 2,000 images of 3×32×32, scikit-learn's randomised SVD finds them, seeded.
    """

    has_anomaly_map: ClassVar[bool] = True
    conformance_exemptions: ClassVar[dict[str, str]] = {
        "seed_matters": "nothing is drawn at random unless pixels and images are over a thousand (randomised SVD)"
    }

    def __init__(self, n_components: int = 100, standardise: bool = True) -> None:
        at_least(n_components=(n_components, 1))
        self.n_components = n_components
        self.standardise = standardise

    @property
    def hparams(self) -> dict[str, Any]:
        """The hyperparameters."""
        return {"n_components": self.n_components, "standardise": self.standardise}

    def check_shape(self, chw: tuple[int, int, int]) -> None:
        """Raise InvalidInput when the components could span the whole space of the pixels."""
        d = int(np.prod(chw))
        if self.n_components >= d:
            raise InvalidInput(
                f"n_components must be smaller than the number of pixels, {d} (channels·height·width), got "
                f"{self.n_components}: with all components every image is reconstructed perfectly."
            )

    def _fit(self, images: Tensor, *, seed: int, epochs: int | None, device: torch.device, on_epoch: OnEpoch | None) -> None:
        self.scaler_ = Scaler.of(images, self.standardise)
        self.train_used_ = n = len(images)
        vectors = self.scaler_.vectors(images)
        count = min(self.n_components, n - 1)
        if np.ptp(vectors, axis=0).max() == 0:  # equal images span no direction; the residual is the distance from them
            self.mean_, self.components_ = vectors[0], vectors[:0]
            return
        solver = _pca_solver(n, vectors.shape[1], count)
        pca = PCA(count, svd_solver=solver, random_state=sklearn_seed(seed)).fit(vectors)
        # Components without variance are arbitrary directions: removing them from a residual would be noise.
        real = pca.explained_variance_ > 1e-6 * pca.explained_variance_[0]
        self.mean_ = pca.mean_.astype(np.float32)
        self.components_ = np.ascontiguousarray(pca.components_[real], dtype=np.float32)

    def _residuals(self, images: Tensor) -> np.ndarray:
        centred = self.scaler_.vectors(images) - self.mean_
        return (centred - (centred @ self.components_.T) @ self.components_) ** 2  # (n, c·h·w)

    def _score(self, images: Tensor) -> np.ndarray:
        return np.concatenate([self._residuals(part).mean(1, dtype=np.float64) for part in images.split(CHUNK)])

    def _anomaly_map(self, images: Tensor) -> np.ndarray:
        parts = (self._residuals(part).reshape(part.shape).mean(1) for part in images.split(CHUNK))
        return np.concatenate(list(parts))

    def describe(self) -> dict[str, Any]:
        """Numbers learned, images used, and components kept (fewer than asked when the images span fewer)."""
        learned = self.components_.size + 2 * self.mean_.size
        return {"parameters": learned, "train_used": self.train_used_, "components": len(self.components_)}

    def _state(self) -> dict[str, Any]:
        arrays = {
            "pixel_mean": self.scaler_.mean,
            "pixel_divisor": self.scaler_.divisor,
            "mean": self.mean_,
            "components": self.components_,
        }
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | {"train_used": self.train_used_}

    def _load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.scaler_ = Scaler(state["pixel_mean"].numpy(), state["pixel_divisor"].numpy())
        self.mean_, self.components_ = state["mean"].numpy(), state["components"].numpy()
        self.train_used_ = int(state["train_used"])


class NearestNeighbours(PixelModel):
    """Euclidean distance from the nearest training images, by exact search.

    Args:
        k: Neighbours; all training images when there are fewer.
        distance: "mean" of the distances to the k nearest, or the distance to the "kth".
        max_train: Search at most this many training images, drawn by seed; None all of them. All of them is
            practical: 54,000 images of 32×32 take a core 2.6 ms for each scored image.
        standardise: Divide each pixel by its standard deviation over the training images used.
    """

    conformance_hparams: ClassVar[dict[str, Any]] = {"max_train": 16}

    def __init__(
        self,
        k: int = 5,
        distance: Literal["mean", "kth"] = "mean",
        max_train: int | None = None,
        standardise: bool = True,
    ) -> None:
        at_least(k=(k, 1), max_train=(1 if max_train is None else max_train, 1))
        if distance not in ("mean", "kth"):
            raise InvalidInput(f"distance must be mean or kth, got {distance!r}.")
        self.k = k
        self.distance = distance
        self.max_train = max_train
        self.standardise = standardise
        self.conformance_exemptions = draws_of(max_train)  # type: ignore[misc]

    @property
    def hparams(self) -> dict[str, Any]:
        """The hyperparameters."""
        names = ("k", "distance", "max_train", "standardise")
        return {name: getattr(self, name) for name in names}

    def _fit_vectors(self, vectors: np.ndarray, seed: int) -> None:
        self.model_ = NearestNeighbors(n_neighbors=min(self.k, len(vectors)), algorithm="brute").fit(vectors)

    def _score_vectors(self, vectors: np.ndarray) -> np.ndarray:
        distances, _ = self.model_.kneighbors(vectors)  # (n, k), ascending
        return distances.mean(1) if self.distance == "mean" else distances[:, -1]

    def describe(self) -> dict[str, Any]:
        """Numbers stored (the training vectors), images used and neighbours."""
        return {"parameters": self.images_.numel(), "train_used": len(self.images_), "neighbours": self.model_.n_neighbors}


class IsolationForestDetector(PixelModel):
    """Isolation forest (Liu, Ting, Zhou, ICDM 2008): images that random splits separate early are anomalous.

    scikit-learn's defaults: each tree sees min(256, n) images and all pixels. The score is the paper's, in (0, 1].
    Splits are drawn within each pixel's range, so standardising the pixels changes nothing but rounding.

    Args:
        n_estimators: Trees.
        max_train: Draw the trees' images from at most this many training images, chosen by seed; None all of them.
    """

    standardise = True

    def __init__(self, n_estimators: int = 100, max_train: int | None = None) -> None:
        at_least(n_estimators=(n_estimators, 1), max_train=(1 if max_train is None else max_train, 1))
        self.n_estimators = n_estimators
        self.max_train = max_train

    @property
    def hparams(self) -> dict[str, Any]:
        """The hyperparameters."""
        return {"n_estimators": self.n_estimators, "max_train": self.max_train}

    def _fit_vectors(self, vectors: np.ndarray, seed: int) -> None:
        self.model_ = IsolationForest(n_estimators=self.n_estimators, random_state=sklearn_seed(seed)).fit(vectors)

    def _score_vectors(self, vectors: np.ndarray) -> np.ndarray:
        return -self.model_.score_samples(vectors)

    def describe(self) -> dict[str, Any]:
        """Nodes of all trees, and images used."""
        nodes = sum(tree.tree_.node_count for tree in self.model_.estimators_)
        return {"parameters": nodes, "train_used": len(self.images_)}


class OneClassSvm(PixelModel):
    """One-class SVM (Schölkopf et al., 2001) with an RBF kernel; the score is minus the sum over support vectors.

    scikit-learn's defaults: gamma is 1 / (number of pixels · variance of the vectors).

    Args:
        nu: Share of the training images that may lie outside, and least share of support vectors.
        max_train: Fit at most this many training images, drawn by seed, as the cost grows with their square; None all.
        standardise: Divide each pixel by its standard deviation over the training images used.
    """

    conformance_hparams: ClassVar[dict[str, Any]] = {"max_train": 16}

    def __init__(self, nu: float = 0.5, max_train: int | None = 2000, standardise: bool = True) -> None:
        at_least(max_train=(1 if max_train is None else max_train, 1))
        if not 0 < nu < 1:
            raise InvalidInput(f"nu must lie between 0 and 1, got {nu}.")
        self.nu = nu
        self.max_train = max_train
        self.standardise = standardise
        self.conformance_exemptions = draws_of(max_train)  # type: ignore[misc]

    @property
    def hparams(self) -> dict[str, Any]:
        """The hyperparameters."""
        return {"nu": self.nu, "max_train": self.max_train, "standardise": self.standardise}

    def _fit_vectors(self, vectors: np.ndarray, seed: int) -> None:
        self.model_ = OneClassSVM(nu=self.nu)
        self.model_.random_state = 0  # not an argument; None would draw from NumPy's global state, though nothing uses it
        self.model_.fit(vectors)

    def _score_vectors(self, vectors: np.ndarray) -> np.ndarray:
        return -self.model_.score_samples(vectors)

    def describe(self) -> dict[str, Any]:
        """Support vectors (their numbers and weights are the parameters), and images used."""
        count = len(self.model_.support_)
        return {
            "parameters": count * (self.images_[0].numel() + 1) + 1,
            "train_used": len(self.images_),
            "support_vectors": count,
        }


def _pca_solver(n: int, d: int, count: int) -> Literal["covariance_eigh", "full", "randomized"]:
    """The exact solver that is cheapest for `n` vectors of length `d`, or the randomised one where none is cheap."""
    if d <= 4096 and n >= d:
        return "covariance_eigh"
    if min(n, d) <= 1024 or count > 0.8 * min(n, d):
        return "full"
    return "randomized"
