"""Detectors made for testing the conformance suite: a sound one, each of its faults, and one without any base class."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import numpy as np
import torch

from ganomaly_plugin.detectors.base import BaseDetector
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.images import to_float


class Sound(BaseDetector):
    """Distance from the mean image, with pixels weighted at random: nothing is wrong with it."""

    has_anomaly_map: ClassVar[bool] = True

    def __init__(self, power: float = 2.0) -> None:
        self.power = power

    @property
    def hparams(self) -> dict[str, Any]:
        return {"power": self.power}

    def _weights(self, d: int, seed: int) -> torch.Tensor:
        return torch.rand(d, generator=torch.Generator().manual_seed(seed)) + 0.5

    def _fit(self, images, *, seed, epochs, device, on_epoch):
        x = to_float(images).flatten(1)
        self.mean_, self.weights_ = x.mean(0), self._weights(x.shape[1], seed)

    def _errors(self, images):
        return (to_float(images).flatten(1) - self.mean_).abs() ** self.power * self.weights_

    def _score(self, images):
        return self._errors(images).double().mean(1)

    def _anomaly_map(self, images):
        return self._errors(images).reshape(images.shape).mean(1)

    def _state(self):
        return {"mean": self.mean_, "weights": self.weights_}

    def _load_state(self, state, device):
        self.mean_, self.weights_ = state["mean"], state["weights"]


class Differentiable(Sound):
    """Leaves scores and maps as its network makes them: with gradients, of few bits."""

    def _fit(self, images, **options):
        super()._fit(images, **options)
        self.weights_ = torch.nn.Parameter(self.weights_)

    def _score(self, images):
        return self._errors(images).mean(1)

    def _anomaly_map(self, images):
        return super()._anomaly_map(images).bfloat16()


class Exits(Sound):
    def _score(self, images):
        raise SystemExit(0)


class WrongShape(Sound):
    def score(self, images):
        return super().score(images)[:, None]


class Float32Scores(Sound):
    def score(self, images):
        return super().score(images).astype(np.float32)


class NanScores(Sound):
    def _score(self, images):
        return torch.where(torch.arange(len(images)) == 1, torch.nan, super()._score(images))


class MutatesInput(Sound):
    def fit(self, images, **options):
        super().fit(images, **options)
        np.asarray(images)[0] = 0
        return self


class WritesIntoInput(Sound):
    def score(self, images):
        if not np.asarray(images).flags.writeable:
            raise ValueError("buffer source array is read-only")
        return super().score(images)


class RescalesOverBatch(Sound):
    def _score(self, images):
        scores = super()._score(images)
        return (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-9)


class IgnoresSeed(Sound):
    def _weights(self, d, seed):
        return super()._weights(d, 0)


class UsesGlobalRng(Sound):
    def _weights(self, d, seed):
        return torch.rand(d) + 0.5


class DrawsFromTheClock(Sound):
    def _weights(self, d, seed):
        return torch.from_numpy(np.random.default_rng().uniform(0.5, 1.5, d))


class SeedsGlobalRng(Sound):
    def _weights(self, d, seed):
        np.random.seed(seed)  # noqa: NPY002 - the fault
        return super()._weights(d, seed)


class Pickles(Sound):
    def _state(self):
        return {**super()._state(), "self": random.Random(0)}


class LosesWeights(Sound):
    def _load_state(self, state, device):
        self.mean_, self.weights_ = state["mean"], torch.ones_like(state["weights"])


class WritesTwoFiles(Sound):
    def save(self, path):
        super().save(path)
        super().save(f"{path}.bak")


class WarmStart(Sound):
    def _fit(self, images, **options):
        old = getattr(self, "mean_", None)
        super()._fit(images, **options)
        if old is not None and old.shape == self.mean_.shape:
            self.mean_ = (old + self.mean_) / 2


class LearnsWhileScoring(Sound):
    def _score(self, images):
        scores = super()._score(images)
        self.mean_ = 0.9 * self.mean_ + 0.1 * to_float(images).flatten(1).mean(0)
        return scores


class FitReturnsNothing(Sound):
    def fit(self, images, **options):
        super().fit(images, **options)


class ForgetsHparams(Sound):
    @property
    def hparams(self):
        return {"power": 2.0}


class UpsideDown(Sound):
    def _score(self, images):
        return -super()._score(images)


class GreyOnly(Sound):
    def check_shape(self, chw):
        if chw[0] != 1:
            raise InvalidInput("grey images only")


class SmallOnly(Sound):
    def check_shape(self, chw):
        if chw[1] > 32:
            raise InvalidInput("small images only")


class MapOfChannels(Sound):
    def _anomaly_map(self, images):
        return self._errors(images).reshape(images.shape)


class MapThatCrashes(Sound):
    has_anomaly_map = False

    def _anomaly_map(self, images):
        raise AttributeError("no map")


class ForgetsOnEpoch(Sound):
    has_epochs = True


class CountsEpochsFromZero(Sound):
    has_epochs = True

    def _fit(self, images, *, seed, epochs, device, on_epoch):
        super()._fit(images, seed=seed, epochs=epochs, device=device, on_epoch=on_epoch)
        for epoch in range(epochs or 1):
            if on_epoch is not None:
                on_epoch(epoch, self)


class CrashesOnSingleRest(Sound):
    def _fit(self, images, **options):
        if len(images) > 1 and len(images) % 8 == 1:
            raise RuntimeError("Expected more than 1 value per channel when training")
        super()._fit(images, **options)


class WantsFullBatch(Sound):
    def _fit(self, images, **options):
        if len(images) < 8:
            raise InvalidInput("at least 8 images, please")
        super()._fit(images, **options)


class DividesByZero(Sound):
    def _fit(self, images, **options):
        self.scale_ = 1 // (len(images) - 1)
        super()._fit(images, **options)


class TakesPixelsAsTheyAre(Sound):
    def score(self, images):
        self._check(images)
        return self._score(torch.tensor(np.asarray(images, np.float32) / 255)).numpy()


class Unchecked(Sound):
    """Takes whatever it gets, and breaks inside or computes nonsense."""

    def fit(self, images, **options):
        x = torch.tensor(np.asarray(images)).reshape(len(images), 1, -1, 1)
        self.image_shape_ = (1, 1, 1)
        self._fit(x if x.dtype == torch.uint8 else x.float(), seed=options.get("seed", 0), epochs=1, device=None, on_epoch=None)
        return self

    def _check(self, images):
        x = torch.tensor(np.asarray(images))
        return x if x.dtype == torch.uint8 else x.float()


class ManyLines(Sound):
    def score(self, images):
        try:
            return super().score(images)
        except ValueError as error:
            raise ValueError(f"bad images\n{error}") from error


class WrongError(Sound):
    def fit(self, images, **options):
        assert np.asarray(images).dtype.kind in "uf", "wrong dtype"
        return super().fit(images, **options)


class MedianOnly:
    """Nothing but the three methods of the protocol, and no room for a name."""

    __slots__ = ("median",)
    conformance_exemptions: ClassVar[dict[str, str]] = {"seed_matters": "a median draws nothing"}

    def fit(self, images, *, seed=0, epochs=None, device="auto", on_epoch=None):
        self.median = np.median(self._checked(images), axis=0)
        return self

    def score(self, images):
        if not hasattr(self, "median"):
            raise ValueError("fit first")
        x = self._checked(images)
        if x.shape[1:] != self.median.shape:
            raise ValueError(f"fitted on {self.median.shape}, got {x.shape[1:]}")
        return np.abs(x - self.median).mean((1, 2, 3))

    def save(self, path):
        if not hasattr(self, "median"):
            raise ValueError("fit first")
        with open(path, "wb") as file:  # noqa: PTH123 - what an outsider may write
            np.save(file, self.median)

    def _checked(self, images):
        x = np.asarray(images)
        if x.ndim != 4 or x.size == 0 or x.dtype.kind not in "uf":
            raise ValueError("images must be (n, c, h, w), uint8 or float")
        x = x / 127.5 - 1 if x.dtype == np.uint8 else x.astype(np.float64)
        if not np.abs(x).max() <= 1.001:
            raise ValueError("images must lie in [-1, 1]")
        return x


class Frozen(MedianOnly):
    __slots__ = ()
    name = property(lambda self: "mine")


class Exempted(UpsideDown):
    conformance_exemptions: ClassVar[dict[str, str]] = {"beats_chance": "looks for what is\nordinary"}


class MisspelledExemption(Sound):
    conformance_exemptions: ClassVar[dict[str, str]] = {"beat_chance": "because"}


class WordlessExemption(Sound):
    conformance_exemptions: ClassVar[dict[str, str]] = {"sizes": " "}


class CannotBeMade(Sound):
    def __init__(self) -> None:
        raise RuntimeError("no licence\nfound")


class OnAnyDevice(Sound):
    """Stays on the CPU whatever device it is told: stands in for a CUDA detector where there is none."""

    def fit(self, images, *, device="cpu", **options):
        return super().fit(images, device="cpu", **options)


class LosesWeightsOnTheWay(OnAnyDevice, LosesWeights):
    pass
