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
DIGITS = 12  # of measures that are ranked: what differs by less is level, and differs by the rounding of a mean alone
HELD = 200_000  # drawn images held in memory at once


@dataclass(frozen=True)
class Interval:
    """A two-sided interval, how it was made, and from how many values."""

    low: float
    high: float
    method: str
    n: int


@dataclass(frozen=True)
class JobScores:
    """The test images of one job, and what it made of them: arrays `(n,)`."""

    image: np.ndarray  # whole numbers, each image its own
    is_anomaly: np.ndarray  # bool, with both kinds
    score: np.ndarray
    source: str = ""  # where the numbers are of: images of two sources are never the same


def weighted_aurocs(is_anomaly: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROCs `(r,)` of test sets in which image i occurs `weights[i]` times, `(n, r)`; NaN where a kind is missing."""
    normal = np.flatnonzero(~is_anomaly)
    normal = normal[np.argsort(score[normal], kind="stable")]
    below = np.zeros((len(normal) + 1, weights.shape[1]), weights.dtype)  # row k: as often as the k lowest normals occur
    np.cumsum(weights[normal], axis=0, out=below[1:])
    anomalous = weights[is_anomaly]
    low, high = (np.searchsorted(score[normal], score[is_anomaly], side=side) for side in ("left", "right"))
    won = (anomalous * (below[low] + below[high])).sum(0, dtype=float) / 2  # ties half
    with np.errstate(invalid="ignore"):
        return won / (below[-1] * anomalous.sum(0, dtype=float))


def image_interval(jobs: Sequence[Sequence[JobScores]], *, replicates: int = 2000, seed: int = 0) -> Interval:
    """Percentile interval of a mean AUROC over test images, for the seeds and classes at hand.

    An image is drawn as often for one job as for any other that it is tested in: the classes of a data set share test images,
    and an image that is hard is so for all of them. Images that are anomalous for the same classes are a stratum, which keeps
    its size; where each class is the anomaly once, these are the classes.

    Args:
        jobs: For each class its jobs, one a seed.
        replicates: Bootstrap samples.
        seed: Of the draws.
    """
    every = [(k, job) for k, runs in enumerate(jobs) for job in runs]
    if not all(0 < job.is_anomaly.sum() < len(job.is_anomaly) for _, job in every):
        raise InvalidInput("AUROC needs normal and anomalous images, and one kind is missing.")
    aurocs = np.empty((len(every), replicates))
    for number, source in enumerate(sorted({job.source for _, job in every})):
        mine = [(at, k, job) for at, (k, job) in enumerate(every) if job.source == source]
        images = np.unique(np.concatenate([job.image for _, _, job in mine]))
        places = [np.searchsorted(images, job.image) for _, _, job in mine]
        anomalous = np.zeros((len(jobs), len(images)), dtype=bool)
        for (_, k, job), place in zip(mine, places, strict=True):
            anomalous[k, place] |= job.is_anomaly
        stratum = np.unique(anomalous, axis=1, return_inverse=True)[1].ravel()
        rng = np.random.default_rng([seed, number])
        step = max(1, HELD // len(images))
        for first in range(0, replicates, step):
            count = min(step, replicates - first)
            weights = np.zeros((len(images), count), np.float32)  # whole numbers, and exact
            for part in range(stratum.max() + 1):
                members = np.flatnonzero(stratum == part)
                weights[members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), count).T
            for (at, _, job), place in zip(mine, places, strict=True):
                aurocs[at, first : first + count] = weighted_aurocs(job.is_anomaly, job.score, weights[place])
    class_of = np.array([k for k, _ in every])
    means = np.mean([aurocs[class_of == k].mean(0) for k in range(len(jobs))], axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(means, [tail, 100 - tail])
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


def wilcoxon_pairs(
    values: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]], *, higher_is_better: bool = True
) -> list[Pair]:
    """Wilcoxon's signed-rank test of each pair over classes, Holm-corrected over `pairs`, the smallest p first.

    Args:
        values: For each detector one value a class, seeds averaged: seeds of one class are no independent pairs.
        pairs: Which detectors to compare.
        higher_is_better: Direction of the values: which of two wins. The differences are those of the values.

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
        difference = np.round(np.asarray(values[a], dtype=float) - np.asarray(values[b], dtype=float), DIGITS)
        unequal = difference[difference != 0]  # left out here, so that SciPy has no cause to leave the exact distribution
        p = float(stats.wilcoxon(unequal).pvalue) if len(unequal) else 1.0
        gain = difference if higher_is_better else -difference
        raw.append((a, b, int((gain > 0).sum()), int((gain < 0).sum()), float(difference.mean()), p))
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
        left_out: Detectors that lack a result on some block, and are not ranked.
    """

    ranks: dict[str, float]
    chi2: float
    f: float
    p: float
    critical_difference: float
    p_pairs: np.ndarray
    n: int
    left_out: tuple[str, ...] = ()


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
    ranks = stats.rankdata(np.round(-values if higher_is_better else values, DIGITS), axis=1)
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
