"""Checks of what a detector computes: its scores, seeds, files and maps. A docstring's first line is what is asked."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ganomaly_plugin.conformance.subject import (
    Check,
    Exempt,
    Failed,
    Subject,
    anomalies,
    expect_equal,
    expect_scores,
    normals,
    refusal,
)
from ganomaly_plugin.core import canonical_json
from ganomaly_plugin.detectors.base import resolve_device
from ganomaly_plugin.hparams import check_recordable, check_told
from ganomaly_plugin.metrics import auroc, check_scores
from ganomaly_plugin.registry import entries, load_detector, make_detector
from ganomaly_plugin.seeding import global_states, seed_all

FLOOR = 0.7  # AUROC on the toy problem; chance is 0.5


def hparams_round_trip(subject: Subject) -> str:
    """The constructor only stores: `hparams` are plain values that make the same detector again."""
    hparams = subject.hparams
    if getattr(subject.make(), "hparams", None) is None:
        raise Exempt("it has no hparams")
    check_recordable(subject.name, hparams)
    check_told(subject.name, subject.cls, subject.given, hparams)
    again = subject.told(make_detector(subject.name, **hparams))
    if canonical_json(again) != canonical_json(hparams):
        raise Failed(f"expected {hparams} from a detector made with them, got {again}")
    return f"{len(hparams)} hyperparameters"


def fit_returns_self(subject: Subject) -> str:
    """`fit` returns the detector itself."""
    detector = subject.make()
    returned = detector.fit(subject.train.copy(), seed=0, epochs=1, device=subject.device)
    if returned is not detector:
        raise Failed(f"expected fit to return the detector, got {type(returned).__name__}")
    return "it does"


def scores(subject: Subject) -> str:
    """Scores are a finite float64 array, one an image."""
    n = len(subject.test)
    expect_scores(subject.fitted.score(subject.test.copy()), n)
    expect_scores(subject.fitted.score(subject.test[:1].copy()), 1, "score of one image")
    return f"float64 ({n},), finite"


def score_repeats(subject: Subject) -> str:
    """Scoring does not change the detector: the same images score the same again."""
    expect_equal(subject.scores, subject.fitted.score(subject.test.copy()), "the same images scored again")
    return "equal"


def score_ignores_batch(subject: Subject) -> str:
    """A score does not depend on the other images scored with it, on their number or on their order."""
    if subject.hparams.get("batchnorm") == "batch":
        raise Exempt("it declares batch statistics (batchnorm='batch'): scores depend on the batch")
    reference, images = subject.scores, subject.test.copy()
    expect_equal(reference[::-1], subject.fitted.score(images[::-1].copy()), "images in reverse order")
    expect_equal(reference[:6], subject.fitted.score(images[:6]), "the normal images without the others")
    single = np.concatenate([subject.fitted.score(images[k : k + 1]) for k in range(len(images))])
    expect_equal(reference, single, "images one at a time")
    expect_equal(reference, subject.fitted.score(np.tile(images, (25, 1, 1, 1)))[-len(images) :], "images in a large batch")
    return "reversed, in part, one at a time and in a batch of 275: equal"


def seed_repeats(subject: Subject) -> str:
    """The same seed gives the same scores on the CPU."""
    if resolve_device(subject.device).type != "cpu":
        raise Exempt("equal scores are promised on the CPU only")
    again = subject.fit(subject.train.copy()).score(subject.test.copy())
    expect_equal(subject.scores, again, "the same seed again", tolerance=1e-6)
    return "equal"


def seed_matters(subject: Subject) -> str:
    """Another seed gives other scores."""
    if np.array_equal(subject.scores, subject.fit(subject.train.copy(), seed=1).score(subject.test.copy())):
        raise Failed("expected other scores with seed 1 than with seed 0, got the same; a deterministic method declares it")
    return "different"


def ignores_global_rng(subject: Subject) -> str:
    """The state of the global random generators (torch, NumPy, random) does not change the result."""
    results = []
    for state in (101, 202):
        seed_all(state)
        results.append(subject.fit(subject.train.copy()).score(subject.test.copy()))
    expect_equal(results[0], results[1], "another global random state", tolerance=1e-6)
    return "equal"


def keeps_global_rng(subject: Subject) -> str:
    """Making, fitting and scoring leave the global random generators of the caller as they were."""
    seed_all(303)
    before = global_states()
    subject.fit(subject.train.copy()).score(subject.test.copy())
    after = global_states()
    moved = [name for name in before if before[name] != after[name]]
    if moved:
        raise Failed(f"expected the global random states untouched, got others for {', '.join(moved)}")
    return "torch, numpy, random untouched"


def refit_forgets(subject: Subject) -> str:
    """Fitting again starts anew: nothing of an earlier fit is left."""
    detector = subject.fit(anomalies(3 * subject.batch, subject.shape, seed=4), seed=5)
    detector.fit(subject.train.copy(), seed=0, epochs=1, device=subject.device)
    expect_equal(subject.scores, detector.score(subject.test.copy()), "a detector fitted before", tolerance=1e-6)
    return "equal to a fresh detector"


def on_epoch(subject: Subject) -> str:
    """`on_epoch(epoch, detector)` is called after every epoch, counted from 1, when the detector can score."""
    if not subject.has_epochs:
        raise Exempt("it has no epochs")
    detector, calls, last = subject.make(), [], None

    def note(epoch: int, current: Any) -> None:
        nonlocal last
        calls.append(epoch)
        last = current.score(subject.test.copy())

    detector.fit(subject.train.copy(), seed=0, epochs=2, device=subject.device, on_epoch=note)
    if not calls and not hasattr(detector, "has_epochs"):
        raise Exempt("it does not say has_epochs, and calls nothing")
    if len(calls) < 2 or calls != list(range(1, len(calls) + 1)):
        raise Failed(f"expected calls for epochs 1, 2 (and on, for further stages), got {calls}")
    expect_equal(last, detector.score(subject.test.copy()), "scores after the last epoch and after fit")
    return f"called for epochs 1 to {len(calls)}"


def save_load(subject: Subject) -> str:
    """A saved detector, read without unpickling code, scores as before."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.pt"
        subject.fitted.save(str(path))
        found = sorted(p.name for p in path.parent.iterdir())
        if found != [path.name]:
            raise Failed(f"expected save(path) to write the one file {path.name}, got {found}")
        if not hasattr(subject.fitted, "_load_state"):
            raise Exempt("load_detector needs _load_state(state, device), which it lacks; BaseDetector has the rest")
        registered = subject.name in entries("detector")
        loaded: Any = load_detector(path, device=subject.device, name=None if registered else subject.name)
    expect_equal(subject.scores, loaded.score(subject.test.copy()), "loaded from its file", tolerance=1e-6)
    if canonical_json(subject.told(loaded)) != canonical_json(subject.hparams):
        raise Failed(f"expected the hparams {subject.hparams} after loading, got {loaded.hparams}")
    return "equal"


