"""The detector under test on cheap settings, the toy images it is given, and the vocabulary of the checks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from ganomaly_plugin.detectors.base import SUITE_BATCH, SUITE_BATCHES, resolve_device
from ganomaly_plugin.errors import BenchError
from ganomaly_plugin.hparams import recorded_hparams, told_hparams
from ganomaly_plugin.registry import make_detector, resolve


class Failed(Exception):
    """A check's finding: what was expected and what came."""


class Exempt(Exception):
    """The reason why a check does not apply."""


class Subject:
    """Makes and fits the detector under test, for one check after another.

    Args:
        name: A registered name or class path.
        hparams: What the user set; comes before the class's `conformance_hparams`.
        device: Where to fit and score.
    """

    def __init__(self, name: str, hparams: Mapping[str, Any], device: str) -> None:
        found = resolve("detector", name)
        cls = getattr(found, "func", found)  # a family's name and argument resolve to a partial
        resolve_device(device)
        self.name, self.device = name, device
        self.given = {**getattr(cls, "conformance_hparams", {}), **hparams}
        detector = self.make()
        self.exemptions: dict[str, str] = dict(getattr(detector, "conformance_exemptions", {}))
        self.epochs: int | None = getattr(detector, "conformance_epochs", None)
        self.has_epochs = bool(getattr(detector, "has_epochs", True))
        self.shape: tuple[int, int, int] = tuple(getattr(detector, "conformance_shape", (1, 16, 16)))
        self.cls = found
        self.hparams = self.told(detector)
        self.batch = int(self.hparams.get("batch_size") or SUITE_BATCH)

    def told(self, detector: Any) -> dict[str, Any]:
        """The detector's `hparams` as records and files hold them; {} where it has none."""
        return recorded_hparams(self.name, self.cls, told_hparams(self.name, detector))

    def make(self) -> Any:
        """A fresh detector."""
        return make_detector(self.name, **self.given)

    def fit(self, images: np.ndarray, *, seed: int = 0, epochs: int | None = 1, device: str | None = None) -> Any:
        """A fresh detector fitted to `images`, for one epoch unless told otherwise."""
        detector = self.make()
        detector.fit(images, seed=seed, epochs=epochs, device=device or self.device)
        return detector

    @functools.cached_property
    def train(self) -> np.ndarray:
        """Normal images; read-only, so that no check spoils them for the next."""
        images = normals(SUITE_BATCHES * self.batch, self.shape, seed=1)
        images.flags.writeable = False
        return images

    @functools.cached_property
    def test(self) -> np.ndarray:
        """Other images, six normal and five anomalous; read-only."""
        images = np.concatenate([normals(6, self.shape, seed=2), anomalies(5, self.shape, seed=3)])
        images.flags.writeable = False
        return images

    @functools.cached_property
    def fitted(self) -> Any:
        """A detector fitted to `train` with seed 0, shared by the checks that only score."""
        return self.fit(self.train.copy())

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """The scores of `test` that other scores are compared with."""
        return np.asarray(self.fitted.score(self.test.copy()))


Check: TypeAlias = Callable[[Subject], str]


def normals(n: int, chw: tuple[int, int, int], seed: int) -> np.ndarray:
    """Normal toy images: a bright smooth blob near the centre of a dark image, a little noisy; uint8 `(n, c, h, w)`."""
    channels, height, width = chw
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    cy, cx = rng.uniform(-0.15, 0.15, (2, n, 1, 1))
    spread = rng.uniform(0.15, 0.25, (n, 1, 1))
    blob = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / spread)  # (n, h, w)
    level = rng.uniform(150, 210, (n, 1, 1, 1)) * np.linspace(1, 0.8, channels).reshape(1, -1, 1, 1)
    images = 20 + level * blob[:, None] + rng.normal(0, 4, (n, channels, height, width))
    return images.round().clip(0, 255).astype(np.uint8)


def anomalies(n: int, chw: tuple[int, int, int], seed: int) -> np.ndarray:
    """Anomalous toy images: negatives of normal ones, which no method should take for normal."""
    return 255 - normals(n, chw, seed)


def as_float(images: np.ndarray) -> np.ndarray:
    """uint8 images as the equal float32 images in [-1, 1]."""
    return (images / 127.5 - 1).astype(np.float32)


def expect_equal(wanted: Any, got: Any, what: str, *, tolerance: float = 1e-4) -> None:
    """Fail unless two score vectors agree to `tolerance` of the spread of the first, or to float32 rounding."""
    a, b = np.asarray(wanted, dtype=np.float64), np.asarray(got, dtype=np.float64)
    if a.shape != b.shape:
        raise Failed(f"{what}: expected shape {a.shape}, got {b.shape}")
    allowed = tolerance * np.ptp(a) + 1e-5 * np.abs(a).max()
    gap = np.abs(a - b).max()
    if not gap <= allowed:  # also when it is NaN
        raise Failed(
            f"{what}: expected equal scores, got a difference of {gap:.3g} (scores span {a.min():.3g} to {a.max():.3g})"
        )


def expect_scores(scores: Any, n: int, what: str = "score") -> None:
    """Fail unless `scores` is a finite float64 vector `(n,)`."""
    kind = f"{getattr(scores, 'dtype', type(scores).__name__)} {getattr(scores, 'shape', '')}".strip()
    if not isinstance(scores, np.ndarray) or scores.shape != (n,) or scores.dtype != np.float64:
        raise Failed(f"{what}: expected a float64 array ({n},), got {kind}")
    if not np.isfinite(scores).all():
        raise Failed(f"{what}: expected finite scores, got {int((~np.isfinite(scores)).sum())} of {n} that are not")


def refusal(action: Callable[[], Any], what: str) -> str:
    """The text with which `action` is refused; fails unless that is a BenchError or ValueError of one line."""
    wanted = f"{what}: expected a BenchError or ValueError of one line"
    try:
        action()
    except (BenchError, ValueError) as error:
        text = str(error).strip()
        if not text or "\n" in text:
            raise Failed(f"{wanted}, got {len(text.splitlines())} lines: {text[:80]!r}") from error
        return text
    except Exception as error:
        raise Failed(f"{wanted}, got {type(error).__name__}: {str(error)[:120]}") from error
    raise Failed(f"{wanted}, but it was accepted")
