"""`bench speed` runs, says what it measured on, and writes it down. No test asserts a time."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def test_training_step_beside_the_authors_form(bench, tmp_path: Path) -> None:
    words = ["--image-size", 16, "--features", 2, "--batch-size", 4, "--repeats", 5, "--out", tmp_path / "speed.csv"]
    code, out, _ = bench("speed", *words)
    assert code == 0 and "ratio plain / authors' form" in out
    rows = pd.read_csv(tmp_path / "speed.csv")
    assert list(rows["step"]) == ["authors' form", "plain"] and (rows["median_s"] > 0).all()
    assert rows["ratio_to_authors"][0] == 1 and rows["hardware"].str.contains("threads").all()


def test_scoring_of_named_detectors(bench, tmp_path: Path) -> None:
    models = "ganomaly[features=2],anogan[features=2,search_steps=3],mean_intensity"
    words = [
        "--score",
        models,
        "--images",
        20,
        "--dataset",
        "digits",
        "--image-size",
        16,
        "--repeats",
        5,
        "--out",
        tmp_path / "score.csv",
    ]
    code, out, _ = bench("speed", *words)
    assert code == 0 and "anogan[features=2,search_steps=3]" in out
    rows = pd.read_csv(tmp_path / "score.csv")
    assert len(rows) == 3 and (rows["images_per_second"] > 0).all() and rows["time_ratio_to_first"][0] == 1
