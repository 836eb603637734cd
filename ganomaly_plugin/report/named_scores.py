"""Several scores of one trained model, side by side: taken from what its job stored, without training anything again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.errors import InvalidInput, unknown
from ganomaly_plugin.metrics import COMBINED, REFERENCE_PREFIX, SCORE_PREFIX
from ganomaly_plugin.report.measures import DEFAULT_FPR, from_scores, measure
from ganomaly_plugin.selection import Selection, parse_label, show
from ganomaly_plugin.store import Store

ALL = "all"


def by_score(
    store: Store, records: Iterable[RunRecord], names: Sequence[str], metrics: Sequence[str], fpr: float = DEFAULT_FPR
) -> tuple[list[RunRecord], list[str]]:
    """`records` with one row for each of the scores `names` ("all": every stored one), and remarks on them.

    A job that stored no named scores stays as it is, and so does a failed one. Measures are taken from stored scores.

    Raises:
        InvalidInput: No job has a score of that name.
    """
    found: list[RunRecord] = []
    known: set[str] = set()
    on_training = False
    for record in records:
        arrays = store.scores(record.job) if record.status == "done" else {}
        stored = [name.removeprefix(SCORE_PREFIX) for name in arrays if name.startswith(SCORE_PREFIX)]
        known |= set(stored)
        if not stored:
            found.append(record)
        for name in stored:
            if name in names or ALL in names:
                found.append(_with_score(record, name, arrays, metrics, fpr))
                on_training |= name == COMBINED and record.reference == "train"
    for name in names:
        if name != ALL and name not in known:
            if not known:
                raise InvalidInput(f"No job of {store.folder} has named scores. Run a method that has some, such as ganomaly.")
            raise unknown("score", name, [*sorted(known), ALL])
    note = "combined: standardised on training images where the protocol holds no normal images out (paper-v1)"
    return found, [note] if on_training else []


def _with_score(
    record: RunRecord, name: str, arrays: Mapping[str, np.ndarray], metrics: Sequence[str], fpr: float
) -> RunRecord:
    chosen = {**arrays, "score": arrays[SCORE_PREFIX + name], "reference_score": arrays[REFERENCE_PREFIX + name]}
    measured = measure(chosen, from_scores({"auroc", "auprc", *metrics}), fpr)
    own = record.job.detector_label
    label = parse_label(own)
    if "score_by" in label.options:  # another model than the one without, which may have been trained on more images
        label = Selection(own)
    job = replace(record.job, label=show(label.name, {**label.options, "score_by": name}))
    return replace(record, job=job, metrics=measured)
