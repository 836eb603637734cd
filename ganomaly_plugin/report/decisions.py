"""From scores to decisions: scikit-learn's classification report at a threshold chosen on normal images alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from sklearn.metrics import classification_report

from ganomaly_plugin.core import RunRecord, canonical_json
from ganomaly_plugin.escape import printable
from ganomaly_plugin.metrics import threshold_at
from ganomaly_plugin.report.frame import split_category
from ganomaly_plugin.report.tables import describe_data
from ganomaly_plugin.store import Store


def decision_reports(store: Store, records: Iterable[RunRecord], false_positive_rate: float, *, per_class: bool = False) -> str:
    """One report for each detector, data set and protocol, its jobs' decisions pooled; each job has its own threshold.

    Args:
        store: Where the scores are.
        records: The records to report on; failed ones are left out.
        false_positive_rate: Share of normal images that may be called anomalous, in (0, 1).
        per_class: A report for each class and seed instead.
    """
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        if record.status != "done":
            continue
        job = record.job
        data, category = split_category(job)
        where = describe_data(job.dataset, canonical_json(data), canonical_json(dict(job.sampling)))
        key: tuple[str, ...] = (job.detector_label, where, job.protocol)
        if per_class:
            key = (*key, f"class {category}", f"seed {job.seed}")
        groups.setdefault(key, []).append(record)
    return "\n".join(_report(store, key, group, false_positive_rate) for key, group in sorted(groups.items()))


def _report(store: Store, key: tuple[str, ...], group: list[RunRecord], false_positive_rate: float) -> str:
    truth, called, thresholds, sizes = [], [], [], []
    for record in group:
        arrays = store.scores(record.job)
        threshold = threshold_at(arrays["reference_score"], false_positive_rate)
        truth.append(arrays["is_anomaly"])
        called.append(arrays["score"] > threshold)
        thresholds.append(threshold)
        sizes.append(len(arrays["reference_score"]))
    is_anomaly, is_called = np.concatenate(truth), np.concatenate(called)
    origin = printable("/".join(sorted({str(record.reference) for record in group})))
    alarms, normal = int(is_called[~is_anomaly].sum()), int((~is_anomaly).sum())
    held = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    enough = math.ceil(1 / false_positive_rate - 1 - 1e-9)
    span = (
        f"{min(thresholds):.4g}"
        if len(group) == 1
        else f"{min(thresholds):.4g} to {max(thresholds):.4g}, one for each of {len(group)} jobs"
    )
    lines = [
        printable(", ".join(key)),
        f"threshold for a false-positive rate of {false_positive_rate:g} on {origin} normal images ({held}): {span}",
        f"false-positive rate on the test set: {alarms / normal:.3f} ({alarms} of {normal})",
    ]
    if min(sizes) < enough:
        lines.append(f"(fewer than {enough} reference images: the threshold is their largest score)")
    table = classification_report(
        is_anomaly, is_called, labels=[False, True], target_names=["normal", "anomalous"], digits=3, zero_division=0
    )
    return "\n".join(lines) + "\n" + table
