"""What tables call the detector of a record: jobs that differ in how they were made never share a name, nor a mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ganomaly_plugin.core import Job, RunRecord
from ganomaly_plugin.selection import parse_label, show


def distinctly_labelled(records: Sequence[RunRecord]) -> list[RunRecord]:
    """`records`, where one label under one protocol stands for several settings with the settings that tell them apart.

    A label holds what differs from the defaults of the version that ran the job, and defaults change between versions.
    """
    found = _told_apart(records)
    if all(new.job.label == old.job.label for new, old in zip(found, records, strict=True)):
        return found
    return distinctly_labelled(found)  # a new label may be that of others


def _told_apart(records: Sequence[RunRecord]) -> list[RunRecord]:
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        known = kinds.setdefault((record.job.label, record.job.protocol), [])
        settings = _settings(record.job)
        if settings not in known:
            known.append(settings)
    telling = {where: _differing(known) for where, known in kinds.items()}
    return [_relabelled(record, telling[record.job.label, record.job.protocol]) for record in records]


def _settings(job: Job) -> dict[str, Any]:
    return {**job.hparams, "epochs": job.epochs, "steps": job.steps}


def _differing(kinds: Sequence[dict[str, Any]]) -> set[str]:
    """Names of the settings that not all of `kinds` have, or not with one value."""
    first = kinds[0]
    absent = object()
    return {name for each in kinds for name in {**first, **each} if first.get(name, absent) != each.get(name, absent)}


def _relabelled(record: RunRecord, names: set[str]) -> RunRecord:
    job = record.job
    if not names:
        return record
    said = parse_label(job.detector_label)
    mine = {name: value for name, value in _settings(job).items() if name in names and value is not None}
    return replace(record, job=replace(job, label=show(said.name, {**said.options, **mine})))
