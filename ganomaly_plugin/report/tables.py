"""Tables of mean ± std (n) over seeds: rows are detectors, columns are classes and their mean."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ganomaly_plugin.datasets.base import default_options
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.registry import is_registered
from ganomaly_plugin.report.frame import GROUP, MEAN, check_comparable
from ganomaly_plugin.report.measures import DEFAULT_FPR, METRICS, check_metrics
from ganomaly_plugin.selection import as_word

ALL = "all data sets"
_WITH_AUROC = ("pixel_auroc", "aupro", "auroc_oracle")  # shown beside AUROC wherever records have them


@dataclass(frozen=True)
class Cell:
    """Mean and standard deviation (n - 1) over `n` of `wanted` seeds; NaN where undefined."""

    mean: float
    std: float
    n: int
    wanted: int

    @property
    def complete(self) -> bool:
        """Whether no seed is missing; only complete cells compete for best."""
        return self.n == self.wanted and self.n > 0


@dataclass(frozen=True)
class Reference:
    """A row of the literature's numbers, shown beside a table's rows and never ranked among them.

    Attributes:
        label: What tables call it, such as "GANomaly (published)".
        values: Class name → number; classes without one are missing.
        source: Where the numbers stand.
        reliability: How sure it is that they stand there.
    """

    label: str
    values: Mapping[str, float]
    source: str
    reliability: str


@dataclass(frozen=True)
class Table:
    """One metric on one data set under one protocol: rows that may be compared.

    Attributes:
        dataset: Its name, with the options that differ from plain.
        protocol: Protocol id.
        metric: Key of the metric.
        title: One line for captions.
        rows: Detector labels.
        columns: Class names, then "mean".
        cells: `cells[row][column]`.
        higher_is_better: The metric's direction.
        references: Rows of the literature, of the same data set and protocol.
        where: The data set's plain name, and its options and sampling as JSON; empty for a summary of several.
    """

    dataset: str
    protocol: str
    metric: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[str, dict[str, Cell]]
    higher_is_better: bool = True
    references: tuple[Reference, ...] = ()
    where: tuple[str, str, str] = ("", "{}", "{}")

    def ranks(self, column: str) -> tuple[set[str], set[str]]:
        """Rows with the best and the second best mean of `column` (to three decimals, ties shared), of two or more."""
        means = {row: round(self.cells[row][column].mean, 3) for row in self.rows if self.cells[row][column].complete}
        if len(means) < 2:
            return set(), set()
        values = sorted(set(means.values()), reverse=self.higher_is_better)
        best = {row for row, value in means.items() if value == values[0]}
        second = {row for row, value in means.items() if len(values) > 1 and len(best) == 1 and value == values[1]}
        return best, second

    @property
    def classes(self) -> tuple[str, ...]:
        """The columns but that of the mean."""
        return tuple(column for column in self.columns if column != MEAN)

    @property
    def complete_rows(self) -> list[str]:
        """The rows that are complete in every class."""
        return [row for row in self.rows if all(self.cells[row][column].complete for column in self.classes)]

    def average_ranks(self) -> dict[str, float]:
        """The mean over the classes of each row's rank, 1 for the best, ties shared; {} when fewer than two rows compete.

        Only rows that are complete in every class compete: ranks among other rows would be of other contests.
        """
        rivals = self.complete_rows
        if len(rivals) < 2 or not self.classes:
            return {}
        means = np.array([[round(self.cells[row][column].mean, 3) for column in self.classes] for row in rivals])
        ranks = pd.DataFrame(means).rank(ascending=not self.higher_is_better).to_numpy().mean(axis=1)
        return {row: float(rank) for row, rank in zip(rivals, ranks, strict=True)}

    @property
    def seeds(self) -> int:
        """The number of seeds that a complete cell has."""
        return max((cell.wanted for row in self.cells.values() for cell in row.values()), default=0)


def make_tables(frame: pd.DataFrame, metrics: Sequence[str] = ("auroc", "auprc"), *, fpr: float = DEFAULT_FPR) -> list[Table]:
    """Tables from `runs_frame`, one for each data set, protocol and metric; oracle metrics come as tables of their own.

    Args:
        frame: The rows, with a column for each metric; `measured_frame` has those that records lack.
        metrics: Names of METRICS. Pixel metrics and the oracle come with "auroc" wherever records have them.
        fpr: The false-positive rate that set the threshold of "f1", for the captions.

    Raises:
        InvalidInput: A metric is unknown, or rows of one cell were made from different splits.
    """
    check_metrics(metrics)
    if frame.empty:
        return []
    check_comparable(frame)
    tables = []
    for where, group in frame.groupby(GROUP, sort=True):
        dataset, data, protocol, sampling = (str(value) for value in where)
        wanted = list(metrics)
        if "auroc" in wanted:
            wanted += [name for name in _WITH_AUROC if name in group and group[name].notna().any()]
        for metric in dict.fromkeys(wanted):
            table = _table(group, metric, describe_data(dataset, data, sampling), protocol, fpr)
            tables.append(replace(table, where=(dataset, data, sampling)))
    return tables


def summarise(tables: Sequence[Table]) -> list[Table]:
    """One table for each metric and protocol that several data sets share: its columns are their means over classes."""
    groups: dict[tuple[str, str], list[Table]] = {}
    for table in tables:
        groups.setdefault((table.protocol, table.metric), []).append(table)
    found = []
    for group in groups.values():
        if len(group) < 2:
            continue
        rows = tuple(dict.fromkeys(row for table in group for row in table.rows))
        captions = [table.dataset for table in group]
        columns = tuple(  # options that a caption leaves out may be all that differs
            caption if captions.count(caption) == 1 else f"{caption} ({captions[: k + 1].count(caption)})"
            for k, caption in enumerate(captions)
        )
        of = dict(zip(columns, group, strict=True))
        absent = {column: Cell(math.nan, math.nan, 0, table.seeds) for column, table in of.items()}
        cells = {row: {c: t.cells[row][MEAN] if row in t.rows else absent[c] for c, t in of.items()} for row in rows}
        title = f"mean over classes of the {group[0].title}"
        found.append(Table(ALL, group[0].protocol, group[0].metric, title, rows, columns, cells, group[0].higher_is_better))
    return found


def leaks(frame: pd.DataFrame) -> list[str]:
    """A line for each data set and protocol some of whose test images are training images too: the worst of its jobs."""
    counts = ["notes.leaked", "counts.test_normal", "counts.test_anomalous"]
    there = frame.reindex(columns=[*GROUP, *counts])
    n, normal, anomalous = (pd.to_numeric(there[name].astype(str), errors="coerce") for name in counts)  # notes hold anything
    of = normal + anomalous
    found = there[GROUP].assign(n=n, of=of, share=n / of)[(n > 0) & (n <= of)]
    worst = found.sort_values("share").drop_duplicates(GROUP, keep="last").sort_values(GROUP)
    return [
        f"{describe_data(row['dataset'], row['data'], row['sampling'])}, {row['protocol']}: up to {row['n']:,.0f} of "
        f"{row['of']:,.0f} test images ({row['share']:.1%}) are training images too; bench data check "
        f"{as_word(row['dataset'])} shows equal images"
        for row in worst.to_dict("records")
    ]


def describe_data(dataset: str, data: str, sampling: str) -> str:
    """A few words from a frame's `dataset`, `data` and `sampling`: name, size, and options that are not defaults."""
    options: dict[str, Any] = json.loads(data)
    size = options.pop("image_size", None)
    words = [dataset] + ([f"{size}×{size}"] if size else [])
    try:
        usual = default_options(dataset) if is_registered("data set", dataset) else {}  # a record's name imports nothing else
    except InvalidInput:  # the records are of a data set that is not installed here
        usual = {}
    options = {key: value for key, value in options.items() if key not in usual or value != usual[key]}
    words += [f"{key}={value}" for key, value in {**options, **json.loads(sampling)}.items()]
    return " ".join(words)


