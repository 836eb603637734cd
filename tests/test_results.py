"""`load_results`, `bench stats` and the sample images, on made and on real results; and results that are hardly any."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_measures import fill, outcome

from ganomaly_plugin import load_results, read_images
from ganomaly_plugin.core import Outcome, RunRecord
from ganomaly_plugin.datasets.base import load_dataset
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report.groups import groups
from ganomaly_plugin.samples import KINDS, choose, sample
from ganomaly_plugin.store import Store


def failed(detector: str, category: str = "0", seed: int = 0) -> Outcome:
    job = outcome(detector, category, seed).record.job
    return Outcome(RunRecord(job, "failed", error="RuntimeError: <b>no luck</b>"))


def test_frames_and_tables(tmp_path: Path) -> None:
    made = [outcome(d, c, s, shift=x) for d, x in (("a", 0.5), ("b<i>", 2)) for c in ("0", "1") for s in (0, 1)]
    results = load_results(fill(tmp_path / "out", [*made, failed("a", "2")]).folder)
    assert len(results.runs) == 9 and set(results.runs["status"]) == {"done", "failed"}
    assert len(results.scores) == 8 * 60 and results.scores["is_anomaly"].dtype == bool
    first = results.scores[results.scores["key"] == made[0].record.job.key]
    np.testing.assert_array_equal(first["score"], made[0].arrays["score"])
    table = results.table("auroc")
    assert list(table.index) == ["a", "b<i>"] and list(table.columns) == ["0", "1", "2", "mean"]
    assert table.loc["a", "0"] == pytest.approx(np.mean([made[0].record.metrics["auroc"], made[1].record.metrics["auroc"]]))
    assert results.table("eer").loc["b<i>", "0"] < results.table("eer").loc["a", "0"]
    assert results.table(value="n").loc["a"].tolist() == [2, 2, 0, 0] and results.table(value="std").loc["a", "1"] > 0
    assert len(results.history) == 8 * 5 and list(results.history["epoch"][:5]) == [1, 2, 3, 4, 5]
    assert results.history.groupby(["detector", "class", "seed"])["loss"].min().eq(0.2).all()
    with pytest.raises(InvalidInput, match="Unknown value 'median'"):
        results.table(value="median")  # type: ignore[arg-type]
    html = results._repr_html_()
    assert "b&lt;i&gt;" in html and "<i>" not in html and "<strong>" in html and "8 jobs done, 1 failed" in html
    with pytest.raises(InvalidInput, match="0 tables of auroc are meant"):
        results.table("auroc", dataset="mnist")
    with pytest.raises(InvalidInput, match="not a results folder"):
        load_results(tmp_path)


def test_scores_name_the_file_of_each_test_image(tmp_path: Path, bench) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 20), dtype=np.uint8)
    places = [f"{kind}/{k} ü.png" for kind, n in (("train/good", 6), ("test/good", 3), ("test/mean", 3)) for k in range(n)]
    for place, image in zip(places, pixels, strict=True):
        (tmp_path / "parts" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "parts" / place)
    name = f"folder:{tmp_path / 'parts'}"
    for dataset, category in ((f"{name}[defects=each]", "mean"), ("digits", 0)):
        words = ["run", "--models", "mean_intensity", "--datasets", dataset, "--classes", category, "--image_size", 16]
        code, _, err = bench(*words, "--executor", "inline", "--data-root", tmp_path, "--out", tmp_path / "out")
        assert code == 0, err
    scores = load_results(tmp_path / "out").scores
    assert set(scores[scores["dataset"] == "digits"]["file"]) == {""}
    mine = scores[scores["dataset"] != "digits"]
    assert sorted(mine["file"]) == sorted(places[6:]) and set(mine["class"]) == {"class mean"}
    assert set(mine[mine["is_anomaly"]]["file"]) == set(places[9:])
    images = load_dataset(name, root=tmp_path, image_size=16, defects="each").images[mine["test_index"]]
    np.testing.assert_array_equal(read_images([tmp_path / "parts" / place for place in mine["file"]], (1, 16, 16)), images)


def test_labels_that_cannot_be_read_leave_figures_and_names(tmp_path: Path, bench) -> None:
    names = ["mod:Cls[mode=*.png]", "mod:Cls[mode=a, b]", "x[y]", "pca[k=1,n=2]", "pca[k=1,n=3]"]
    store = fill(tmp_path / "out", [outcome(name, shift=1.0 + k) for k, name in enumerate(names)])
    code, _, err = bench("plot", "roc", store.folder, "--out", tmp_path / "roc.pdf")
    assert code == 0, err
    assert bench("report", store.folder)[0] == 0
    assert "Cannot read" not in (store.folder / "report.html").read_text(encoding="utf-8")
    (group,) = groups(load_results(store.folder), detectors=["mod:Cls", "x[y]", "pca"])
    assert group.names() == {**{name: name for name in names[:3]}, names[3]: "pca[n=2]", names[4]: "pca[n=3]"}
    assert group.common(names) == "Short names leave out k=1." and group.common(names[:3]) == ""


@pytest.mark.parametrize("words", [["--against", "published"], ["--metrics", "eer"], ["--metrics", "auroc"]])
def test_a_report_refuses_what_it_would_leave_out(tmp_path: Path, bench, words: list[str]) -> None:
    store = fill(tmp_path / "out", [outcome("a")])
    code, out, err = bench("tables", store.folder, "--report", *words)
    assert code == 2 and not out and f"Leave out {' '.join(words)}, or --report" in err
    assert bench("tables", store.folder, "--report", "--metrics", "auroc,auprc")[0] == 0  # as without


def test_stats_say_what_they_can(tmp_path: Path, bench) -> None:
    made = [outcome(d, str(c), s, shift=x) for d, x in (("a", 1), ("b", 3), ("c", 1)) for c in range(6) for s in (0, 1)]
    store = fill(tmp_path / "out", made)
    code, out, err = bench("stats", store.folder)
    assert code == 0, err
    assert "bootstrap over test images, stratified (12 jobs)" in out and "Student's t over seeds (2 seeds)" in out
    assert "a - b: -" in out and "p = 0.0312, Holm 0.0938" in out and "no test over data sets" in out
    code, out, _ = bench("stats", store.folder, "--baseline", "b", "--metric", "fpr95")
    assert code == 0 and re.search(r"a - b: \+\d.\d+, better in 0, worse in 6", out)  # a has the higher rate
    assert "b - c" not in out and "[" not in out.split("Student")[0].split("95 %: [")[0]
    code, _, err = bench("stats", store.folder, "--baseline", "d")
    assert code == 2 and "Unknown baseline 'd'" in err
    assert bench("stats", store.folder, "--metric", "luck")[0] == 2
    for dataset in ("mnist", "digits"):
        store.put(outcome("a", dataset=dataset))
    code, out, err = bench("stats", store.folder, "--baseline", "b")
    assert code == 0 and out.count(": AUROC") == 1 and "a - b: -" in out
    here = "digits 32×32, one-anomalous/paper-v1; mnist 32×32, one-anomalous/paper-v1"
    assert err == f"left out, for they have no b: {here}\n"
    code, out, err = bench("stats", store.folder, "--baseline", "d")
    assert code == 2 and out == "" and err == "bench: error: Unknown baseline 'd'. Known: a, b, c.\n"
    for metric in ("aupro", "auroc_oracle"):  # only a job itself can take them
        code, out, err = bench("stats", store.folder, "--metric", metric)
        assert code == 2 and out == "" and f"No job has {metric}" in err and err.count("\n") == 1


def test_tables_beside_aurocs_need_no_baseline(tmp_path: Path, bench) -> None:
    a, b = outcome("a"), outcome("b")  # b has no epochs to choose from, so no row in the oracle's table
    chosen = replace(a.record, metrics={**a.record.metrics, "auroc_oracle": 0.9})
    store = fill(tmp_path / "out", [replace(a, record=chosen), b])
    code, out, err = bench("stats", store.folder, "--baseline", "b")
    assert code == 0 and err == "" and out.count(": AUROC") == 1
    code, out, err = bench("stats", store.folder, "--baseline", "b", "--metric", "auroc_oracle")
    assert code == 2 and out == "" and err == "bench: error: Unknown baseline 'b'. Known: a.\n"


def test_stats_over_data_sets(tmp_path: Path, bench) -> None:
    made = [outcome(d, "0", dataset=f"set{k}", shift=x) for d, x in (("a", 0), ("b", 2), ("c", 4)) for k in range(8)]
    code, out, _ = bench("stats", fill(tmp_path / "out", made).folder)
    assert code == 0 and "Friedman over 8 data sets" in out and "Nemenyi's critical difference 1.17" in out  # 2.343·√(12/48)
    assert "Left out" not in out
    some = [*made, *(outcome("d", "0", dataset=f"set{k}", shift=9) for k in range(7))]  # the best, but on seven of eight
    folder = fill(tmp_path / "some", some).folder
    _, out, _ = bench("stats", folder)
    assert "average ranks c" in out and "1.17. Left out, for they lack results on some data set: d." in out
    _, out, _ = bench("plot", "critical-difference", folder, "--out", tmp_path / "cd.svg")
    assert "Left out, for they lack results on some data set: d." in out
    _, out, _ = bench("stats", fill(tmp_path / "two", [one for one in some if one.record.job.detector in "ad"]).folder)
    assert "got 1 on 8" in out and "some data set: d." in out and ".." not in out
    repeated = [*made, outcome("a", "0", dataset="set0", data={"image_size": 64})]
    _, out, _ = bench("stats", fill(tmp_path / "twice", repeated).folder)
    assert "no test over data sets: set0 is here more than once" in out


def test_hardly_any_results(tmp_path: Path, bench) -> None:
    empty = Store(tmp_path / "empty", create=True).folder
    results = load_results(empty)
    assert all(frame.empty for frame in (results.runs, results.scores, results.history))
    assert results._repr_html_() == f"<p>Results(&#x27;{empty}&#x27;: 0 jobs done, 0 failed)</p>"
    only_failures = fill(tmp_path / "failed", [failed("a"), failed("b")]).folder
    for folder, text in ((empty, "no finished job (0 records)"), (only_failures, "no luck")):
        for command in ("tables", "stats"):
            code, _, err = bench(command, folder)
            assert code == 2 and text in err, err
    assert "Run the same bench run with --retry-failed." in err
    one = fill(tmp_path / "one", [outcome("a")]).folder
    code, out, _ = bench("stats", one)
    assert code == 0 and "one seed: no interval over seeds" in out and "fewer than two detectors" in out
    many = fill(tmp_path / "many", [outcome(f"d{k:02}") for k in range(60)])
    assert bench("tables", many.folder)[1].count("\nd") >= 120
    many = fill(tmp_path / "classes", [outcome(f"d{k:02}", str(c)) for k in range(11) for c in range(6)])
    code, out, _ = bench("stats", many.folder)
    assert code == 0 and "11 detectors make too many pairs to correct for; bench stats --baseline NAME" in out
    code, out, _ = bench("stats", many.folder, "--baseline", "d07")
    assert code == 0 and out.count(" - d07:") == 10
    holes = [outcome("a", "0"), outcome("a", "0", 1), outcome("a", "1"), outcome("b", "0")]
    code, out, _ = bench("stats", fill(tmp_path / "holes", holes).folder)
    assert code == 0 and "fewer than two detectors are complete" in out
    assert "1 of 2 seeds complete; one seed: no interval over seeds" in out and "no mean, for no seed has every class: b" in out
    mixed = fill(tmp_path / "mixed", [outcome("a"), outcome("a", protocol="one-anomalous/strict-v1")]).folder
    code, out, _ = bench("tables", mixed)
    assert code == 0 and "paper-v1" in out and "strict-v1" in out


def test_samples_by_hand() -> None:
    truth = np.array([False, True, False, True, False])
    chosen = choose(truth, np.array([0.0, 1.0, 2.0, 3.0, 4.0]), count=2)
    assert [list(part) for part in chosen.values()] == [[4, 3], [0, 1], [1, 3], [4, 2]] and list(chosen) == list(KINDS)


def test_samples_see_their_whole_batch() -> None:
    class Batchwise:
        has_anomaly_map = has_reconstruction = True
        hparams = {"batchnorm": "batch", "batch_size": 4}

        def anomaly_map(self, images: np.ndarray) -> np.ndarray:
            """As with batch statistics: what an image gets depends on its batch."""
            parts = [part - part.mean() for part in np.split(images.astype(float), range(4, len(images), 4))]
            return np.abs(np.concatenate(parts)).mean(1)

        def reconstruct(self, images: np.ndarray) -> np.ndarray:
            return images / 127.5 - 1

    test = np.random.default_rng(0).integers(0, 256, (30, 1, 80, 80), dtype=np.uint8)
    found = sample(Batchwise(), test, np.arange(30) < 10, np.arange(30.0))
    assert found["input"].shape == found["reconstruction"].shape == (16, 1, 64, 64) and found["map"].shape == (16, 64, 64)
    assert found["position"][0] == 29 and list(found["kind"][:5]) == [0, 0, 0, 0, 1]
    assert np.abs(found["input"].astype(int) - found["reconstruction"]).max() <= 1
    full = Batchwise().anomaly_map(test)[found["position"]]
    assert found["map_scale"] == np.float32(full.max())
    np.testing.assert_allclose(found["map"].mean((1, 2)), 255 * full.mean((1, 2)) / full.max(), atol=1.5)
    assert sample(object(), test, np.arange(30) < 10, np.arange(30.0)) == {}


def test_samples_of_a_map_below_zero_are_not_black() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 1, 16, 16), dtype=np.uint8)
    shown = []
    for least in (0.0, -400.0):  # as a log-likelihood lies where it likes
        detector = SimpleNamespace(has_anomaly_map=True, anomaly_map=lambda images, least=least: images[:, 0] / 1.0 + least)
        shown.append(sample(detector, images, np.arange(9) < 3, np.arange(9.0))["map"])
    top, bottom = int(images.max()), int(images.min())
    assert shown[1].min() == 0 and shown[1].max() == 255
    np.testing.assert_allclose(shown[1], 255 * (shown[0] * (top / 255) - bottom) / (top - bottom), atol=2)


def test_a_run_leaves_samples_and_tables_do_without(bench, tmp_path: Path) -> None:
    words = ["--classes", "0", "--hparams", "features=2,latent_dim=4", "--epochs", 1, "--out", tmp_path / "out"]
    code, _, err = bench("run", "--models", "ganomaly[batchnorm=batch],vae,mean_intensity", *words)
    assert code == 0, err
    store = Store(tmp_path / "out")
    shapes = {record.job.detector: {k: v.shape for k, v in store.images(record.job).items()} for record in store.records()}
    assert shapes["mean_intensity"] == {}
    for name in ("ganomaly", "vae"):
        assert shapes[name]["reconstruction"] == shapes[name]["input"] == (16, 1, 16, 16)
    ganomaly = next(record.job for record in store.records() if record.job.detector == "ganomaly")
    store.images_path(ganomaly).write_bytes(b"junk")
    assert bench("tables", tmp_path / "out")[0] == 0
