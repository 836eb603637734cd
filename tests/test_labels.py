"""Rows of tables: one name for one way of making a detector, whatever its records call it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganomaly_plugin.config import Experiment, expand
from ganomaly_plugin.core import Job, RunRecord
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.labels import distinctly_labelled
from ganomaly_plugin.report.frame import runs_frame
from ganomaly_plugin.report.tables import make_tables
from ganomaly_plugin.selection import Selection, parse_label, parse_seeds, parse_selection, show, split_list

MARKS = st.text(alphabet="ab1e.-'\"[]{}(),:=#*&%@!|>?~ \\\n", max_size=8)
TEXT = (
    MARKS | st.text(max_size=8) | st.sampled_from(["yes", "null", "None", "1e-4", "1:30", "2026-02-30", "a, b", "*.png", "<<"])
)
SCALARS = TEXT | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=4
)


def record(auroc: float, label: str = "ae[lr=0.5]", protocol: str = "one-anomalous/strict-v1", **hparams: object) -> RunRecord:
    job = Job("ae", hparams, "toy_set", {"image_size": 16}, protocol, "x", 0, 3, label=label)
    return RunRecord(job, "done", metrics={"auroc": auroc, "auprc": auroc}, split_digest=protocol)


def test_settings_that_a_label_leaves_out_make_rows_of_their_own() -> None:
    old, new = record(0.9, lr=0.5, width=16), record(0.5, lr=0.5, width=32, extra=1)  # a default changed in between
    named = distinctly_labelled([old, new])
    assert [each.job.label for each in named] == ["ae[lr=0.5,width=16]", "ae[extra=1,lr=0.5,width=32]"]
    assert [each.job.key for each in named] == [old.job.key, new.job.key]
    (table,) = make_tables(runs_frame(named), ("auroc",))
    assert [table.cells[row]["x"].mean for row in table.rows] == [0.5, 0.9]  # and no row of 0.7
    longer = replace(old, job=replace(old.job, epochs=4))
    assert [each.job.label for each in distinctly_labelled([old, longer])] == ["ae[epochs=3,lr=0.5]", "ae[epochs=4,lr=0.5]"]


def test_a_label_that_settings_make_may_be_that_of_others() -> None:
    three = [record(0.9, "ae", x=2, y=1), record(0.5, "ae", x=3, y=1), record(0.1, "ae[x=2]", x=2, y=5)]
    labels = [each.job.label for each in distinctly_labelled(three)]
    assert labels == ["ae[x=2,y=1]", "ae[x=3]", "ae[x=2,y=5]"]


def test_labels_stay_where_they_tell_settings_apart() -> None:
    alike = [record(0.9, batchnorm="running"), record(0.8, protocol="one-anomalous/paper-v1", batchnorm="batch")]
    assert distinctly_labelled([*alike, *alike]) == [*alike, *alike]
    assert {each.job.label for each in distinctly_labelled(alike)} == {"ae[lr=0.5]"}


def test_a_label_names_what_differs_from_the_protocol(tmp_path: Path, bench) -> None:
    words = ["--datasets", "digits", "--classes", "0", "--out", tmp_path / "out", "--dry-run"]
    models = "ganomaly,ganomaly[batchnorm=running],ganomaly[batchnorm=batch]"
    _, stdout, _ = bench("run", "--models", models, "--protocols", "one-anomalous/paper-v1", *words)
    assert [line.split(" · ")[0].split()[1] for line in stdout.splitlines()[:-1]] == ["ganomaly", "ganomaly[batchnorm=running]"]
    _, stdout, _ = bench("run", "--models", models, *words)
    assert [line.split(" · ")[0].split()[1] for line in stdout.splitlines()[:-1]] == ["ganomaly", "ganomaly[batchnorm=batch]"]


def test_a_score_calibrated_on_normal_images_keeps_running_statistics() -> None:
    models = [Selection("ganomaly_plus"), Selection("ganomaly_plus", {"batchnorm": "batch"}), Selection("ganomaly")]
    experiment = Experiment(models, [Selection("digits")], ["one-anomalous/paper-v1"], ["0"], image_size=16)
    statistics = {job.label: job.hparams["batchnorm"] for job in expand(experiment)}
    assert statistics == {"ganomaly_plus": "running", "ganomaly_plus[batchnorm=batch]": "batch", "ganomaly": "batch"}


def test_a_label_names_a_budget_that_is_not_the_methods_own(tmp_path: Path, bench) -> None:
    models = "ganomaly_plus,ganomaly_plus[epochs=15],ganomaly_plus[steps=200],ganomaly,ganomaly[epochs=15]"
    words = ["--datasets", "digits", "--classes", "0", "--out", tmp_path / "out", "--dry-run"]
    _, stdout, _ = bench("run", "--models", models, *words)
    names = [line.split(" · ")[0].split()[1] for line in stdout.splitlines()[:-1]]
    assert names == ["ganomaly_plus", "ganomaly_plus[epochs=15]", "ganomaly"]


@pytest.mark.parametrize("value", [1e-4, 0.5, 50.0, 0.12345678, 1234567.0, 1e-300, 2 / 3])
def test_a_label_reads_back_as_it_was(value: float) -> None:
    assert parse_selection(show("ae", {"lr": value}), "model").options["lr"] == value


@settings(max_examples=200, deadline=None)
@given(TEXT.filter(lambda name: name and not name.endswith(":")), st.dictionaries(st.sampled_from("abc"), VALUES))
def test_any_label_reads_back_as_it_was(name: str, options: dict[str, object]) -> None:
    assert parse_selection(show(name, options), "model") == Selection(name, options)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"mode": "*.png", "lr": 1e-4}, 'ae[lr=0.0001,mode="*.png"]'),
        ({"mode": "a, b"}, 'ae[mode="a, b"]'),
        ({"mode": "1"}, 'ae[mode="1"]'),
        ({"x": {"a": 1, "b": 2}, "y": None}, "ae[x={'a': 1, 'b': 2},y=None]"),
        ({"a": "it's", "b": "'", "c": "it's"}, """ae[a=it's,b="'",c=it's]"""),
        ({"a": True, "b": "batch", "c": [-1, 1], "d": "b{1}", "e": "c)"}, "ae[a=true,b=batch,c=[-1, 1],d=b{1},e=c)]"),
    ],
)
def test_labels_have_quotes_only_where_they_need_them(options: dict[str, object], label: str) -> None:
    assert show("ae", options) == label and parse_selection(label, "model") == Selection("ae", options)
    assert show("x[y]", {"lr": 1}) == '"x[y]"[lr=1]'


