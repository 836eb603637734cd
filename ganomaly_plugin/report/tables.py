"""Tables of mean ± std (n) over seeds: rows are detectors, columns are classes and their mean."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ganomaly_plugin.datasets.base import default_options
from ganomaly_plugin.errors import InvalidInput, unknown
from ganomaly_plugin.report.frame import GROUP, check_comparable

MEAN = "mean"
TITLES = {
    "auroc": "AUROC, last epoch",
    "auprc": "AUPRC, last epoch",
    "pixel_auroc": "pixel AUROC of the anomaly maps, last epoch",
    "aupro": "AUPRO (to a false-positive rate of 0.3) of the anomaly maps, last epoch",
    "auroc_oracle": "AUROC, best test epoch (ORACLE: the epoch is chosen on the test set; not a result)",
}
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
    """

    dataset: str
    protocol: str
    metric: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[str, dict[str, Cell]]

    def ranks(self, column: str) -> tuple[set[str], set[str]]:
        """Rows with the best and the second best mean of `column` (to three decimals, ties shared)."""
        means = {row: round(self.cells[row][column].mean, 3) for row in self.rows if self.cells[row][column].complete}
        values = sorted(set(means.values()), reverse=True)
        if len(self.rows) < 2 or not values:
            return set(), set()
        best = {row for row, value in means.items() if value == values[0]}
        second = {row for row, value in means.items() if len(values) > 1 and len(best) == 1 and value == values[1]}
        return best, second

    @property
    def seeds(self) -> int:
        """The number of seeds that a complete cell has."""
        return max((cell.wanted for row in self.cells.values() for cell in row.values()), default=0)


def make_tables(frame: pd.DataFrame, metrics: Sequence[str] = ("auroc", "auprc")) -> list[Table]:
    """Tables from `runs_frame`, one for each data set, protocol and metric; oracle metrics come as tables of their own.

    Raises:
        InvalidInput: A metric is unknown, or rows of one cell were made from different splits.
    """
    for metric in metrics:
        if metric not in TITLES:
            raise unknown("metric", metric, TITLES)
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
            tables.append(_table(group, metric, describe_data(dataset, data, sampling), protocol))
    return tables


def describe_data(dataset: str, data: str, sampling: str) -> str:
    """A few words from a frame's `dataset`, `data` and `sampling`: name, size, and options that are not defaults."""
    options: dict[str, Any] = json.loads(data)
    size = options.pop("image_size", None)
    words = [dataset] + ([f"{size}×{size}"] if size else [])
    try:
        usual = default_options(dataset)
    except InvalidInput:  # the records are of a data set that is not installed here
        usual = {}
    options = {key: value for key, value in options.items() if key not in usual or value != usual[key]}
    words += [f"{key}={value}" for key, value in {**options, **json.loads(sampling)}.items()]
    return " ".join(words)


def _table(group: pd.DataFrame, metric: str, dataset: str, protocol: str) -> Table:
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
    return Table(dataset, protocol, metric, TITLES[metric], tuple(rows), (*classes, MEAN), cells)


def _cell(values: np.ndarray, wanted: int) -> Cell:
    there = values[~np.isnan(values)]
    mean = float(there.mean()) if len(there) else math.nan
    std = float(there.std(ddof=1)) if len(there) > 1 else math.nan
    return Cell(mean, std, len(there), wanted)


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)
