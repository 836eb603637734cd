"""What detectors say of themselves: what is odd fails one job, and never the sweep or its folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import blobs

from ganomaly_plugin import load_detector, make_detector
from ganomaly_plugin.errors import CorruptFile, InvalidInput
from ganomaly_plugin.store import Store

SWEEP = ["--datasets", "digits", "--image-size", 16, "--classes", "0", "--seeds", 0, "--executor", "inline"]

ODD = {
    "DescribesNone": "describe() returned a NoneType",
    "DescribesBytes": "holds what a record cannot",
    "RaisesBytes": r"no such file: w-\udce9.bin",
    "WritesHistory": "history_ must be a list with a dict of numbers",
    "HasNoHistory": "history_ must be a list with a dict of numbers",
    "NamesOthers": "Return the same names for all images",
    "NamesShort": "score 'short' returned scores of shape (3,)",
    "NamesNan": "scores that are not finite",
    "NamesObjects": "score 'objects' returned scores of type",
    "NamesNumbers": "a dict whose keys are not text",
}


def test_odd_facts_fail_their_own_job(bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    models = ",".join(f"odd_detectors:{name}" for name in (*ODD, "NamesLists", "MapsNothing"))
    assert bench("run", "--models", f"{models},pca", *SWEEP, "--out", out)[0] == 1
    records = {record.job.detector.partition(":")[2] or "pca": record for record in Store(out).records()}
    assert {name for name, record in records.items() if record.status == "done"} == {"pca", "NamesLists", "MapsNothing"}
    for name, words in ODD.items():
        assert words in (records[name].error or ""), records[name].error
    assert "samples" in records["MapsNothing"].notes and not Store(out).images(records["MapsNothing"].job)
    for words in (["tables", out, "--scores", "all"], ["report", out, "--out", tmp_path / "report.html"]):
        assert bench(*words)[0] == 0


def test_a_file_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    fitted = make_detector("odd_detectors:KeepsArrays").fit(blobs(8), seed=0)
    with pytest.raises(InvalidInput, match="give tensors and plain values"):
        fitted.save(tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())
    pipe = tmp_path / "pipe"  # as /dev/null is none, which root would replace if this went wrong
    os.mkfifo(pipe)
    with pytest.raises(InvalidInput, match="it is not a file"):
        make_detector("pca").fit(blobs(8), seed=0).save(pipe)
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_no_damaged_file_is_loaded(tmp_path: Path) -> None:
    images, path = blobs(40), tmp_path / "model.pt"
    fitted = make_detector("knn").fit(images, seed=0)
    fitted.save(path)
    content, score, rng = path.read_bytes(), fitted.score(images), np.random.default_rng(0)
    refused = 0
    for at in rng.integers(0, len(content), 60):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << int(at % 8)]) + content[at + 1 :])
        try:
            np.testing.assert_array_equal(load_detector(path).score(images), score)  # a byte that says nothing
        except CorruptFile:
            refused += 1
    assert refused > 30
