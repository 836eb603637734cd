"""Records as one flat pandas row each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from ganomaly_plugin.core import Job, RunRecord, canonical_json
from ganomaly_plugin.errors import InvalidInput

ANOMALY = "anomaly"  # the class that all defects of a category share
MEAN = "mean"  # the column of tables beside those of the classes

#: What rows of one table must share: AUROCs of different data or protocols do not compare.
GROUP = ["dataset", "data", "protocol", "sampling"]

_PLAIN = {str, int, float, bool, type(None)}
_FIXED = {"detector", "class", "category", "seed", "status", "epochs", "error", "name", "key", "split_digest", "reference"} | {
    *GROUP
}


def runs_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row a job with everything its record holds, nested fields as `group.name` columns, in a fixed order."""
    rows = []
    for record in records:
        job = record.job
        data, category = split_category(job)
        row: dict[str, Any] = {
            "detector": job.detector_label,
            "dataset": job.dataset,
            "protocol": job.protocol,
            "class": category,
            "seed": job.seed,
            "status": record.status,
            **{name: value for name, value in record.metrics.items() if name not in _FIXED},
            "epochs": job.epochs,
            "error": record.error,
            "name": job.detector,
            "key": job.key,
            "split_digest": record.split_digest,
            "reference": record.reference,
            "data": canonical_json(data),
            "sampling": canonical_json(dict(job.sampling)),
        }
        if "category" in job.data:
            row["category"] = str(job.data["category"])
        nested = {"hparams": job.hparams, "counts": record.counts, "seconds": record.seconds}
        for group, values in {**nested, "notes": record.notes, "environment": record.environment}.items():
            _flatten(group, values, row)
        rows.append(row)
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    order = ["dataset", "data", "protocol", "sampling", "detector", "class", "seed", "key"]
    return frame.sort_values(order, kind="stable").reset_index(drop=True)


def split_category(job: Job) -> tuple[dict[str, Any], str]:
    """The data options and the class as tables show them: the categories of MVTec AD and its like are classes there.

    A class that is called as the column of the mean is has "class " before it.
    """
    data = dict(job.data)
    part = str(data.pop("category", "") or "")
    if not part:
        return dict(job.data), _beside_mean(job.category)
    return data, _beside_mean(part if job.category == ANOMALY else f"{part}/{job.category}")


def _beside_mean(name: str) -> str:
    return f"class {name}" if re.fullmatch(f"(class )*{MEAN}", name) else name


def _flatten(prefix: str, values: Mapping[str, Any], row: dict[str, Any]) -> None:
    """Put `values` into `row` as `prefix.key`, nested ones as `prefix.key.key`, and what is no plain value as JSON."""
    for key, value in values.items():
        kind = type(value)
        if kind in _PLAIN:
            row[f"{prefix}.{key}"] = value
        elif kind is dict or isinstance(value, Mapping):
            _flatten(f"{prefix}.{key}", value, row)
        else:
            row[f"{prefix}.{key}"] = canonical_json(value)


def check_comparable(frame: pd.DataFrame) -> None:
    """Raise InvalidInput when rows of one table were made from different images, or those of one cell from other splits."""
    for a, b, why in incomparable(frame):
        where = frame[frame["key"] == a].iloc[0]
        raise InvalidInput(
            f"Records {a} and {b} ({where['dataset']}, {where['protocol']}) were {why}: the data changed in between. Delete "
            "the older records and run again."
        )


def incomparable(frame: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """The keys of two records that would share a table and must not, and why, for each other state of the data."""
    told = set()
    for column, group, why in (
        ("notes.data", [*GROUP, "category"], "made from different images"),  # records of older versions do not tell
        ("split_digest", [*GROUP, "class", "seed"], "made from different splits of the data"),
    ):
        known = frame.reindex(columns=[*group, column, "key", "status"]).dropna(subset=column)
        states = known[known["status"] == "done"].drop_duplicates([*group, column])
        for _, part in states[states.duplicated(group, keep=False)].groupby(group, dropna=False, sort=False):
            first, *others = part["key"]
            yield from ((first, other, why) for other in others if other not in told)
            told.update(others)
