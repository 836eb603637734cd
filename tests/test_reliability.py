"""A slice of `tests/reliability/run.py`: real kills and costs that can be counted; the script does them in earnest."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "reliability"))

import costs
import kills
import run as script
from runners import Row


def test_a_sweep_that_is_killed_again_and_again_is_the_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "MODES", {"inline": kills.MODES["inline"]})
    monkeypatch.setattr(kills, "SWEEP", (*kills.SWEEP, "--limit", "20"))
    (row,) = kills.kill_runner(tmp_path / "kills", kills=3)
    assert row.passed, row.result


def test_a_job_asks_the_system_little(tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs started, and looks through all installed packages, do not grow with the jobs."""
    calls = {"run": 0, "entry_points": 0}

    def counted(name: str, real):
        def call(*words, **options):
            calls[name] += 1
            return real(*words, **options)

        return call

    monkeypatch.setattr(subprocess, "run", counted("run", subprocess.run))
    monkeypatch.setattr(importlib.metadata.Distribution, "entry_points", property(lambda self: counted("entry_points", list)()))
    words = ("run", "--models", "tiny:Tiny", "--datasets", "digits[image_size=16]", "--seeds", "0-4", "--device", "cpu")
    assert bench(*words, "--out", tmp_path / "out")[0] == 0
    before = dict(calls)
    assert bench(*words, "--seeds", "5-9", "--out", tmp_path / "out")[0] == 0
    assert calls == before


def test_tables_of_many_records(tmp_path: Path, bench) -> None:
    costs.many_records(tmp_path / "out", 300)
    code, stdout, _ = bench("tables", tmp_path / "out")
    assert code == 0 and "n = 100 seeds" in stdout


def test_tables_import_no_scikit_learn_and_no_torch(tmp_path: Path) -> None:
    """They took a second each before a record was read."""
    costs.many_records(tmp_path / "out", 20)
    code = "from ganomaly_plugin.cli import main; main(); import sys; print({'torch', 'sklearn'} & {*sys.modules})"
    words = [sys.executable, "-c", code, "tables", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_table_keeps_the_rows_of_other_checks(tmp_path: Path) -> None:
    out = tmp_path / "reliability"
    row = Row("kills", 3, "fine", "fine", True)
    script.write(out, "kill-runner", [row], 1.0)
    (out / "README.md").write_text((out / "README.md").read_text().replace("# Reliability", "# Reliability\n\nwords before"))
    script.write(out, "theirs", [Row("Ray", 1, "lost", "kept", False)], 2.0)
    script.write(out, "kill-runner", [Row("kills", 4, "fine", "fine", True)], 1.0)
    text = (out / "README.md").read_text()
    assert (
        "words before" in text
        and "| kills | 4 | fine | fine | ok |" in text
        and "| Ray | 1 | lost | kept | **missed** |" in text
    )
    assert text.count("kills") == 1 and text.index("kills") < text.index("Ray") < text.index("<!-- end -->")
