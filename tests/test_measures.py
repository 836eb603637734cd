"""Measures from stored scores, by hand and against scikit-learn; average ranks; the literature beside ours."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, roc_curve

from ganomaly_plugin.core import Job, Outcome, RunRecord
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.metrics import auprc, auroc, equal_error_rate, f1_at, fpr_at_tpr, threshold_at
from ganomaly_plugin.report.measures import measured_frame
from ganomaly_plugin.report.published import against_published, published_frame
from ganomaly_plugin.report.tables import make_tables, summarise
from ganomaly_plugin.report.writers import WRITERS, to_json
from ganomaly_plugin.store import Store

TRUTH = np.array([False] * 4 + [True] * 4)
SCORE = np.array([1.0, 2.0, 3.0, 6.0, 2.5, 5.0, 7.0, 8.0])


def outcome(
    detector: str,
    category: str = "0",
    seed: int = 0,
    *,
    dataset: str = "cifar10",
    protocol: str = "one-anomalous/paper-v1",
    shift: float = 1.0,
    n: int = 60,
    sampling: dict | None = None,
    data: dict | None = None,
) -> Outcome:
    """A finished job with drawn scores: anomalies lie `shift` standard deviations above normal images."""
    job = Job(detector, {}, dataset, data or {"image_size": 32}, protocol, category, seed, 15, sampling or {}, label=detector)
    rng = np.random.default_rng([int(job.key[:8], 16)])
    truth = np.arange(n) < n // 3
    score = rng.normal(shift * truth, 1.0)
    arrays = {"score": score, "is_anomaly": truth, "test_index": np.arange(n), "reference_score": rng.normal(size=200)}
    counts = {"train": 100, "train_anomalous": 0, "reference": 200, "test_normal": n - n // 3, "test_anomalous": n // 3}
    record = RunRecord(
        job,
        "done",
        metrics={"auroc": auroc(truth, score), "auprc": auprc(truth, score)},
        counts=counts,
        seconds={"fit": 2.0 + seed, "score": 0.1},
        split_digest=f"{category}-{seed}",
        reference="held-out",
        history=[{"loss": 1.0 / (k + 1)} for k in range(5)],
    )
    return Outcome(record, arrays)


def fill(folder: Path, outcomes: list[Outcome]) -> Store:
    store = Store(folder, create=True)
    for each in outcomes:
        store.put(each)
    return store


def test_measures_by_hand() -> None:
    # 95 % of four anomalies are all four: the threshold falls to 2.5, and 3 and 6 of the four normals lie above it.
    assert fpr_at_tpr(TRUTH, SCORE) == 0.5
    assert fpr_at_tpr(TRUTH, SCORE, 0.75) == 0.25
    # At a threshold between 3 and 5 one normal in four is called anomalous and one anomaly in four is missed.
    assert equal_error_rate(TRUTH, SCORE) == 0.25
    assert f1_at(TRUTH, SCORE, 4.0) == pytest.approx(2 * 0.75 * 0.75 / 1.5)
    assert f1_at(TRUTH, SCORE, 99.0) == 0.0
    assert equal_error_rate(TRUTH, TRUTH.astype(float)) == 0.0 and equal_error_rate(TRUTH, -TRUTH.astype(float)) == 1.0
    assert equal_error_rate(TRUTH, np.zeros(8)) == pytest.approx(0.5)


def test_the_threshold_is_a_conformal_quantile_of_the_reference() -> None:
    reference = np.random.default_rng(0).permutation(np.arange(1.0, 20.0))  # a twentieth of 20 and each more is above it
    assert [threshold_at(reference, rate) for rate in (0.01, 0.05, 0.06, 0.1, 0.5, 0.99)] == [19, 19, 19, 18, 10, 1]
    assert threshold_at(np.arange(1.0, 10.0), 0.7) == 3  # 10 · (1 - 0.7) is 3.0000000000000004
    assert f1_at(TRUTH, SCORE, 2.5) == pytest.approx(2 * 3 / (5 + 4))  # a score at the threshold is not above it
    for rate, scores in ((0.0, reference), (1.0, reference), (0.1, reference[:0])):
        with pytest.raises(InvalidInput):
            threshold_at(scores, rate)


def test_measures_against_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        truth = rng.random(200) < 0.3
        score = np.round(rng.normal(truth, 1), 1)  # with ties
        false_positive, true_positive, thresholds = roc_curve(truth, score, drop_intermediate=False)
        assert fpr_at_tpr(truth, score) == false_positive[true_positive >= 0.95].min()
        grid = np.linspace(0, 1, 100_001)
        curve = np.interp(grid, false_positive, true_positive)
        assert equal_error_rate(truth, score) == pytest.approx(grid[np.argmin(np.abs(grid - (1 - curve)))], abs=2e-5)
        assert f1_at(truth, score, thresholds[20]) == pytest.approx(f1_score(truth, score > thresholds[20]))


def test_scores_alone_give_every_measure(tmp_path: Path) -> None:
    store = fill(tmp_path / "out", [outcome("a"), outcome("b", shift=2.0)])
    records = store.records()
    frame = measured_frame(store, records, ["auroc", "f1", "fpr95", "eer"], fpr=0.1)
    for record, row in zip(records, frame.to_dict("records"), strict=True):
        arrays = store.scores(record.job)
        assert row["auroc"] == auroc(arrays["is_anomaly"], arrays["score"])
        threshold = threshold_at(arrays["reference_score"], 0.1)
        assert row["f1"] == pytest.approx(f1_score(arrays["is_anomaly"], arrays["score"] > threshold))
    tables = make_tables(frame, ["f1", "eer"], fpr=0.1)
    assert "rate of 0.1 on held-out normal images" in tables[0].title
    assert "on train normal images" in make_tables(frame.assign(reference="train"), ["f1"])[0].title  # as under paper-v1
    eer = tables[1]
    assert eer.ranks("0")[0] == {"b"} and eer.cells["b"]["0"].mean < eer.cells["a"]["0"].mean  # lower is better
    assert eer.average_ranks() == {"b": 1.0, "a": 2.0}
    with pytest.raises(InvalidInput, match="Unknown metric 'f2'"):
        measured_frame(store, records, ["f2"])
    with pytest.raises(InvalidInput, match="fpr must lie"):
        measured_frame(store, records, ["f1"], fpr=0)


def test_average_ranks_by_hand() -> None:
    values = {"a": (0.9, 0.8, 0.7), "b": (0.8, 0.8, 0.9), "c": (0.1, 0.1, None)}
    rows = [
        {"detector": name, "class": str(k), "auroc": value, "status": "failed" if value is None else "done"}
        for name, each in values.items()
        for k, value in enumerate(each)
    ]
    constant = {"dataset": "x", "data": "{}", "protocol": "p", "sampling": "{}", "seed": 0, "split_digest": "d", "key": "k"}
    (table,) = make_tables(pd.DataFrame(rows).assign(**constant), ["auroc"])
    assert table.average_ranks() == {"a": pytest.approx((1 + 1.5 + 2) / 3), "b": pytest.approx((2 + 1.5 + 1) / 3)}
    text = WRITERS["text"]([table])
    assert "rank" in text and "1.50" in text and text.splitlines()[-1].endswith("–")  # c failed once: it has no rank


def test_several_data_sets_are_summarised(tmp_path: Path) -> None:
    outcomes = [outcome(d, c, dataset=s, shift=x) for d, x in (("a", 1), ("b", 3)) for c in "01" for s in ("one", "two")]
    store = fill(
        tmp_path / "out", [*outcomes, outcome("only_one", "0", dataset="one"), outcome("only_one", "1", dataset="one")]
    )
    tables = make_tables(measured_frame(store, store.records(), ["auroc"]), ["auroc"])
    (summary,) = summarise(tables)
    assert summary.columns == ("one 32×32", "two 32×32") and summary.average_ranks() == {"a": 2.0, "b": 1.0}
    assert summary.cells["a"]["one 32×32"].mean == tables[0].cells["a"]["mean"].mean
    assert summary.cells["only_one"]["two 32×32"].n == 0
    for write in WRITERS.values():
        assert "only" in write([summary])
    assert summarise(tables[:1]) == []
    same = [replace(table, dataset="one") for table in tables]
    assert summarise(same)[0].columns == ("one (1)", "one (2)")
    assert summarise(same)[0].cells["a"]["one (2)"] == summary.cells["a"]["two 32×32"]


def test_published_numbers_stand_beside_and_take_no_part(tmp_path: Path, bench) -> None:
    classes = ["bird", "frog"]
    store = fill(tmp_path / "out", [outcome(d, c) for d in ("ganomaly", "pca") for c in classes])
    plain = make_tables(measured_frame(store, store.records(), ["auroc"]), ["auroc"])
    (table,) = against_published(plain)
    assert table.average_ranks() == plain[0].average_ranks() and table.ranks("mean") == plain[0].ranks("mean")
    by_label = {reference.label: reference for reference in table.references}
    assert dict(by_label["GANomaly (published)"].values) == {"bird": 0.510, "frog": 0.683}
    assert "pixels" not in by_label["GANomaly (published)"].source
    (larger,) = against_published([replace(table, where=(table.where[0], '{"image_size":64}', "{}"), references=())])
    assert all(", at 32 pixels, epoch: " in reference.source for reference in larger.references)
    code, out, err = bench("tables", store.folder, "--against", "published", "--metrics", "auroc")
    assert code == 0, err
    assert "Skip-GANomaly (published)" in out and "0.931" in out and "recalled" in out and "take no part in ranks" in out
    content = json.loads(to_json([table]))
    assert content[0]["published"][2]["values"]["mean"] == pytest.approx((0.510 + 0.683) / 2)
    assert {row["detector"] for row in content[0]["rows"]} == {"ganomaly", "pca"}
    for form in ("csv", "latex", "md"):
        assert "GANomaly (published)" in bench("tables", store.folder, "--against", "published", "--format", form)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "one-anomalous/strict-v1"}, "are of protocol one-anomalous/paper-v1, these results of one-anomalous/str"),
        ({"dataset": "digits"}, "No published numbers for the data sets here: digits"),
        ({"sampling": {"train_fraction": 0.2}}, "part of the data"),
        ({"category": "unicorn"}, "No published numbers for these classes"),
    ],
)
def test_published_numbers_are_refused(tmp_path: Path, bench, changes: dict, message: str) -> None:
    store = fill(tmp_path / "out", [outcome("ganomaly", **{"category": "bird", **changes})])
    code, _, err = bench("tables", store.folder, "--against", "published")
    assert code == 2 and message in err, err


def test_tables_of_other_protocols_are_named(tmp_path: Path, bench) -> None:
    made = [outcome("ganomaly", "bird", protocol=f"one-anomalous/{p}") for p in ("paper-v1", "strict-v1")]
    store = fill(tmp_path / "out", made)
    code, out, err = bench("tables", store.folder, "--against", "published", "--format", "csv")
    assert code == 0 and err.count("are not put beside these") == 1 and "strict-v1: published numbers are of" in err
    frame = pd.read_csv(io.StringIO(out), dtype=str)
    assert set(frame["seeds"].dropna()) == {"1"} and frame["source"].notna().sum() == 4
    assert set(frame[frame["source"].notna()]["protocol"]) == {"one-anomalous/paper-v1"}


def test_measures_that_no_job_took(tmp_path: Path, bench) -> None:
    store = fill(tmp_path / "out", [outcome("ganomaly", "bird")])
    code, _, err = bench("tables", store.folder, "--metrics", "aupro,pixel_auroc")
    assert code == 2 and "No job has aupro, pixel_auroc: it is taken while a job runs" in err
    code, out, err = bench("tables", store.folder, "--metrics", "aupro,eer")
    assert code == 0 and out.count("detector") == 1 and "equal error rate" in out and "no job has aupro" in err


def test_published_needs_auroc(tmp_path: Path, bench) -> None:
    store = fill(tmp_path / "out", [outcome("ganomaly", "bird")])
    code, _, err = bench("tables", store.folder, "--against", "published", "--metrics", "f1")
    assert code == 2 and "Published numbers are AUROCs" in err
    code, _, err = bench("tables", store.folder, "--against", "folklore")
    assert code == 2 and "published" in err


def test_published_data_are_whole() -> None:
    frame = published_frame()
    assert frame["auroc"].between(0, 1).all() and not frame.duplicated(["method", "dataset", "class"]).any()
    assert (frame[["source", "reliability", "epoch"]] != "").all().all()
    assert len(frame[frame["dataset"] == "cifar10"]) == 40 and len(frame[frame["dataset"] == "mnist"]) == 20
    vae = frame[frame["dataset"] == "mnist"]
    assert {*vae["image_size"], *vae["epoch"]} == {"28", "50"} and vae["source"].str.contains("official split").all()
