"""A results folder for notebooks: pandas frames of runs and scores, tables by name, and an HTML view."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Literal

import pandas as pd

from ganomaly_plugin.core import Job, RunRecord
from ganomaly_plugin.errors import InvalidInput, check_known
from ganomaly_plugin.report.frame import GROUP, MEAN, runs_frame, split_category
from ganomaly_plugin.report.measures import DEFAULT_FPR, measured_frame
from ganomaly_plugin.report.tables import Table, make_tables
from ganomaly_plugin.report.writers import caption, cell_text, rank_cell, reference_cells
from ganomaly_plugin.store import Store

_VALUES = ("mean", "std", "n")
_WHERE = ("key", "detector", "dataset", "protocol", "class", "seed")


class Results:
    """What a `bench run` left behind; nothing here trains.

    Args:
        folder: The results folder.

    Raises:
        InvalidInput: It is none.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.store = Store(folder)

    def __repr__(self) -> str:
        done = sum(record.status == "done" for record in self.records)
        return f"Results({str(self.store.folder)!r}: {done} jobs done, {len(self.records) - done} failed)"

    @functools.cached_property
    def records(self) -> list[RunRecord]:
        """All records, read once."""
        return self.store.records()

    @functools.cached_property
    def runs(self) -> pd.DataFrame:
        """One row a job: detector, dataset, protocol, class, seed, status, metrics, and everything else of its record."""
        return runs_frame(self.records)

    @functools.cached_property
    def scores(self) -> pd.DataFrame:
        """One row a test image of a finished job.

        Columns: key, detector, dataset, protocol, class, seed, test_index (the image's place in the data set), is_anomaly and
        score; where a data set is of files also file ("" for others).
        """
        parts = []
        for record in self.records:
            if record.status != "done":
                continue
            arrays = self.store.scores(record.job)
            found = {name: arrays[name] for name in ("test_index", "is_anomaly", "score")}
            parts.append(pd.DataFrame({**found, "file": arrays.get("test_file", "")}).assign(**_where(record.job)))
        columns = [*_WHERE, "test_index", "is_anomaly", "score"]
        if any((part["file"] != "").any() for part in parts):
            columns.append("file")
        return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)

    @functools.cached_property
    def history(self) -> pd.DataFrame:
        """One row an epoch of a finished job.

        Columns: key, detector, dataset, protocol, class, seed, epoch (from 1), and a column for each loss that any job has.
        """
        rows = []
        for record in self.records:
            where = _where(record.job)
            rows += [{**where, "epoch": epoch, **losses} for epoch, losses in enumerate(record.history, 1)]
        return pd.DataFrame(rows, columns=None if rows else [*_WHERE, "epoch"])

    def tables(self, metrics: Sequence[str] = ("auroc",), *, fpr: float = DEFAULT_FPR) -> list[Table]:
        """The tables of `metrics`, one for each data set and protocol; see `make_tables`."""
        return make_tables(measured_frame(self.store, self.records, metrics, fpr), metrics, fpr=fpr)

    def table(
        self,
        metric: str = "auroc",
        *,
        dataset: str | None = None,
        protocol: str | None = None,
        value: Literal["mean", "std", "n"] = "mean",
        fpr: float = DEFAULT_FPR,
    ) -> pd.DataFrame:
        """One table: detectors × classes and their mean, each over seeds.

        Args:
            metric: Name of a metric.
            dataset: Needed where there are several.
            protocol: Needed where there are several.
            value: Of each cell the mean over seeds, their standard deviation (n - 1), or how many there are.
            fpr: The false-positive rate that sets the threshold of "f1".

        Raises:
            InvalidInput: No table or several are meant, or the metric or value is unknown.
        """
        check_known("value", value, _VALUES)
        made = [table for table in self.tables((metric,), fpr=fpr) if table.metric == metric]
        chosen = [t for t in made if dataset in (None, t.dataset, t.where[0]) and protocol in (None, t.protocol)]
        if len(chosen) != 1:
            there = ", ".join(f"{table.dataset} / {table.protocol}" for table in made) or "(none)"
            raise InvalidInput(f"{len(chosen)} tables of {metric} are meant. Give dataset and protocol of one of: {there}.")
        (table,) = chosen
        rows = {row: {column: getattr(table.cells[row][column], value) for column in table.columns} for row in table.rows}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("detector")

    def groups(self) -> Iterator[tuple[tuple[str, ...], list[RunRecord]]]:
        """The records that one table is made of, by data set, options, protocol and sampling."""
        by_key = {record.job.key: record for record in self.records}
        if not self.runs.empty:
            for where, part in self.runs.groupby(GROUP, sort=True):
                yield tuple(str(value) for value in where), [by_key[key] for key in part["key"]]

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>" + "".join(table_html(table) for table in self.tables())


def _where(job: Job) -> dict[str, Any]:
    """The values of `_WHERE` for a job."""
    values = (job.key, job.detector_label, job.dataset, job.protocol, split_category(job)[1], job.seed)
    return dict(zip(_WHERE, values, strict=True))


def breakable(name: str) -> str:
    """The name as HTML that may be broken between its options, which make some very long."""
    return escape(name).replace("[", "[<wbr>").replace(",", ",<wbr>")


def table_html(table: Table) -> str:
    """The table as HTML: best cells strong, second underlined, rows of the literature in italics; all text escaped."""
    ranks, average = {column: table.ranks(column) for column in table.columns}, table.average_ranks()
    head = ["detector", *table.columns, *(["rank"] if average else [])]
    lines = [f"<table><caption>{escape(caption(table))}</caption><thead><tr>"]
    lines += [f'<th scope="col"><span>{escape(text)}</span></th>' for text in head]
    lines.append("</tr></thead><tbody>")
    for row in table.rows:
        lines.append(f'<tr><th scope="row">{breakable(row)}</th>')
        for column in table.columns:
            mean, plus_minus, rest = escape(cell_text(table.cells[row][column])).partition(" ± ")
            best, second = ranks[column]
            mean = f"<strong>{mean}</strong>" if row in best else f"<u>{mean}</u>" if row in second else mean
            spread = f"<small> ± {rest}</small>" if plus_minus else ""
            lines.append(f"<td{' class=mean' if column == MEAN else ''}>{mean}{spread}</td>")
        lines += [f"<td>{text}</td>" for text in rank_cell(average, row)]
        lines.append("</tr>")
    for reference in table.references:
        cells = "".join(f"<td><i>{text}</i></td>" for text in reference_cells(table, reference))
        lines.append(f'<tr><th scope="row"><i>{escape(reference.label)}</i></th>{cells}{"<td></td>" if average else ""}</tr>')
    return "".join([*lines, "</tbody></table>"])


def load_results(folder: str | os.PathLike[str]) -> Results:
    """The results folder that a `bench run` wrote.

    Raises:
        InvalidInput: It is no results folder.
    """
    return Results(folder)