def anomaly_map(subject: Subject) -> str:
    """An anomaly map is a finite float array `(n, h, w)`; without one there is a clear error."""
    detector, images = subject.fitted, subject.test.copy()
    if not getattr(detector, "has_anomaly_map", hasattr(detector, "anomaly_map")):
        if not hasattr(detector, "anomaly_map"):
            raise Exempt("it has no anomaly_map")
        return "none, and says so: " + refusal(lambda: detector.anomaly_map(images), "anomaly_map")
    maps = detector.anomaly_map(images)
    shape = (len(images), *subject.shape[1:])
    if not isinstance(maps, np.ndarray) or maps.shape != shape or maps.dtype.kind != "f":
        raise Failed(f"expected a float array {shape}, got {getattr(maps, 'dtype', '')} {getattr(maps, 'shape', type(maps))}")
    if not np.isfinite(maps).all():
        raise Failed("expected a finite map, got values that are not")
    return f"{maps.dtype} {shape}, finite"


def beats_chance(subject: Subject) -> str:
    """On bright blobs against their negatives the AUROC is at least 0.7."""
    detector = subject.fit(normals(64, subject.shape, seed=6), epochs=subject.epochs)
    is_anomaly = np.arange(60) % 2 == 1  # interleaved, so that batch statistics see both kinds
    images = np.empty((60, *subject.shape), np.uint8)
    images[~is_anomaly], images[is_anomaly] = normals(30, subject.shape, seed=7), anomalies(30, subject.shape, seed=8)
    value = auroc(is_anomaly, check_scores(detector.score(images), len(images), subject.name))
    if not value >= FLOOR:
        budget = f" after {subject.epochs or 'its default'} epochs (conformance_epochs)" if subject.has_epochs else ""
        raise Failed(f"expected an AUROC of at least {FLOOR} on the toy problem, got {value:.3f}{budget}")
    return f"AUROC {value:.3f}"


def cuda(subject: Subject) -> str:
    """It fits and scores on CUDA, and a detector saved there scores on the CPU."""
    if not torch.cuda.is_available():
        raise Exempt("no CUDA device here")
    detector = subject.fit(subject.train.copy(), device="cuda")
    expect_scores(detector.score(subject.test.copy()), len(subject.test), "score on CUDA")
    if not hasattr(detector, "_load_state"):
        return "fits and scores; not saved, for it lacks _load_state"
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "detector.pt")
        detector.save(path)
        loaded: Any = load_detector(path, device="cpu", name=subject.name)
    # Loose: convolutions on CUDA may round to TF32.
    expect_equal(detector.score(subject.test.copy()), loaded.score(subject.test.copy()), "loaded on the CPU", tolerance=0.02)
    return "fits, scores, and loads on the CPU"


_ALL: tuple[Check, ...] = (
    hparams_round_trip,
    fit_returns_self,
    scores,
    score_repeats,
    score_ignores_batch,
    seed_repeats,
    seed_matters,
    ignores_global_rng,
    keeps_global_rng,
    refit_forgets,
    on_epoch,
    save_load,
    anomaly_map,
    beats_chance,
    cuda,
)
CHECKS: Mapping[str, Check] = {getattr(check, "__name__", ""): check for check in _ALL}
