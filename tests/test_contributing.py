"""CONTRIBUTING's two recipes, run as they are printed: one file and one line each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ganomaly_plugin.registry as registry
from ganomaly_plugin.registry import Entry

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def file_and_line(section: str) -> tuple[str, str, str, str]:
    """The example's source, and name, target and summary of its registry line."""
    part = TEXT.split(f"## {section}")[1].split("\n## ")[0]
    source, line = re.findall(r"```python\n(.*?)```", part, re.DOTALL)[:2]
    name, target, summary = re.findall(r'"([^"]*)"', line)
    return source, name, target, summary


def add(monkeypatch: pytest.MonkeyPatch, folder: Path, section: str, table: str, package: str) -> str:
    source, name, target, summary = file_and_line(section)
    module, attribute = target.split(":")
    assert source.startswith(f"# ganomaly_plugin/{module.replace('.', '/')}.py")
    (folder / f"{package}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    entry = Entry(name, f"{package}:{attribute}", summary)
    kind = "detector" if table == "DETECTORS" else "data set"
    group, builtins = registry._GROUPS[kind]
    monkeypatch.setitem(registry._GROUPS, kind, (group, (*builtins, entry)))
    return name


def test_add_a_detector_and_a_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bench) -> None:
    detector = add(monkeypatch, tmp_path, "Add a detector", "DETECTORS", "contributed_detector")
    dataset = add(monkeypatch, tmp_path, "Add a data set", "DATASETS", "contributed_data")
    code, out, _ = bench("ls", "t*")
    assert code == 0 and "a tiny reconstruction method" in out
    words = ["--models", f"{detector},mean_intensity", "--datasets", f"{dataset}[noise=0.2]", "--epochs", 30]
    code, out, err = bench("run", *words, "--out", tmp_path / "out")
    assert code == 0, err
    assert "stripes 16×16 noise=0.2" in out and "tiny[epochs=30]" in out


def test_the_example_detector_passes_the_conformance_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bench) -> None:
    detector = add(monkeypatch, tmp_path, "Add a detector", "DETECTORS", "contributed_for_suite")
    code, out, err = bench("test", detector)
    assert code == 0, out + err
