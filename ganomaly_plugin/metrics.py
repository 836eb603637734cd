"""Measures of a ranking, on whole raw score vectors; and the threshold that turns scores into decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from ganomaly_plugin.errors import InvalidInput

COMBINED = "combined"
ROUNDING = 1e-12  # of the largest of some numbers: by less they do not differ
SCORE_PREFIX, REFERENCE_PREFIX = "score.", "reference_score."  # of named scores among the arrays of a job


def check_scores(score: ArrayLike, n: int, detector: str) -> np.ndarray:
    """`score` as float64 `(n,)`.

    Raises:
        InvalidInput: It has another shape or type, or holds a value that is not finite; names the detector.
    """
    try:
        given = np.asarray(score)
        array = np.asarray(given.real, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{detector} returned scores of type {type(score).__name__}; wanted {n} numbers.") from error
    if given.dtype.kind == "c":
        raise InvalidInput(f"{detector} returned complex scores; wanted {n} real numbers.")
    if array.shape != (n,):
        raise InvalidInput(f"{detector} returned scores of shape {array.shape}; wanted ({n},), one number an image.")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise InvalidInput(
            f"{detector} returned {len(bad)} scores that are not finite, first {array[bad[0]]} for image {bad[0]}."
        )
    return array


def auroc(is_anomaly: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve in [0, 1]: the chance that an anomaly scores above a normal image, ties half."""
    from sklearn.metrics import roc_auc_score  # here and below: tables of records need none of it, and it takes a second

    return float(roc_auc_score(is_anomaly, score))


def auprc(is_anomaly: np.ndarray, score: np.ndarray) -> float:
    """Average precision in [0, 1], anomalies positive; chance is their share of the test set."""
    from sklearn.metrics import average_precision_score

    return min(1.0, float(average_precision_score(is_anomaly, score)))  # the sum may round to 1 + 2e-16


RANKING_METRICS = {"auroc": auroc, "auprc": auprc}


def threshold_at(reference: np.ndarray, false_positive_rate: float) -> float:
    """The threshold above which an image is called anomalous, from scores of normal images alone.

    The split-conformal quantile: of exchangeable normal images at most `false_positive_rate` score above it on
    average, provided there are at least 1/rate - 1 reference scores; with fewer it is the largest of them.

    Args:
        reference: Scores of normal images `(m,)`.
        false_positive_rate: In (0, 1).
    """
    if not 0 < false_positive_rate < 1:
        raise InvalidInput(f"The false-positive rate must lie between 0 and 1, got {false_positive_rate}.")
    if len(reference) == 0:
        raise InvalidInput("A threshold needs scores of normal images, and there are none.")
    rank = math.ceil((len(reference) + 1) * (1 - false_positive_rate) - 1e-9)
    return float(np.sort(reference)[min(rank, len(reference)) - 1])


def f1_at(is_anomaly: np.ndarray, score: np.ndarray, threshold: float) -> float:
    """F1 in [0, 1], anomalies positive, when scores above `threshold` are called anomalous; 0 when none is found."""
    called = score > threshold
    hits = int((called & is_anomaly).sum())
    return 2 * hits / (int(called.sum()) + int(is_anomaly.sum())) if hits else 0.0


def fpr_at_tpr(is_anomaly: np.ndarray, score: np.ndarray, true_positive_rate: float = 0.95) -> float:
    """The smallest false-positive rate in [0, 1] at which at least `true_positive_rate` of the anomalies are found."""
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(is_anomaly, score, drop_intermediate=False)
    return float(false_positive[np.flatnonzero(true_positive >= true_positive_rate - 1e-12)[0]])


def equal_error_rate(is_anomaly: np.ndarray, score: np.ndarray) -> float:
    """The error rate in [0, 1] where as large a share of normal images is called anomalous as of anomalies is missed.

    Between two thresholds the ROC curve is taken as straight.
    """
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(is_anomaly, score, drop_intermediate=False)
    gap = false_positive - (1 - true_positive)  # rises from -1 to 1
    k = int(np.flatnonzero(gap >= 0)[0])
    if gap[k] == 0:
        return float(false_positive[k])
    share = gap[k - 1] / (gap[k - 1] - gap[k])
    return float(false_positive[k - 1] + share * (false_positive[k] - false_positive[k - 1]))


def scale_of(values: np.ndarray, spread: float) -> float:
    """The `spread` of `values`; 1 where it is no more than rounding, which is nothing to scale others with."""
    return float(spread) if spread > ROUNDING * np.abs(values).max() else 1.0


def named_arrays(test: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a job stores of its named scores: those of the test and reference images, and all of them combined.

    "combined" is the mean of the scores, each standardised with the mean and deviation it has on the reference images.
    """
    if not test:
        return {}
    if COMBINED not in test:
        scales = {name: (values.mean(), scale_of(values, values.std())) for name, values in reference.items()}
        test, reference = (
            {**scores, COMBINED: np.mean([(scores[k] - mean) / spread for k, (mean, spread) in scales.items()], axis=0)}
            for scores in (test, reference)
        )
    return {SCORE_PREFIX + k: v for k, v in test.items()} | {REFERENCE_PREFIX + k: v for k, v in reference.items()}