def _table(group: pd.DataFrame, metric: str, dataset: str, protocol: str, fpr: float) -> Table:
    classes = sorted(group["class"].unique(), key=_natural)
    seeds = sorted(group["seed"].unique())
    rows = list(dict.fromkeys(group["detector"]))
    cells: dict[str, dict[str, Cell]] = {}
    values = group.reindex(columns=[*group.columns, metric]) if metric not in group else group
    for row in rows:
        mine = values[(values["detector"] == row) & (values["status"] == "done")]
        grid = mine.pivot_table(index="seed", columns="class", values=metric, aggfunc="mean", dropna=False)
        grid = grid.reindex(index=seeds, columns=classes).astype(float)
        cells[row] = {name: _cell(grid[name].to_numpy(), len(seeds)) for name in classes}
        # A seed counts in the mean only when all of its classes are there: means over different classes do not compare.
        cells[row][MEAN] = _cell(grid.mean(axis=1, skipna=False).to_numpy(), len(seeds))
    if metric in _WITH_AUROC:  # a method without epochs has no oracle, one without maps no pixel metric
        rows = [row for row in rows if any(cell.n for cell in cells[row].values())]
    kind = METRICS[metric]
    chosen = (group.get("hparams.select", pd.Series(dtype=object)) == "normal-val").any()
    origins = group.get("reference", pd.Series(dtype=object)).dropna().astype(str)  # "train" where none are held out
    epoch = "last epoch, or that which select=normal-val kept" if chosen else "last epoch"
    title = kind.title.format(fpr=fpr, reference="/".join(sorted(origins.unique())) or "reference", epoch=epoch)
    return Table(dataset, protocol, metric, title, tuple(rows), (*classes, MEAN), cells, kind.higher_is_better)


def _cell(values: np.ndarray, wanted: int) -> Cell:
    there = values[~np.isnan(values)]
    mean = float(there.mean()) if len(there) else math.nan
    std = float(there.std(ddof=1)) if len(there) > 1 else math.nan
    return Cell(mean, std, len(there), wanted)


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)
