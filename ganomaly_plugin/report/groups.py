"""What one table is made of, for figures and reports: the records of one data set and protocol, and their arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.errors import InvalidInput, check_known
from ganomaly_plugin.report.frame import MEAN, runs_frame, split_category
from ganomaly_plugin.report.measures import measured_frame
from ganomaly_plugin.report.results import Results
from ganomaly_plugin.report.tables import Table, describe_data, make_tables
from ganomaly_plugin.selection import Selection, parse_label, show


@dataclass(frozen=True)
class Group:
    """The records that may stand in one table.

    Attributes:
        dataset: The data set, with the options that differ from plain.
        protocol: Protocol id.
        where: The data set's plain name, its options and its sampling, the latter two as JSON.
        records: All of them, failed ones too.
        table: Their AUROCs.
        results: The folder they are of.
    """

    dataset: str
    protocol: str
    where: tuple[str, str, str]
    records: tuple[RunRecord, ...]
    table: Table
    results: Results

    @property
    def title(self) -> str:
        """How headings call it."""
        return f"{self.dataset}, {self.protocol}"

    @property
    def extent(self) -> str:
        """What its means are over: `10 classes × 3 seeds`."""
        classes, seeds = len(self.table.classes), self.table.seeds
        return f"{classes} class{'es' * (classes > 1)} × {seeds} seed{'s' * (seeds > 1)}"

    @functools.cached_property
    def runs(self) -> pd.DataFrame:
        """One row a job; see `runs_frame`."""
        return runs_frame(self.records)

    @functools.cached_property
    def detectors(self) -> tuple[str, ...]:
        """Those with a finished job, the highest mean AUROC first."""
        return tuple(sorted((name for name in self.table.rows if self.jobs(name)), key=lambda name: (-self.mean(name), name)))

    def jobs(self, detector: str) -> list[RunRecord]:
        """The finished jobs of a detector, by class and seed as tables order them."""
        order = {name: k for k, name in enumerate(self.table.columns)}
        mine = [r for r in self.records if r.status == "done" and r.job.detector_label == detector]
        return sorted(mine, key=lambda record: (order[class_of(record)], record.job.seed))

    def mean(self, detector: str) -> float:
        """The table's mean AUROC, or that of the finished jobs where some are missing."""
        cell = self.table.cells[detector][MEAN]
        return cell.mean if cell.complete else float(np.mean([record.metrics["auroc"] for record in self.jobs(detector)]))

    def missing(self, detector: str) -> int:
        """How many jobs a full row of the table would have more."""
        return sum(cell.wanted - cell.n for name, cell in self.table.cells[detector].items() if name != MEAN)

    def arrays(self, record: RunRecord) -> Mapping[str, np.ndarray]:
        """`score`, `is_anomaly` and `reference_score` of a finished job, read once."""
        key = record.job.key
        if key not in self._arrays:
            stored = self.results.store.scores(record.job)
            self._arrays[key] = {name: stored[name] for name in ("score", "is_anomaly", "reference_score")}
        return self._arrays[key]

    @functools.cached_property
    def _arrays(self) -> dict[str, dict[str, np.ndarray]]:
        return {}

    def names(self) -> dict[str, str]:
        """Short names for legends, without the options that tell none of the detectors apart."""
        return short_names(self.table.rows)

    def common(self, detectors: Iterable[str]) -> str:
        """A sentence on what the short names of `detectors` leave out, or nothing."""
        theirs = {option for name in detectors for option in parse_label(name).options}
        shared = {name: value for name, value in shared_options(self.table.rows).items() if name in theirs}
        shown = ", ".join(show("", {name: value})[1:-1] for name, value in sorted(shared.items()))
        return f"Short names leave out {shown}." if shared else ""

    def colour(self, detector: str) -> int:
        """The number of its colour: the same in all figures of the group."""
        return self.detectors.index(detector)


def class_of(record: RunRecord) -> str:
    """How tables call the record's class."""
    return split_category(record.job)[1]


def shared_options(detectors: Iterable[str]) -> dict[str, Any]:
    """Options that several detectors have with one value, and none of the same name lacks: they tell nobody apart."""
    parsed = [parse_label(name) for name in detectors]
    carriers: dict[str, list[Selection]] = {}
    for selection in parsed:
        for option in selection.options:
            carriers.setdefault(option, []).append(selection)
    found = {}
    for option, those in carriers.items():
        bare = {selection.name for selection in those}
        lacking = any(selection.name in bare and option not in selection.options for selection in parsed)
        if len(those) > 1 and not lacking and all(each.options[option] == those[0].options[option] for each in those):
            found[option] = those[0].options[option]
    return found


def short_names(detectors: Sequence[str]) -> dict[str, str]:
    """Names without `shared_options`: `ganomaly[batchnorm=batch]`."""
    shared = shared_options(detectors)
    found = {}
    for name in detectors:
        selection = parse_label(name)
        telling = {k: v for k, v in selection.options.items() if k not in shared}
        found[name] = name if telling == selection.options else show(selection.name, telling)
    return found


def groups(
    results: Results,
    *,
    datasets: Sequence[str] = (),
    protocols: Sequence[str] = (),
    detectors: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> list[Group]:
    """The groups of a results folder that have a finished job, of the named data sets, protocols, detectors and classes.

    A detector goes by the name that tables have for it, or by the part before the bracket.

    Raises:
        InvalidInput: A name is not there, or nothing is left of all together.
    """
    records = results.records
    _check("detector", detectors, {name for record in records for name in _calls(record)})
    _check("class", classes, {class_of(record) for record in records})
    _check("protocol", protocols, {record.job.protocol for record in records})

    def chosen(record: RunRecord) -> bool:
        part = class_of(record)
        wanted = not detectors or not _calls(record).isdisjoint(detectors)
        return wanted and (not classes or part in classes) and (not protocols or record.job.protocol in protocols)

    made = list(_groups(results, chosen))
    _check("data set", datasets, {each for group in made for each in (group.dataset, group.where[0])})
    made = [g for g in made if not datasets or g.dataset in datasets or g.where[0] in datasets]
    made = [group for group in made if group.detectors]
    if not made:
        raise InvalidInput(
            f"{results.store.folder} has no finished job of these names. Leave out a filter; bench tables shows all."
        )
    return made


def _calls(record: RunRecord) -> set[str]:
    """What the record's detector goes by."""
    label = record.job.detector_label
    return {label, label.split("[")[0], record.job.detector}


def _check(kind: str, wanted: Sequence[str], known: Iterable[str]) -> None:
    there = set(known)
    for name in wanted:
        check_known(kind, name, there)


def _groups(results: Results, chosen: Callable[[RunRecord], bool]) -> Iterable[Group]:
    for (dataset, data, protocol, sampling), records in results.groups():
        mine = [record for record in records if chosen(record)]
        if mine:
            table = make_tables(measured_frame(results.store, mine, ("auroc",)), ("auroc",))[0]
            yield Group(
                describe_data(dataset, data, sampling), protocol, (dataset, data, sampling), tuple(mine), table, results
            )