def test_lists_are_split_outside_quotes_brackets_and_braces() -> None:
    assert split_list("""a[x="b],"],'c, d', it's,{"k":{"l":1,"m":2},"n":3},,e""") == [
        """a[x="b],"]""",
        "'c, d'",
        "it's",
        """{"k":{"l":1,"m":2},"n":3}""",
        "e",
    ]


@pytest.mark.parametrize("text", ["x=2026-02-30", 'x="\\q"'])
def test_values_that_are_not_yaml_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="Cannot read the value of"):
        parse_selection(f"ae[{text}]", "model")
    with pytest.raises(InvalidInput, match="without quotes"):
        parse_selection('"\\q"', "model")


def test_labels_from_before_quotes_are_told_apart_too() -> None:
    old = "ae[mode=*.png]"
    assert parse_label(old) == Selection(old)
    named = distinctly_labelled([record(0.9, old, width=16), record(0.5, old, width=32)])
    assert [each.job.label for each in named] == ['"ae[mode=*.png]"[width=16]', '"ae[mode=*.png]"[width=32]']


def test_categories_have_images_of_their_own_and_others_do_not() -> None:
    first = replace(record(0.9), notes={"data": "a"}, split_digest="1")
    other = replace(first, job=replace(first.job, seed=1), notes={"data": "b"}, split_digest="2")
    with pytest.raises(InvalidInput, match="were made from different images"):
        make_tables(runs_frame([first, other]))
    named = [
        replace(each, job=replace(each.job, category="anomaly", data={**each.job.data, "category": name}))
        for each, name in ((first, "bottle"), (other, "zipper"))
    ]
    assert make_tables(runs_frame(named))[0].columns == ("bottle", "zipper", "mean")
    old = replace(other, notes={})  # from before records told
    assert make_tables(runs_frame([first, old]))[0].columns == ("x", "mean")


def test_seeds_are_ranges_and_each_counts_once() -> None:
    assert parse_seeds("1,0-2, 7 - 8") == [1, 0, 2, 7, 8] and parse_seeds([3, "3-4"]) == [3, 4]
    assert len(parse_seeds("0-9999")) == 10_000
    with pytest.raises(InvalidInput, match="has 10001 seeds; at most 10,000"):
        parse_seeds("0-10000")
