"""Statistics that hold for small n: bootstrap intervals, Wilcoxon with Holm, Friedman with Nemenyi. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ganomaly_plugin.errors import InvalidInput

CONFIDENCE = 0.95
SEEDS_FOR_BOOTSTRAP = 8  # with fewer, resampled seeds repeat so much that the interval is far too narrow
PAIRS_FOR_WILCOXON = 6  # with 5 pairs the smallest two-sided p is 2 / 2^5 = 0.0625
BLOCKS_FOR_FRIEDMAN = 6  # data sets
HELD = 200_000  # drawn images held in memory at once


@dataclass(frozen=True)
class Interval:
    """A two-sided interval, how it was made, and from how many values."""

    low: float
    high: float
    method: str
    n: int


def bootstrap_aurocs(is_anomaly: np.ndarray, score: np.ndarray, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """AUROCs `(replicates,)` of test sets drawn with replacement, normal and anomalous images apart (stratified).

    Args:
        is_anomaly: bool `(n,)`, with both kinds.
        score: `(n,)`.
        replicates: How many.
        rng: Source of the draws.
    """
    n_anomalous, n_normal = int(is_anomaly.sum()), int((~is_anomaly).sum())
    if not n_anomalous or not n_normal:
        raise InvalidInput("AUROC needs normal and anomalous images, and one kind is missing.")
    values, place = np.unique(score, return_inverse=True)  # tied scores share a place
    normal, anomalous = place[~is_anomaly], place[is_anomaly]  # in the images' own order: equal draws are of equal images
    found = []
    step = max(1, HELD // len(score))
    for first in range(0, replicates, step):
        row = np.arange(min(step, replicates - first))[:, None]
        of_normal = normal[rng.integers(n_normal, size=(len(row), n_normal))]
        of_anomalous = anomalous[rng.integers(n_anomalous, size=(len(row), n_anomalous))]
        drawn = np.bincount((of_normal + row * len(values)).ravel(), minlength=len(row) * len(values)).reshape(len(row), -1)
        below = np.cumsum(drawn, axis=1) - drawn / 2  # normals below a score, ties half
        found.append(np.take_along_axis(below, of_anomalous, axis=1).mean(axis=1) / n_normal)
    return np.concatenate(found)


def image_interval(
    jobs: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], *, replicates: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval of a mean AUROC over test images, for the seeds and classes at hand.

    All seeds of a class are resampled with the same draws, image by image in the given order, for they are scored on the
    same images (under the paper's protocol: the same anomalies). Classes are resampled independently.

    Args:
        jobs: For each class a list of (is_anomaly, score), one a seed.
        replicates: Bootstrap samples.
        seed: Of the draws.
    """
    classes = []
    for k, runs in enumerate(jobs):
        drawn = [bootstrap_aurocs(truth, score, replicates, np.random.default_rng([seed, k])) for truth, score in runs]
        classes.append(np.mean(drawn, axis=0))
    means = np.mean(classes, axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(low), float(high), "bootstrap over test images, stratified", sum(map(len, jobs)))


def seed_interval(values: Sequence[float], *, replicates: int = 10_000, seed: int = 0) -> Interval | None:
    """Interval of the mean over seeds: bootstrap percentiles from 8 seeds on, Student's t below, None for one seed."""
    given = np.asarray(values, dtype=float)
    n = len(given)
    if n < 2:
        return None
    tail = (1 - CONFIDENCE) / 2
    if n < SEEDS_FOR_BOOTSTRAP:
        half = float(stats.t.ppf(1 - tail, n - 1) * given.std(ddof=1) / math.sqrt(n))
        return Interval(float(given.mean()) - half, float(given.mean()) + half, "Student's t over seeds", n)
    drawn = np.random.default_rng(seed).choice(given, (replicates, n)).mean(1)
    low, high = np.percentile(drawn, [100 * tail, 100 - 100 * tail])
    return Interval(float(low), float(high), "bootstrap over seeds", n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Scandinavian Journal of Statistics 6, 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for step, k in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[k]))
        adjusted[k] = largest
    return [float(value) for value in adjusted]


