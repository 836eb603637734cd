"""Whether a stored record is what was written: its checksum, the sense of each field, and what its scores say.

A checksum finds damage and slips, not forgery: whoever alters a record on purpose can make a new one. Records of format 1
have none; their metrics are compared with those that their stored scores give.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ganomaly_plugin.core import Job, RunRecord, canonical_json
from ganomaly_plugin.errors import InvalidInput, one_line
from ganomaly_plugin.metrics import RANKING_METRICS
from ganomaly_plugin.selection import parse_selection, show

FORMATS = (1, 2)  # of records; this version writes the last
CHECKSUM = "checksum"
TOLERANCE = 1e-9  # between a metric and the same metric from stored scores
_SHARES = ("auroc", "auprc", "auroc_oracle", "pixel_auroc", "aupro")  # metrics in [0, 1]
_TEXT, _WHOLE, _MAP = (str,), (int,), (dict,)
_JOB: Mapping[str, tuple[type, ...]] = {
    "detector": _TEXT,
    "hparams": _MAP,
    "dataset": _TEXT,
    "data": _MAP,
    "protocol": _TEXT,
    "category": _TEXT,
    "seed": _WHOLE,
    "epochs": (int, type(None)),
    "sampling": _MAP,
    "steps": (int, type(None)),
    "label": _TEXT,
}
_RECORD: Mapping[str, tuple[type, ...]] = {
    "status": _TEXT,
    "error": (str, type(None)),
    "traceback": (str, type(None)),
    "metrics": _MAP,
    "counts": _MAP,
    "seconds": _MAP,
    "split_digest": (str, type(None)),
    "reference": (str, type(None)),
    "notes": _MAP,
    "environment": _MAP,
    "history": (list,),
    "files": _MAP,
}


def file_digest(content: bytes) -> str:
    """sha256 of a file's bytes, as records hold it."""
    return hashlib.sha256(content).hexdigest()


def sealed(content: Mapping[str, Any]) -> bytes:
    """A record's dict as the text of its file, with a checksum of all that the text says.

    Raises:
        ValueError: It holds a number that is not finite.
        TypeError: It holds something that JSON has no form for.
    """
    plain = json.loads(json.dumps(content, allow_nan=False))  # as a reader will see it: tuples are lists, keys are text
    return json.dumps({**plain, CHECKSUM: _checksum(plain)}, indent=1).encode() + b"\n"


def check_storable(record: RunRecord) -> None:
    """Raise InvalidInput when `record` holds what JSON has no form for, as a detector's own facts may, or no reader takes."""
    try:
        content = record.to_dict()
        text = sealed(content)
        json.dumps(content, ensure_ascii=False).encode()  # as tables are written
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"describe() or history_ holds what a record cannot: {error}. Return plain finite numbers, text, lists and dicts."
        ) from error
    try:
        unsealed(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"The job's record would not be readable: {one_line(error)}.") from error


def _checksum(content: Mapping[str, Any]) -> str:
    """Of the values, not of the bytes: a file that was indented anew, or has other line ends, says the same."""
    return hashlib.sha256(canonical_json({k: v for k, v in content.items() if k != CHECKSUM}).encode()).hexdigest()


def unsealed(content: Any) -> RunRecord:
    """The record that a file's JSON holds.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: It is none, or not what was written; says why.
    """
    if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] not in FORMATS:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"format {found!r}, this version reads {' and '.join(map(str, FORMATS))}")
    if content["format"] > 1 and content.get(CHECKSUM) != _checksum(content):
        raise ValueError("its content does not match its checksum: it was edited or damaged")
    if content["format"] == 1 and {CHECKSUM, "files"} & set(content):
        raise ValueError("it has a checksum, and format 1 has none: it was edited")
    fields = {name: value for name, value in content.items() if name not in ("format", "key", CHECKSUM)}
    _check_types(fields["job"], _JOB)
    _check_types({name: value for name, value in fields.items() if name != "job"}, _RECORD)
    record = RunRecord(**{**fields, "job": Job.from_dict(fields["job"])})
    if content.get("key") != record.job.key:
        raise ValueError(f"its job does not match its key {content.get('key')!r}: it was edited")
    _check_values(record)
    return record


def _check_types(fields: Mapping[str, Any], allowed: Mapping[str, tuple[type, ...]]) -> None:
    for name, value in fields.items():
        if type(value) not in allowed.get(name, ()):  # of JSON: exact types, and bool is no int
            raise ValueError(f"{name} is a {type(value).__name__}" if name in allowed else f"unknown field {name!r}")


def _check_values(record: RunRecord) -> None:
    if record.status not in ("done", "failed"):
        raise ValueError(f"status {record.status!r}")
    for name, value in record.metrics.items():
        if not re.fullmatch(r"[a-z]\w*", name) or not _is_number(value):
            raise ValueError(f"metric {name!r} is not a finite number")
        if name in _SHARES and not 0 <= value <= 1:
            raise ValueError(f"metric {name!r} is not a number in [0, 1]")
    if record.status == "done" and not {"auroc", "auprc"} <= set(record.metrics):
        raise ValueError("it has no auroc or no auprc")
    for group in (record.counts, record.seconds):
        for name, value in group.items():
            if not _is_number(value) or value < 0:
                raise ValueError(f"{name} is not a number of at least 0")
    if not 0 <= record.job.seed < 2**63:
        raise ValueError(f"seed {record.job.seed}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def check_against_scores(record: RunRecord, arrays: Mapping[str, np.ndarray]) -> None:
    """Hold a done record's metrics, counts and label to its stored scores and to its own job.

    Raises:
        ValueError: They differ; says in what.
        KeyError: A kind of scores is missing.
    """
    truth, score, reference = arrays["is_anomaly"], arrays["score"], arrays["reference_score"]
    if truth.dtype != bool or truth.ndim != 1 or truth.shape != score.shape or not 0 < truth.sum() < len(truth):
        raise ValueError("its scores are not one for each normal and anomalous test image")
    if not (np.isfinite(score).all() and np.isfinite(reference).all()):
        raise ValueError("its scores are not finite")
    for name, measure in RANKING_METRICS.items():
        wanted = measure(truth, score)
        if abs(wanted - record.metrics[name]) > TOLERANCE:
            raise ValueError(f"its {name} is {record.metrics[name]:.6g}, its scores give {wanted:.6g}")
    wanted_counts = {"test_anomalous": int(truth.sum()), "test_normal": int((~truth).sum()), "reference": len(reference)}
    for name, count in wanted_counts.items():
        if record.counts.get(name, count) != count:
            raise ValueError(f"it counts {record.counts[name]} {name} images, its scores {count}")
    curve = [epoch["oracle_auroc"] for epoch in record.history if "oracle_auroc" in epoch]
    if curve and record.metrics.get("auroc_oracle") != max(curve):
        raise ValueError("its auroc_oracle is not the best of its epochs")
    _check_label(record.job)


def _check_label(job: Job) -> None:
    """A label, which is not part of the key, says nothing else than the job does."""
    if not job.label:
        return
    said = parse_selection(job.label, "model")
    known = {**job.hparams, "epochs": job.epochs, "steps": job.steps}
    for name, value in said.options.items():
        its = known.get(name)
        if its != value and str(its) != str(value) and show("", {name: its}) != show("", {name: value}):  # -1 is -1.0 there
            raise ValueError(f"its label says {name}={value}, its job {its}")
    if said.name != job.detector:
        raise ValueError(f"its label names {said.name!r}, its job {job.detector!r}")
