"""The measures that tables know, and how each is taken from stored scores, without training anything again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.errors import InvalidInput, check_known
from ganomaly_plugin.metrics import auprc, auroc, equal_error_rate, f1_at, fpr_at_tpr, threshold_at
from ganomaly_plugin.report.frame import runs_frame
from ganomaly_plugin.store import Store

DEFAULT_FPR = 0.05

#: (is_anomaly, score, scores of normal reference images, false-positive rate) → the measure.
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray, float], float]


@dataclass(frozen=True)
class Metric:
    """One measure of a job.

    Attributes:
        title: For captions; `{fpr}` stands for the false-positive rate that sets the threshold, `{reference}` for the images
            that it is set on, `{epoch}` for the epoch that the scores are of.
        higher_is_better: Its direction.
        measure: How it is taken from scores; None: only the record has it (maps and epochs are not stored).
    """

    title: str
    higher_is_better: bool = True
    measure: Measure | None = None


METRICS = {
    "auroc": Metric("AUROC, {epoch}", measure=lambda truth, score, _, __: auroc(truth, score)),
    "auprc": Metric("AUPRC, {epoch}", measure=lambda truth, score, _, __: auprc(truth, score)),
    "f1": Metric(
        "F1 at the threshold for a false-positive rate of {fpr:g} on {reference} normal images, {epoch}",
        measure=lambda truth, score, reference, fpr: f1_at(truth, score, threshold_at(reference, fpr)),
    ),
    "fpr95": Metric(
        "false-positive rate where 95 % of the anomalies are found (lower is better), {epoch}",
        higher_is_better=False,
        measure=lambda truth, score, _, __: fpr_at_tpr(truth, score),
    ),
    "eer": Metric(
        "equal error rate (lower is better), {epoch}",
        higher_is_better=False,
        measure=lambda truth, score, _, __: equal_error_rate(truth, score),
    ),
    "pixel_auroc": Metric("pixel AUROC of the anomaly maps, {epoch}"),
    "aupro": Metric("AUPRO (to a false-positive rate of 0.3) of the anomaly maps, {epoch}"),
    "auroc_oracle": Metric("AUROC, best test epoch (ORACLE: the epoch is chosen on the test set; not a result)"),
}


def from_scores(metrics: Iterable[str]) -> dict[str, Measure]:
    """How those of `metrics` are taken that scores suffice for."""
    return {name: take for name in metrics if (take := METRICS[name].measure) is not None}


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise InvalidInput for a metric that tables do not know, or for none."""
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        raise InvalidInput(f"metrics must be a list of names, got {metrics!r}. Known: {', '.join(METRICS)}.")
    if not metrics:
        raise InvalidInput(f"No metric is given. Give at least one of: {', '.join(METRICS)}.")
    for metric in metrics:
        check_known("metric", metric, METRICS)


def check_fpr(fpr: float) -> None:
    """Raise InvalidInput unless `fpr` lies between 0 and 1."""
    if not 0 < fpr < 1:
        raise InvalidInput(f"fpr must lie between 0 and 1, got {fpr}.")


def measured_frame(
    store: Store,
    records: Iterable[RunRecord],
    metrics: Sequence[str],
    fpr: float = DEFAULT_FPR,
    frame: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """`runs_frame` with those of `metrics` that a finished job's record lacks taken from its stored scores.

    Args:
        store: Where the scores are.
        records: The jobs.
        metrics: Names of METRICS; those that need more than scores are left as the records have them.
        fpr: Share of normal reference images above the threshold of "f1", in (0, 1).
        frame: `runs_frame` of `records`, where it has been made before; it stays as it is.

    Raises:
        InvalidInput: A metric is unknown, or `fpr` out of range.
        CorruptFile: Scores are missing or damaged.
    """
    check_metrics(metrics)
    check_fpr(fpr)
    records = list(records)
    frame = runs_frame(records) if frame is None else frame.copy()
    wanted = from_scores(metrics)
    if frame.empty or not wanted:
        return frame
    found: dict[str, dict[str, float]] = {}
    for record in records:
        lacking = {name: take for name, take in wanted.items() if name not in record.metrics}
        if record.status == "done" and lacking:
            found[record.job.key] = measure(store.scores(record.job), lacking, fpr)
    for name in wanted:
        new = pd.Series([found.get(key, {}).get(name, np.nan) for key in frame["key"]], index=frame.index)
        frame[name] = frame[name].astype(float).fillna(new) if name in frame else new
    return frame


def measure(arrays: Mapping[str, np.ndarray], measures: Mapping[str, Measure], fpr: float = DEFAULT_FPR) -> dict[str, float]:
    """Each of `measures` on a job's arrays, as `Store.scores` gives them."""
    truth, score, reference = arrays["is_anomaly"], arrays["score"], arrays["reference_score"]
    return {name: take(truth, score, reference, fpr) for name, take in measures.items()}