@dataclass(frozen=True)
class Pair:
    """One paired comparison: wins of `a` and of `b` over the pairs, the mean difference a - b, p raw and after Holm."""

    a: str
    b: str
    wins_a: int
    wins_b: int
    difference: float
    p: float
    p_holm: float


def wilcoxon_pairs(values: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Wilcoxon's signed-rank test of each pair over classes, Holm-corrected over `pairs`, the smallest p first.

    Args:
        values: For each detector one value a class, seeds averaged: seeds of one class are no independent pairs.
        pairs: Which detectors to compare.

    Raises:
        InvalidInput: There are fewer than 6 classes, which no test could call different.
    """
    n = min((len(each) for each in values.values()), default=0)
    if n < PAIRS_FOR_WILCOXON:
        raise InvalidInput(
            f"Wilcoxon needs at least {PAIRS_FOR_WILCOXON} classes, got {n}: "
            f"the smallest p that {n} can give is {2 / 2**n:.3g}, whatever the results."
        )
    raw = []
    for a, b in pairs:
        difference = np.asarray(values[a], dtype=float) - np.asarray(values[b], dtype=float)
        p = 1.0 if not difference.any() else float(stats.wilcoxon(difference).pvalue)
        raw.append((a, b, int((difference > 0).sum()), int((difference < 0).sum()), float(difference.mean()), p))
    corrected = holm([each[-1] for each in raw])
    return sorted((Pair(*each, p) for each, p in zip(raw, corrected, strict=True)), key=lambda pair: (pair.p, pair.a, pair.b))


@dataclass(frozen=True)
class Friedman:
    """Friedman's test with Iman and Davenport's F, and Nemenyi's critical difference (Demšar, JMLR 7, 2006).

    Attributes:
        ranks: Average rank of each detector over the blocks, 1 for the best.
        chi2: Friedman's statistic, corrected for ties.
        f: Iman and Davenport's F.
        p: Of F.
        critical_difference: Average ranks at least this far apart differ at 0.05.
        p_pairs: Nemenyi's p, `(k, k)`.
        n: Number of blocks.
    """

    ranks: dict[str, float]
    chi2: float
    f: float
    p: float
    critical_difference: float
    p_pairs: np.ndarray
    n: int


def friedman(names: Sequence[str], values: np.ndarray, *, higher_is_better: bool = True, ties: bool = True) -> Friedman:
    """Whether `k` detectors differ over `n` independent data sets.

    Args:
        names: The detectors.
        values: `(n, k)`.
        higher_is_better: Direction of the values.
        ties: Correct Friedman's statistic for ties, as SciPy does; Demšar's worked example does not.

    Raises:
        InvalidInput: There are fewer than 3 detectors or fewer than 6 data sets.
    """
    n, k = values.shape
    if k < 3 or n < BLOCKS_FOR_FRIEDMAN:
        raise InvalidInput(
            f"Friedman's test needs at least 3 detectors on {BLOCKS_FOR_FRIEDMAN} data sets, got {k} on {n}. "
            "Classes of one data set share their training images and do not count as data sets."
        )
    ranks = stats.rankdata(-values if higher_is_better else values, axis=1)
    mean = ranks.mean(0)
    chi2 = 12 * n / (k * (k + 1)) * float((mean**2).sum() - k * (k + 1) ** 2 / 4)
    if ties:
        counts = [np.unique(row, return_counts=True)[1] for row in ranks]
        lost = sum(int((count**3 - count).sum()) for count in counts)
        chi2 /= max(1 - lost / (n * (k**3 - k)), 1e-12)
    left = n * (k - 1) - chi2
    f = (n - 1) * chi2 / left if left > 1e-9 else math.inf
    step = math.sqrt(k * (k + 1) / (6 * n))
    q = float(stats.studentized_range.ppf(1 - 0.05, k, np.inf)) / math.sqrt(2)
    gaps = np.abs(mean[:, None] - mean[None, :]) / step
    p_pairs = np.asarray(stats.studentized_range.sf(gaps * math.sqrt(2), k, np.inf))
    np.fill_diagonal(p_pairs, 1.0)
    p = float(stats.f.sf(f, k - 1, (k - 1) * (n - 1)))
    average = {name: float(rank) for name, rank in zip(names, mean, strict=True)}
    return Friedman(average, chi2, f, p, q * step, p_pairs, n)
