"""Tables, costs, decisions and comparisons by hand: who competes, what captions say, and every form they are written in."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len
from test_measures import fill, outcome

from ganomaly_plugin import load_results
from ganomaly_plugin.core import Outcome
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report import statistics
from ganomaly_plugin.report.comparisons import (
    Comparison,
    _in_range,
    _pairs,
    _scores,
    across_data_sets,
    comparison_text,
    comparisons,
    p_text,
    seed_means,
)
from ganomaly_plugin.report.costs import cost_frame, cost_markdown
from ganomaly_plugin.report.decisions import decision_reports
from ganomaly_plugin.report.frame import MEAN, runs_frame
from ganomaly_plugin.report.measures import check_fpr, measured_frame
from ganomaly_plugin.report.named_scores import by_score
from ganomaly_plugin.report.statistics import Interval, JobScores, image_interval
from ganomaly_plugin.report.tables import Cell, Reference, Table, describe_data, leaks, make_tables
from ganomaly_plugin.report.writers import (
    LATEX_ROWS,
    caption,
    reference_values,
    to_csv,
    to_json,
    to_latex,
    to_markdown,
    to_text,
)
from ganomaly_plugin.store import Store

NOTHING = Cell(math.nan, math.nan, 0, 2)


def made(cells: dict[str, dict[str, float | Cell]], **fields: Any) -> Table:
    """A table of means of two seeds, or of cells as they are."""
    built = {
        row: {column: each if isinstance(each, Cell) else Cell(each, 0.01, 2, 2) for column, each in of.items()}
        for row, of in cells.items()
    }
    columns = tuple(next(iter(built.values())))
    named: dict[str, Any] = {"dataset": "d", "protocol": "p", "metric": "auroc", "title": "AUROC, last epoch", **fields}
    return Table(rows=tuple(built), columns=columns, cells=built, **named)


def drawn(rows: int, columns: list[str], **fields: Any) -> Table:
    """A table of drawn means, the later rows higher."""
    rng = np.random.default_rng(0)
    return made({f"d{k:02}": {c: 0.3 + k / 20 + rng.uniform(0, 0.04) for c in columns} for k in range(rows)}, **fields)


def test_who_competes_and_for_what() -> None:
    assert Cell(0.5, 0.1, 2, 2).complete and not Cell(0.5, 0.1, 1, 2).complete
    assert not Cell(math.nan, math.nan, 0, 0).complete
    shared = made({"a": {"x": 0.9}, "b": {"x": 0.9}, "c": {"x": 0.8}})
    assert shared.ranks("x") == ({"a", "b"}, set())  # nobody is second to two that are first
    close = made({"a": {"x": 0.9001, MEAN: 0.9}, "b": {"x": 0.9004, MEAN: 0.9}, "c": {"x": 0.91, MEAN: 0.9}})
    assert close.average_ranks() == {"a": 2.5, "b": 2.5, "c": 1.0}  # as they are shown, to three decimals
    alone = made({"a": {"x": 0.9, MEAN: 0.9}, "b": {"x": NOTHING, MEAN: NOTHING}})
    assert alone.average_ranks() == {} and "rank" not in to_text([alone])


def test_classes_are_in_the_order_that_people_count_in() -> None:
    constant = {"dataset": "x", "data": "{}", "protocol": "p", "sampling": "{}", "seed": 0, "split_digest": "d", "key": "k"}
    rows = pd.DataFrame({"class": ["b", "10", "9", "a"], "auroc": 0.5, "detector": "m", "status": "done"})
    (table,) = make_tables(rows.assign(**constant), ["auroc"])
    assert table.columns == ("9", "10", "a", "b", MEAN)


def test_a_data_set_is_described_by_what_is_not_its_default() -> None:
    options = {"image_size": 64, "base": "textures", "subset": "mono", "kinds": "global", "seed": 0}
    sampling = json.dumps({"contamination": 0.1})
    assert (
        describe_data("synthetic_defects", json.dumps(options), sampling)
        == "synthetic_defects 64×64 kinds=global contamination=0.1"
    )


def test_a_caption_tells_how_many_seeds_there_are() -> None:
    few, many = Cell(0.5, math.nan, 1, 1), Cell(0.6, 0.1, 3, 3)
    assert caption(made({"a": {"x": few, "y": many}})) == "d, p: AUROC, last epoch; mean ± std over n = 1 to 3 seeds"
    assert caption(made({"a": {"y": many}})).endswith("; mean ± std over n = 3 seeds")
    assert caption(made({"a": {"x": few}})).endswith("; 1 seed")


def test_names_are_escaped_in_rows_and_in_columns() -> None:
    table = made({"r_1|\x1b": {"c_1|\x1b": 0.5}})
    latex, markdown = to_latex([table]), to_markdown([table])
    assert r"r\_1" in latex and r"c\_1" in latex and "r_1" not in latex and "c_1" not in latex
    assert r"r\_1\|" in markdown and r"c\_1\|" in markdown
    assert "\x1b" not in to_text([table]) + latex + markdown


def test_columns_are_level_in_wide_scripts() -> None:
    lines = to_text([made({"日本": {"欠陥": 0.5, "x": 0.25}, "e\u0301": {"欠陥": 0.5, "x": 0.75}})]).splitlines()
    ends = [cell_len(line[: line.index(word)]) for line, word in zip(lines[1:], ("x", "---", "0.250", "0.750"), strict=True)]
    assert ends[0] == ends[2] == ends[3] and cell_len(lines[2]) == max(map(cell_len, lines[1:]))


def test_a_csv_has_no_two_columns_of_one_name() -> None:
    table = made({"a": {"x": 0.1, "x_std": 0.2, "x_n": 0.3, MEAN: 0.4}})
    header, row = csv.reader(io.StringIO(to_csv([table])))
    assert len(set(header)) == len(header)
    assert [row[header.index(name)] for name in (MEAN, "x", "class x_std", "class x_n")] == ["0.4", "0.1", "0.2", "0.3"]


def test_no_two_columns_of_a_frame_or_table_share_a_name() -> None:
    records = [outcome("a", category).record for category in ("mean", "class mean", "x")]
    frame = runs_frame(replace(each, metrics={**each.metrics, "seed": 7.0, "category": 1.0}) for each in records)
    assert set(frame["seed"]) == {0} and "category" not in frame
    (table,) = make_tables(frame, ("auroc",))
    assert table.columns == ("class class mean", "class mean", "x", MEAN)


@pytest.mark.parametrize(("said", "lines"), [(6, 1), (60, 1), (61, 0), (0, 0), ("many", 0), (None, 0)])
def test_as_many_leaks_are_told_as_there_can_be(said: object, lines: int) -> None:
    record = outcome("a").record  # of 60 test images
    assert len(leaks(runs_frame([replace(record, notes={"leaked": said})]))) == lines


def test_json_has_no_number_that_is_none() -> None:
    text = to_json([made({"a": {"x": Cell(0.5, math.nan, 1, 1), "y": NOTHING}})])
    assert "NaN" not in text
    cells = json.loads(text)[0]["rows"][0]["cells"]
    assert cells == {
        "x": {"mean": 0.5, "std": None, "n": 1, "wanted": 1},
        "y": {"mean": None, "std": None, "n": 0, "wanted": 2},
    }


def test_the_literature_has_a_mean_of_all_classes_only_and_one_rule_above_it() -> None:
    some, all_ = (Reference(name, values, "s", "r") for name, values in (("some", {"x": 0.5}), ("all", {"x": 0.5, "y": 0.7})))
    table = made({"a": {"x": 0.1, "y": 0.2, MEAN: 0.15}}, references=(some, all_))
    assert reference_values(table, some) == {"x": 0.5}
    assert reference_values(table, all_) == pytest.approx({"x": 0.5, "y": 0.7, MEAN: 0.6})
    latex = to_latex([table])
    assert latex.count(r"\midrule") == 2 and "\\midrule\n\\textit{some}" in latex


def test_rows_of_two_lines_take_twice_the_room() -> None:
    wide = [f"c{k}" for k in range(7)]
    assert to_latex([drawn(LATEX_ROWS // 2, wide)]).count(r"\begin{table}") == 1
    assert to_latex([drawn(LATEX_ROWS // 2 + 1, wide)]).count(r"\begin{table}") == 2
    assert to_latex([drawn(LATEX_ROWS // 2 + 1, wide[:3])]).count(r"\begin{table}") == 1


def test_more_classes_than_a_page_is_wide_are_several_tables() -> None:
    classes = [f"c{k}" for k in range(25)]
    published = Reference("them", dict.fromkeys(classes, 0.25), "s", "r")
    table = drawn(2, [*classes, MEAN], references=(published,))
    first, *others = to_latex([table]).split(r"\begin{table}")[1:]
    assert len(others) == 2 and "continued" not in first and all(", continued}" in other for other in others)
    heads = [re.search(r"\\toprule\n(.*) \\\\", each)[1].split(" & ") for each in (first, *others)]
    assert [name for head in heads for name in head if name != "detector"] == [*classes, MEAN, "rank"]
    assert others[-1].count("0.250") == len(heads[-1]) - 2  # of each class there, and of the mean of all
    assert to_latex([drawn(2, [*classes[:11], MEAN])]).count(r"\begin{table}") == 1


def test_measures_leave_the_frame_that_they_are_given(tmp_path: Path) -> None:
    store = fill(tmp_path / "out", [outcome("a")])
    frame = runs_frame(store.records())
    assert "eer" in measured_frame(store, store.records(), ["eer"], frame=frame) and "eer" not in frame
    for rate in (0.0, 1.0):
        with pytest.raises(InvalidInput, match="fpr must lie"):
            check_fpr(rate)


@pytest.mark.parametrize(("reference", "notes"), [("held-out", 0), ("train", 1)])
def test_a_named_score_is_an_option_of_its_row(tmp_path: Path, reference: str, notes: int) -> None:
    a = outcome("a")
    named = {f"{kind}score.{name}": a.arrays[f"{kind}score"] for kind in ("", "reference_") for name in ("l", "combined")}
    job = replace(a.record.job, label="a[k=1]")
    store = fill(tmp_path / "out", [Outcome(replace(a.record, job=job, reference=reference), {**a.arrays, **named})])
    rows, said = by_score(store, store.records(), ["combined"], ["auroc"])
    assert [row.job.label for row in rows] == ["a[k=1,score_by=combined]"] and len(said) == notes
    assert by_score(store, store.records(), ["l"], ["auroc"])[1] == []


def test_costs_are_medians_and_older_records_are_counted_by_steps() -> None:
    frame = pd.DataFrame(
        {
            **{name: ["x"] * 3 for name in ("dataset", "protocol")},
            **{name: ["{}"] * 3 for name in ("data", "sampling")},
            "detector": ["a|b"] * 3,
            "status": ["done"] * 3,
            "counts.train": [50, 50, 50],
            "hparams.batch_size": [64, 64, 64],
            "notes.describe.steps": [10, 10, 10],
            "seconds.fit": [1.0, 2.0, 9.0],
        }
    )
    (row,) = cost_frame(frame).to_dict("records")
    assert (row["images_seen"], row["fit_s"], row["jobs"]) == (500, 2.0, 3)
    assert r"a\|b" in cost_markdown(cost_frame(frame))


def _with_references(folder: Path, a: Outcome, arrays: dict, size: int) -> tuple[Store, list]:
    store = fill(folder / str(size), [Outcome(a.record, {**arrays, "reference_score": np.arange(1.0, 1 + size)})])
    return store, store.records()


def test_decisions_by_hand(tmp_path: Path) -> None:
    a = outcome("a\x1b")
    arrays = {
        "is_anomaly": np.array([False, False, False, False, True, True]),
        "score": np.array([1.0, 5.0, 17.0, 30.0, 16.0, 40.0]),
        "test_index": np.arange(6),
    }
    for size, enough in ((18, False), (19, True)):
        store, records = _with_references(tmp_path, a, arrays, size)
        said = decision_reports(store, records, 0.05)
        assert ("fewer than 19 reference images" in said) is not enough and "\x1b" not in said
        assert f"({size}): {size}" in said and "false-positive rate on the test set: 0.250 (1 of 4)" in said
    assert "(fewer than 33 reference images:" in decision_reports(*_with_references(tmp_path, a, arrays, 32), 0.03)
    assert "reference images:" not in decision_reports(*_with_references(tmp_path, a, arrays, 33), 0.03)
    assert "false-positive rate on the test set: 0.500" in decision_reports(store, store.records(), 0.2)  # above 16


def test_an_interval_is_of_the_mean_over_classes_and_strata_keep_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = np.zeros(8, dtype=bool)

    def job(first: int, n: int, score: float) -> JobScores:
        """With anomalies of its class's own, all of one score beside normal images of score 0."""
        image, truth = np.r_[np.arange(8), first + np.arange(n)], np.r_[normal, np.ones(n, dtype=bool)]
        return JobScores(image, truth, score * truth)

    seen: list[tuple[int, float]] = []
    take = statistics.weighted_aurocs

    def watched(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
        seen.extend((int(truth.sum()), count) for count in weights[truth].sum(0))
        return take(truth, score, weights)

    monkeypatch.setattr(statistics, "weighted_aurocs", watched)
    interval = image_interval([[job(100, 5, 1.0)] * 3, [job(200, 9, 0.0)]], replicates=50)
    assert (interval.low, interval.high) == (0.75, 0.75)  # of 1 and ½, however many seeds each has
    assert seen and all(n == count for n, count in seen)


def test_what_comparisons_are_of(tmp_path: Path) -> None:
    samplings: list[dict[str, float]] = [{"train_fraction": 0.5}, {}]
    places = [(d, c, s) for d in "ab" for c in "01" for s in (0, 1) if (d, c, s) != ("b", "1", 1)]
    lacking = [outcome(*place, sampling=given) for place in places for given in samplings]
    results = load_results(fill(tmp_path / "out", lacking).folder)
    tables = make_tables(results.runs, ["auroc"])
    for comparison, sampling in zip(comparisons(results, tables), samplings, strict=True):
        rows = {row.detector: row for row in comparison.rows}
        assert json.loads(comparison.table.where[2]) == sampling
        assert rows["a"].images is not None and rows["b"].images is None and rows["b"].missing == "1 of 2 seeds complete"
        mine = [r for r in results.records if r.job.detector == "a" and dict(r.job.sampling) == sampling]
        wanted = [np.mean([r.metrics["auroc"] for r in mine if r.job.seed == seed]) for seed in (0, 1)]
        assert seed_means(results, comparison.table)["a"] == pytest.approx(wanted)
    assert _in_range(Interval(-0.1, 1.2, "m", 2)) == Interval(0.0, 1.0, "m", 2) and _in_range(None) is None
    assert (p_text(0.0001), p_text(0.00004)) == ("p = 0.0001", "p < 0.0001")


def test_no_p_is_zero_beside_its_correction_either() -> None:
    table = drawn(2, [*map(str, range(26)), MEAN])
    text = comparison_text(Comparison(table, (), (), tuple(_pairs(table, None)[0]), ""))
    assert "worse in 26, p < 0.0001, Holm < 0.0001" in text


def test_images_of_two_categories_are_never_the_same(tmp_path: Path) -> None:
    made_of = [outcome("a", data={"image_size": 32, "category": category}) for category in ("bottle", "cable")]
    store = fill(tmp_path / "out", made_of)
    found = _scores(store, store.records())["a"]
    assert {job.source for jobs in found.values() for job in jobs} == {"bottle", "cable"} and len(found) == 2


def test_as_many_pairs_are_tested_as_can_be_corrected_for() -> None:
    classes = [*"012345", MEAN]
    pairs, why = _pairs(drawn(10, classes), None)
    assert len(pairs) == 45 and why == ""
    pairs, why = _pairs(drawn(11, classes), None)
    assert pairs == [] and "11 detectors make too many pairs" in why
    assert len(_pairs(drawn(11, classes), "d03")[0]) == 10


def test_categories_count_as_data_sets_and_classes_do_not() -> None:
    columns = [*"abcdef", MEAN]
    tested, why = across_data_sets([drawn(3, columns, where=("anomalib:mvtec", "{}", "{}"))])
    assert tested is not None and tested.n == 6 and why == ""
    assert across_data_sets([drawn(3, columns, where=("mnist", "{}", "{}"))])[0] is None
    lower = [drawn(3, columns, where=(f"set{k}", "{}", "{}"), higher_is_better=False, metric="eer") for k in range(6)]
    tested, _ = across_data_sets(lower)
    assert tested is not None and min(tested.ranks, key=lambda name: tested.ranks[name]) == "d00"
