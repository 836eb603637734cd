"""From a results folder to the sentences of `bench stats`: intervals and tests, or one line that says why not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.cells import cell_len, set_cell_size

from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.errors import InvalidInput, one_line, unknown
from ganomaly_plugin.escape import printable
from ganomaly_plugin.report.frame import MEAN
from ganomaly_plugin.report.measures import measured_frame
from ganomaly_plugin.report.results import Results
from ganomaly_plugin.report.statistics import (
    Friedman,
    Interval,
    JobScores,
    Pair,
    friedman,
    image_interval,
    seed_interval,
    wilcoxon_pairs,
)
from ganomaly_plugin.report.tables import Table
from ganomaly_plugin.store import Store

PAIRWISE_LIMIT = 10  # detectors; with more, Holm over all pairs leaves nothing, and a baseline must be named


@dataclass(frozen=True)
class Row:
    """One detector's mean with its intervals; `images` only for AUROC and complete rows, `seeds` only from two seeds on.

    `missing` says how many seeds the mean is of where some lack a class, and is empty where none does.
    """

    detector: str
    mean: float
    images: Interval | None
    seeds: Interval | None
    missing: str


@dataclass(frozen=True)
class Comparison:
    """What can be said of one table: intervals a row, and paired tests or the reason why there are none.

    `no_mean` are the detectors no seed of which has every class.
    """

    table: Table
    rows: tuple[Row, ...]
    no_mean: tuple[str, ...]
    pairs: tuple[Pair, ...]
    why_no_pairs: str


def compare(
    store: Store, records: Iterable[RunRecord], table: Table, seeds: dict[str, list[float]], *, baseline: str | None = None
) -> Comparison:
    """Intervals and paired tests of the rows of `table`.

    Args:
        store: Where the scores are.
        records: Those of the table's data set and protocol.
        table: One metric's table.
        seeds: For each row the mean over classes of each complete seed.
        baseline: Compare each row with this one of them only.
    """
    scores = _scores(store, records) if table.metric == "auroc" else {}
    rows = []
    for name in table.rows:
        cell = table.cells[name][MEAN]
        if cell.n == 0:
            continue
        images = image_interval(list(scores[name].values())) if name in scores and cell.complete else None
        over_seeds = _in_range(seed_interval(seeds.get(name, [])))
        missing = "" if cell.complete else f"{cell.n} of {cell.wanted} seeds complete"
        rows.append(Row(name, cell.mean, images, over_seeds, missing))
    no_mean = tuple(name for name in table.rows if table.cells[name][MEAN].n == 0)
    pairs, why = _pairs(table, baseline)
    return Comparison(table, tuple(rows), no_mean, tuple(pairs), why)


def _in_range(interval: Interval | None) -> Interval | None:
    """Student's t knows of no bounds; every measure lies between 0 and 1."""
    return interval and replace(interval, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def _scores(store: Store, records: Iterable[RunRecord]) -> dict[str, dict[str, list[JobScores]]]:
    found: dict[str, dict[str, list[JobScores]]] = {}
    for record in records:
        if record.status == "done":
            arrays = store.scores(record.job)
            of_class = found.setdefault(record.job.detector_label, {})
            source = str(record.job.data.get("category", ""))
            tested = JobScores(arrays["test_index"], arrays["is_anomaly"], arrays["score"], source)
            of_class.setdefault(f"{source}/{record.job.category}", []).append(tested)
    return found


def _pairs(table: Table, baseline: str | None) -> tuple[list[Pair], str]:
    complete = table.complete_rows
    if len(complete) < 2:
        return [], "no paired tests: fewer than two detectors are complete in every class"
    if baseline is not None and baseline not in complete:
        return [], f"no paired tests: {baseline} is not complete in every class"
    if baseline is None and len(complete) > PAIRWISE_LIMIT:
        return [], f"no paired tests: {len(complete)} detectors make too many pairs to correct for; bench stats --baseline NAME"
    values = {row: [table.cells[row][column].mean for column in table.classes] for row in complete}
    pairs = [(row, baseline) for row in complete if row != baseline] if baseline else list(itertools.combinations(complete, 2))
    try:
        return wilcoxon_pairs(values, pairs, higher_is_better=table.higher_is_better), ""
    except InvalidInput as error:
        return [], f"no paired tests: {one_line(error)}"


def across_data_sets(tables: Sequence[Table]) -> tuple[Friedman | None, str]:
    """Friedman's test over the data sets that tables of one metric and protocol are of, or the reason why there is none.

    The categories of MVTec AD and its like have images of their own each, and count as data sets; classes of one labelled
    data set share their training images, and do not.
    """
    blocks: dict[str, dict[str, float]] = {}
    for table in tables:
        name = table.where[0]
        separate = name.startswith("anomalib:")
        for column in table.classes if separate else (MEAN,):
            block = f"{name}/{column}"
            if block in blocks:
                return None, f"no test over data sets: {name} is here more than once, with other options"
            blocks[block] = {row: table.cells[row][column].mean for row in table.rows if table.cells[row][column].complete}
    everyone = list(dict.fromkeys(row for table in tables for row in table.rows))
    names = [name for name in everyone if all(name in values for values in blocks.values())]
    out = tuple(name for name in everyone if name not in names)
    grid = np.array([[values[name] for name in names] for values in blocks.values()]).reshape(len(blocks), len(names))
    try:
        return replace(friedman(names, grid, higher_is_better=tables[0].higher_is_better), left_out=out), ""
    except InvalidInput as error:
        return None, f"no test over data sets: {one_line(error)}{without(out)}"


def without(left_out: Sequence[str]) -> str:
    """A sentence behind Friedman's test that names the detectors left out of it, where there are some."""
    return f" Left out, for they lack results on some data set: {', '.join(left_out)}." if left_out else ""


def comparisons(results: Results, tables: Sequence[Table], *, baseline: str | None = None) -> Iterator[Comparison]:
    """A comparison for each of a folder's `tables` of one metric that has the row `baseline`; see `compare`."""
    found = {(*table.where, table.protocol): table for table in tables}
    for (dataset, data, protocol, sampling), records in results.groups():
        table = found.get((dataset, data, sampling, protocol))
        if table is not None and (baseline is None or baseline in table.rows):
            yield compare(results.store, records, table, seed_means(results, table), baseline=baseline)


def left_out(tables: Sequence[Table], baseline: str | None) -> list[str]:
    """A line that names those of one metric's tables that lack the row `baseline`, where there are some.

    Raises:
        InvalidInput: No table has it.
    """
    lacking = [table for table in tables if baseline is not None and baseline not in table.rows]
    if lacking and len(lacking) == len(tables):
        raise unknown("baseline", baseline, {row for table in tables for row in table.rows})
    named = "; ".join(f"{table.dataset}, {table.protocol}" for table in lacking)
    return [f"left out, for they have no {baseline}: {named}"] if lacking else []


def seed_means(results: Results, table: Table) -> dict[str, list[float]]:
    """For each row the mean over all classes of each seed that has them all."""
    frame = measured_frame(results.store, results.records, (table.metric,))
    dataset, data, sampling = table.where
    mine = frame[
        (frame["dataset"] == dataset)
        & (frame["data"] == data)
        & (frame["sampling"] == sampling)
        & (frame["protocol"] == table.protocol)
        & (frame["status"] == "done")
    ]
    found = {}
    for name, part in mine.groupby("detector"):
        grid = part.pivot_table(index="seed", columns="class", values=table.metric)
        whole = grid.reindex(columns=list(table.classes)).dropna()
        found[str(name)] = [float(value) for value in whole.mean(axis=1)]
    return found


def over_data_sets(tables: Sequence[Table]) -> Iterator[tuple[str, Friedman | None, str]]:
    """Friedman's test, or why there is none, for each protocol of tables of one metric."""
    for protocol in dict.fromkeys(table.protocol for table in tables):
        yield (protocol, *across_data_sets([table for table in tables if table.protocol == protocol]))


def comparison_text(comparison: Comparison) -> str:
    """The comparison as lines for a terminal."""
    table = comparison.table
    lines = [f"{table.dataset}, {table.protocol}: {table.title}"]
    width = max((cell_len(row.detector) for row in comparison.rows), default=0)
    for row in comparison.rows:
        found = [(row.images, "jobs"), (row.seeds, "seeds")]
        texts = [f"[{i.low:.3f}, {i.high:.3f}] {i.method} ({i.n} {what})" for i, what in found if i is not None]
        texts = ["95 %: " + "; ".join(texts)] if texts else []
        texts += [row.missing] if row.missing else []
        texts += ["one seed: no interval over seeds"] if row.seeds is None else []
        lines.append(f"  {set_cell_size(row.detector, width)}  {row.mean:.3f}  {'; '.join(texts)}")
    if comparison.no_mean:
        lines.append(f"  no mean, for no seed has every class: {', '.join(comparison.no_mean)}")
    if comparison.pairs:
        lines.append("  Wilcoxon over classes, seeds averaged, Holm over these pairs (classes share training images):")
    for pair in comparison.pairs:
        lines.append(
            f"    {pair.a} - {pair.b}: {pair.difference:+.3f}, better in {pair.wins_a}, worse in {pair.wins_b}, "
            f"{p_text(pair.p)}, Holm {p_number(pair.p_holm)}"
        )
    if comparison.why_no_pairs:
        lines.append(f"  {comparison.why_no_pairs}")
    return "\n".join(map(printable, lines))


def p_number(p: float) -> str:
    """`0.0123`, and never a p of zero."""
    return f"{p:.4f}" if p >= 0.00005 else "< 0.0001"


def p_text(p: float) -> str:
    """`p = 0.0123` or `p < 0.0001`."""
    number = p_number(p)
    return f"p {number}" if number.startswith("<") else f"p = {number}"


def friedman_text(protocol: str, tested: Friedman | None, why: str) -> str:
    """Friedman's test, or why there is none, as lines for a terminal."""
    if tested is None:
        return printable(f"{protocol}: {why}")
    ranks = ", ".join(f"{name} {rank:.2f}" for name, rank in sorted(tested.ranks.items(), key=lambda item: item[1]))
    return printable(
        f"{protocol}: Friedman over {tested.n} data sets: chi2 = {tested.chi2:.2f}, Iman-Davenport F = {tested.f:.2f}, "
        f"{p_text(tested.p)}; average ranks {ranks}; Nemenyi's critical difference {tested.critical_difference:.2f}."
        + without(tested.left_out)
    )
