"""`bench merge` and `bench diff`: rows that compare go together, others are refused or explained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from test_measures import fill, outcome

from ganomaly_plugin.core import Outcome
from ganomaly_plugin.store import Store


def altered(source: Outcome, **fields: object) -> Outcome:
    """The outcome with other scores and fields of its record."""
    arrays = {**source.arrays, "score": np.asarray(source.arrays["score"]) + 1}
    return Outcome(replace(source.record, **fields), arrays)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_halves_make_the_whole(tmp_path: Path, bench) -> None:
    every = [outcome(detector, category) for detector in ("a", "b") for category in "01"]
    whole = fill(tmp_path / "whole", every)
    fill(tmp_path / "one", every[:3])
    fill(tmp_path / "two", every[2:])
    before = contents(tmp_path / "one")
    code, stdout, stderr = bench("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both")
    assert code == 0 and "4 records copied" in stderr and "1 jobs were in several" in stderr, stderr
    assert "mean" in stdout and contents(tmp_path / "one") == before
    for record in whole.records():
        assert np.array_equal(whole.scores(record.job)["score"], Store(tmp_path / "both").scores(record.job)["score"])
    assert bench("diff", tmp_path / "whole", tmp_path / "both")[:2] == (0, "4 jobs with the same scores in both\n")
    code, _, stderr = bench("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "one")
    assert code == 0 and "1 records copied" in stderr
    assert bench("diff", tmp_path / "whole", tmp_path / "one")[0] == 0


def test_labels_are_merged_as_they_were_stored(tmp_path: Path, bench) -> None:
    def one(n: int, category: str) -> Outcome:
        made = outcome("pca", category)
        return replace(made, record=replace(made.record, job=replace(made.record.job, hparams={"n": n})))

    fill(tmp_path / "one", [one(9, "0"), one(5, "0")])
    fill(tmp_path / "two", [one(5, "1")])
    assert {record.job.label for record in Store(tmp_path / "one").records()} == {"pca[n=5]", "pca[n=9]"}
    assert bench("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both")[0] == 0
    both = Store(tmp_path / "both")
    assert {record.job.label for record in both.records_as_stored()} == {"pca"}
    assert sorted(record.job.label for record in both.records()) == ["pca[n=5]", "pca[n=5]", "pca[n=9]"]


def test_other_scores_of_one_job_are_refused_or_settled(tmp_path: Path, bench) -> None:
    versions = {"versions": {"torch": "2.11.0"}}
    first = outcome("a")
    fill(tmp_path / "one", [Outcome(replace(first.record, environment={"versions": {"torch": "2.15.0"}}), first.arrays)])
    second = altered(first, environment=versions)
    fill(tmp_path / "two", [second])
    words = ("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both")
    code, _, stderr = bench(*words)
    assert code == 2 and "other scores" in stderr and "torch 2.15.0 against 2.11.0" in stderr and "--keep" in stderr
    assert not (tmp_path / "both").exists()
    code, stdout, _ = bench("diff", tmp_path / "one", tmp_path / "two")
    assert code == 1 and "other scores: 1" in stdout and "torch 2.15.0 against 2.11.0" in stdout
    for keep, kept in (("first", first), ("last", second)):
        assert bench(*words[:-1], tmp_path / keep, "--keep", keep)[0] == 0
        assert np.array_equal(Store(tmp_path / keep).scores(first.record.job)["score"], kept.arrays["score"])
    assert "must be first or last" in bench(*words, "--keep", "best")[2]


def test_other_splits_never_go_together(tmp_path: Path, bench) -> None:
    fill(tmp_path / "one", [outcome("a")])
    fill(tmp_path / "two", [altered(outcome("b"), split_digest="other")])
    for more in ((), ("--keep", "last")):
        code, _, stderr = bench("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both", *more)
        assert code == 2 and "different splits of the data" in stderr and not (tmp_path / "both").exists()
    for name, data, digest in (("old", "1", "a"), ("new", "2", "b")):  # other images, under other seeds
        sources = [outcome(detector, seed=int(data)) for detector in ("a", "b")]
        fill(tmp_path / name, [altered(source, notes={"data": data}, split_digest=digest) for source in sources])
    code, _, stderr = bench("merge", tmp_path / "old", tmp_path / "new", "--out", tmp_path / "both")
    assert code == 2 and stderr.count("made from different images") == 1 and not (tmp_path / "both").exists()
    for name, detector in (("here", "a"), ("there", "b")):  # one pair of records, and two reasons
        fill(tmp_path / name, [altered(outcome(detector), notes={"data": name}, split_digest=name)])
    code, _, stderr = bench("merge", tmp_path / "here", tmp_path / "there", "--out", tmp_path / "both")
    assert code == 2 and stderr.count("made from different") == 1
    fill(tmp_path / "three", [altered(outcome("a"), split_digest="other")])
    code, stdout, _ = bench("diff", tmp_path / "one", tmp_path / "three")
    assert code == 1 and "not comparable: 1" in stdout and "other splits" in stdout


def test_a_failure_gives_way_to_a_result(tmp_path: Path, bench) -> None:
    done = outcome("a")
    fill(tmp_path / "one", [Outcome(replace(done.record, status="failed", error="out of memory", metrics={}))])
    fill(tmp_path / "two", [done])
    assert "done against failed: out of memory" in bench("diff", tmp_path / "two", tmp_path / "one")[1]
    same = bench("diff", tmp_path / "one", tmp_path / "one")[1].splitlines()
    assert same[:2] == ["0 jobs with the same scores in both", "1 jobs failed in both"]
    for order in (("one", "two"), ("two", "one")):
        out = tmp_path / "-".join(order)
        assert bench("merge", *(tmp_path / name for name in order), "--out", out)[0] == 0
        assert [record.status for record in Store(out).records()] == ["done"]


def test_a_difference_is_explained_by_the_nearest_namesake(tmp_path: Path, bench) -> None:
    fill(tmp_path / "one", [outcome("a"), outcome("c")])
    others = [
        outcome("a", protocol="one-anomalous/strict-v1"),
        outcome("a", protocol="x", data={"image_size": 64}),
        outcome("d"),
    ]
    fill(tmp_path / "two", others)
    code, stdout, _ = bench("diff", tmp_path / "one", tmp_path / "two")
    assert code == 1 and "class 0 · seed 0: protocol one-anomalous/paper-v1 against one-anomalous/strict-v1\n" in stdout
    assert "only first: 1\n  c · " in stdout and "only second: 2\n" in stdout


def test_the_nearest_namesake_is_so_whatever_the_order_of_records(tmp_path: Path, bench) -> None:
    names = [f"d{k}" for k in range(8)]
    fill(tmp_path / "one", [outcome(name) for name in names])
    far = [outcome(name, protocol="x", data={"image_size": 64}) for name in names]
    fill(tmp_path / "two", [*far, *(outcome(name, protocol="x") for name in names)])
    stdout = bench("diff", tmp_path / "one", tmp_path / "two")[1]
    assert stdout.count(": protocol one-anomalous/paper-v1 against x\n") == 8 and "only second: 8\n" in stdout


def test_what_is_said_of_a_difference_steers_no_terminal(tmp_path: Path, bench) -> None:
    fill(tmp_path / "one", [outcome("a\x1b[31m")])
    fill(tmp_path / "two", [outcome("b")])
    assert "\x1b" not in bench("diff", tmp_path / "one", tmp_path / "two")[1]


def test_a_difference_is_told_by_settings_and_not_by_labels(tmp_path: Path, bench) -> None:
    for folder, n in (("one", 5), ("two", 9)):
        made = outcome("pca")
        job = replace(made.record.job, hparams={"n": n}, label=f"pca[n={n}]")
        fill(tmp_path / folder, [replace(made, record=replace(made.record, job=job))])
    code, stdout, _ = bench("diff", tmp_path / "one", tmp_path / "two")
    assert code == 1 and stdout.endswith(": n 5 against 9\n")


def test_the_same_scores_of_another_truth_are_another_result(tmp_path: Path, bench) -> None:
    made = outcome("a")
    fill(tmp_path / "one", [made])
    fill(tmp_path / "two", [replace(made, arrays={**made.arrays, "is_anomaly": ~made.arrays["is_anomaly"]})])
    code, stdout, _ = bench("diff", tmp_path / "one", tmp_path / "two")
    assert code == 1 and "other scores: 1" in stdout


def test_sample_images_go_along(tmp_path: Path, bench) -> None:
    made, pictures = outcome("a"), np.arange(32, dtype=np.uint8).reshape(2, 1, 4, 4)
    fill(tmp_path / "one", [replace(made, images={"input": pictures})])
    fill(tmp_path / "two", [outcome("b")])
    assert bench("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both")[0] == 0
    assert np.array_equal(Store(tmp_path / "both").images(made.record.job)["input"], pictures)


def test_long_lists_are_cut_and_the_rest_counted(tmp_path: Path, bench) -> None:
    made = [outcome("a", seed=seed) for seed in range(24)]
    fill(tmp_path / "one", made)
    fill(tmp_path / "two", [altered(each) for each in made])
    stdout = bench("diff", tmp_path / "one", tmp_path / "two")[1]
    assert "other scores: 24\n" in stdout and stdout.count("AUROC") == 20 and stdout.endswith("  and 4 more\n")
    stderr = bench("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both")[2]
    assert stderr.count("AUROC") == 3 and "; and 21 more." in stderr


def test_what_cannot_be_merged(tmp_path: Path, bench) -> None:
    fill(tmp_path / "one", [outcome("a")])
    assert "Give two or more" in bench("merge", tmp_path / "one", "--out", tmp_path / "one")[2]
    code, _, stderr = bench("merge", tmp_path / "one", tmp_path / "none", "--out", tmp_path / "both")
    assert code == 2 and "not a results folder" in stderr
    path = next((tmp_path / "one" / "scores").iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    fill(tmp_path / "two", [outcome("b")])
    code, _, stderr = bench("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both")
    assert code == 2 and "damaged" in stderr and not (tmp_path / "both").exists()


def test_sys_info(bench) -> None:
    code, stdout, _ = bench("sys-info")
    assert code == 0 and "torch" in stdout and "gpus" in stdout
    found = json.loads(bench("sys-info", "--json")[1])
    wanted = {"ganomaly-plugin", "python", "torch", "anomalib", "numpy", "commit", "platform", "cpu", "cores", "cuda", "cudnn"}
    assert wanted <= set(found) and all(found[name] for name in wanted)


def test_every_record_says_where_it_comes_from(tmp_path: Path, bench) -> None:
    words = (
        "run",
        "--models",
        "mean_intensity,crashing_detectors:Describes",
        "--classes",
        "0",
        "--seeds",
        "3",
        "--device",
        "cpu",
    )
    assert bench(*words, "--out", tmp_path / "out")[0] == 1  # one is done, one failed
    for record in Store(tmp_path / "out").records():
        around = record.environment
        assert {"ganomaly-plugin", "python", "torch", "torchvision", "anomalib", "numpy"} <= set(around["versions"])
        assert set(around["git"]) in ({"commit", "dirty"}, set()) and around["cpu"] and around["cores"] and around["platform"]
        assert around["device"] == "cpu" and {"gpu", "cuda", "cudnn", "threads"} <= set(around) and around["gpu"] is None
        assert around["command"][0] == "bench" and record.job.seed == 3 and record.job.data == {"image_size": 16}
        assert record.status == "failed" or (record.job.hparams and record.split_digest and record.counts["train"])
    assert {record.status for record in Store(tmp_path / "out").records()} == {"done", "failed"}


def test_rows_of_other_protocols_and_versions_are_said(tmp_path: Path, bench) -> None:
    made = outcome("a")
    old, new = ({"versions": {"torch": version}, "device": "cpu"} for version in ("2.11.0", "2.15.0"))
    fill(tmp_path / "one", [Outcome(replace(made.record, environment=old), made.arrays)])
    other = outcome("b", protocol="one-anomalous/strict-v1")
    fill(tmp_path / "two", [Outcome(replace(other.record, environment=new), other.arrays)])
    code, stdout, stderr = bench("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both")
    assert code == 0 and "rows were made with different versions: torch 2.11.0, 2.15.0" in stderr
    assert stdout.count("paper-v1") == stdout.count("strict-v1") == 2  # two tables each, no row beside another's
