"""Two results folders: what tells them apart, and one folder out of several, when their rows may stand in one table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ganomaly_plugin.core import Job, Outcome, RunRecord
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.escape import printable
from ganomaly_plugin.report.frame import incomparable, runs_frame
from ganomaly_plugin.store import Store

#: Packages whose version may move a result.
_DECIDING = ("ganomaly-plugin", "torch", "torchvision", "anomalib", "scikit-learn", "numpy")
_SHOWN = 20  # lines of one kind before "and N more"


def differing_versions(a: RunRecord, b: RunRecord) -> str:
    """`torch 2.11.0 against 2.15.0, …` for the deciding packages, the device and the trainer; empty when they agree."""
    sides = [
        {**_versions(record), "device": record.environment.get("device"), "trainer": _trainer(record)} for record in (a, b)
    ]
    return ", ".join(
        f"{name} {sides[0].get(name)} against {sides[1].get(name)}"
        for name in (*_DECIDING, "device", "trainer")
        if sides[0].get(name) != sides[1].get(name)
    )


def _trainer(record: RunRecord) -> str | None:
    """How the model was trained, such as `plain`, or `stacked-matmul of 6 models`: another way rounds otherwise."""
    described = record.notes.get("describe")
    if not isinstance(described, Mapping) or "trainer" not in described:
        return None
    if "stacked_by" not in described:
        return str(described["trainer"])
    return f"{described['trainer']}-{described['stacked_by']} of {described.get('stacked_models')} models"


def _versions(record: RunRecord) -> Mapping[str, Any]:
    found = record.environment.get("versions", {})
    return found if isinstance(found, Mapping) else {}


@dataclass
class Merged:
    """What `merge` did."""

    copied: int = 0
    shared: int = 0  # jobs that more than one folder has
    remarks: list[str] = field(default_factory=list)


def merge(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, keep: str | None = None) -> Merged:
    """Put the records, scores and images of `folders` into the results folder `out`, which may be one of them.

    A job that is done in one folder and failed in another counts as done. Everything is checked before anything is
    written; the sources stay as they are.

    Args:
        folders: Two results folders or more.
        out: A results folder, or where to make one.
        keep: "first" or "last" settles jobs whose folders disagree; None refuses them.

    Raises:
        InvalidInput: Two folders have other scores for one job, or records that no table may hold together; says which and why.
        CorruptFile: A record or its scores are damaged.
    """
    if keep not in (None, "first", "last"):
        raise InvalidInput(f"--keep must be first or last, got {keep!r}.")
    sources = [Store(folder) for folder in folders]
    existing = Store(out) if Store.marker_of(out).is_file() else None
    if existing is not None and all(not _same_folder(existing, source) for source in sources):
        sources.insert(0, existing)
    if len(sources) < 2:
        raise InvalidInput("Only one results folder is given. Give two or more.")
    chosen: dict[str, tuple[Store, RunRecord]] = {}
    merged, conflicts = Merged(), []
    for source in sources:
        for record in source.records_as_stored():
            if record.status == "done":
                source.scores(record.job)  # raises when damaged
            before = chosen.get(record.job.key)
            if before is None:
                chosen[record.job.key] = (source, record)
                continue
            merged.shared += 1
            problem = _conflict(before, (source, record))
            if problem and keep is None:
                conflicts.append(problem)
            if record.status == "done" and (before[1].status == "failed" or (problem and keep == "last")):
                chosen[record.job.key] = (source, record)
    pairs = incomparable(runs_frame(record for _, record in chosen.values()))
    conflicts += [f"{chosen[a][1].job.title} and {chosen[b][1].job.title}: {why}" for a, b, why in pairs]
    if conflicts:
        raise InvalidInput(f"These folders do not go into one: {_listed(conflicts)}. {_ADVICE}")
    merged.remarks = _mixed_versions([record for _, record in chosen.values()])
    target = Store(out, create=True)
    for source, record in chosen.values():
        if not _same_folder(source, target):
            arrays = source.scores(record.job) if record.status == "done" else {}
            target.put(Outcome(record, arrays, source.images(record.job)))
            merged.copied += 1
    return merged


_ADVICE = "--keep first or last settles other scores of one job; other splits never share a table."


def _same_folder(a: Store, b: Store) -> bool:
    return a.folder.resolve() == b.folder.resolve()


def _conflict(before: tuple[Store, RunRecord], after: tuple[Store, RunRecord]) -> str | None:
    """Why two records of one job are not the same result; None when they are, or when only one is done."""
    (first, a), (second, b) = before, after
    if "failed" in (a.status, b.status) or _same_scores(first.scores(a.job), second.scores(b.job)):
        return None
    why = differing_versions(a, b) or "the same versions, device and trainer"
    gap = f"AUROC {a.metrics['auroc']:.4f} against {b.metrics['auroc']:.4f}"
    return f"{a.job.title}: other scores in {first.folder} and {second.folder} ({gap}; {why})"


def _same_scores(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in ("score", "is_anomaly"))


def _mixed_versions(records: Sequence[RunRecord]) -> list[str]:
    found: dict[str, set[str]] = {}
    for record in records:
        for name in _DECIDING:
            if name in _versions(record):
                found.setdefault(name, set()).add(str(_versions(record)[name]))
    mixed = [f"{name} {', '.join(sorted(values))}" for name, values in found.items() if len(values) > 1]
    return [f"rows were made with different versions: {'; '.join(mixed)}"] if mixed else []


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - 3} more"] if len(lines) > 3 else []
    return "; ".join([*lines[:3], *more])


@dataclass
class Comparison:
    """How two results folders differ, as lines for people."""

    equal: int = 0
    failed: int = 0  # in both
    other_scores: list[str] = field(default_factory=list)  # the same job, another result
    other_status: list[str] = field(default_factory=list)
    not_comparable: list[str] = field(default_factory=list)  # alike in name, not in what was done
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether both folders have the same jobs with the same results."""
        return not (self.other_scores or self.other_status or self.not_comparable or self.only_first or self.only_second)

    def lines(self) -> list[str]:
        """The comparison, a line each."""
        found = [f"{self.equal} jobs with the same scores in both"]
        found += [f"{self.failed} jobs failed in both"] if self.failed else []
        for title in ("other_scores", "other_status", "not_comparable", "only_first", "only_second"):
            entries = getattr(self, title)
            if entries:
                found.append(f"{title.replace('_', ' ')}: {len(entries)}")
                found += [f"  {line}" for line in entries[:_SHOWN]]
                found += [f"  and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
        return list(map(printable, found))


def compare(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Comparison:
    """What differs between two results folders, job by job.

    Raises:
        InvalidInput: One is no results folder.
        CorruptFile: A record or its scores are damaged.
    """
    stores = Store(first), Store(second)
    mine, theirs = ({record.job.key: record for record in store.records()} for store in stores)
    found = Comparison()
    for key in [key for key in mine if key in theirs]:
        _compare_job(found, stores, mine[key], theirs[key])
    rest: dict[tuple[str, ...], list[Job]] = {}
    for record in [record for key, record in theirs.items() if key not in mine]:
        rest.setdefault(_name_of(record.job), []).append(record.job)
    for job in [record.job for key, record in mine.items() if key not in theirs]:
        namesakes = rest.get(_name_of(job), [])
        if not namesakes:
            found.only_first.append(job.title)
            continue
        nearest = min(namesakes, key=lambda other: len(_unlike(job, other)))
        namesakes.remove(nearest)
        found.not_comparable.append(f"{job.title}: {', '.join(_unlike(job, nearest))}")
    found.only_second += [job.title for jobs in rest.values() for job in jobs]
    return found


def _compare_job(found: Comparison, stores: tuple[Store, Store], a: RunRecord, b: RunRecord) -> None:
    if a.status != b.status:
        found.other_status.append(f"{a.job.title}: {a.status} against {b.status}: {a.error or b.error}")
    elif a.status == "failed":
        found.failed += 1
    elif a.split_digest != b.split_digest:
        found.not_comparable.append(f"{a.job.title}: other splits of the data ({a.split_digest} against {b.split_digest})")
    elif _same_scores(stores[0].scores(a.job), stores[1].scores(b.job)):
        found.equal += 1
    else:
        change = b.metrics["auroc"] - a.metrics["auroc"]
        why = differing_versions(a, b) or "same versions, device and trainer"
        gap = f"AUROC {a.metrics['auroc']:.4f} against {b.metrics['auroc']:.4f} ({change:+.4f})"
        found.other_scores.append(f"{a.job.title}: {gap}; {why}")


def _name_of(job: Job) -> tuple[str, ...]:
    """What a reader takes for the same cell in two folders, whatever its settings."""
    return (job.detector, job.dataset, job.category, str(job.seed))


def _unlike(a: Job, b: Job) -> list[str]:
    """Every setting in which two jobs differ."""
    mine, theirs = (_flat({k: v for k, v in asdict(job).items() if k != "label"}) for job in (a, b))
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    return [f"{name} {mine.get(name)} against {theirs.get(name)}" for name in names]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= value if isinstance(value, Mapping) else {name: value}
    return found
