"""Mutated records, score files and configs: a refusal in one line, or the numbers that were stored; never a traceback.

A few examples here; `pytest tests/test_fuzz.py -m fuzz` tries 10,000 of each kind (2,000 records of format 1), for minutes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_measures import fill, outcome

from ganomaly_plugin.cli import main
from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.errors import BenchError, CorruptFile
from ganomaly_plugin.integrity import sealed
from ganomaly_plugin.report.frame import runs_frame
from ganomaly_plugin.report.tables import leaks
from ganomaly_plugin.report.writers import WRITERS, tables_of
from ganomaly_plugin.store import Store, read_record

EXAMPLES = [
    pytest.param(25, id="few"),
    pytest.param(10_000, marks=pytest.mark.fuzz, id="many"),
]
PUBLISHED = Path(__file__).parent.parent / "results" / "mnist_vae"


def explore(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Run `check` on `examples` draws of `strategy`, the same ones each time."""
    quiet = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    quiet(given(strategy)(check))()


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(
        ["", "0.9", "nan", "done", "failed", "digits", "os:system", "\x1b[31m", "=1+1", "../x", "a,b", "é", "[", "{x}"]
    ),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a JSON value but the whole."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*where, key)
        yield from places(part, (*where, key))


def near(value: Any) -> st.SearchStrategy[Any]:
    """Slips: another digit, another sign, another word."""
    if isinstance(value, bool) or value is None:
        return SCALARS
    if isinstance(value, (int, float)):
        return st.sampled_from([value + 1, -value, value / 2, value * (1 + 1e-6), str(value)])
    return st.just(value[:-1]) if isinstance(value, str) and value else SCALARS


@st.composite
def mutations(draw: st.DrawFn, original: dict[str, Any]) -> Any:
    """`original` with one to three parts replaced, removed, doubled or exchanged."""
    content = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(content))
        if not paths:
            break
        *way, key = draw(st.sampled_from(paths))
        holder = content
        for step in way:
            holder = holder[step]
        kind = draw(st.sampled_from(["near", "any", "remove", "add", "swap"]))
        if kind == "near":
            holder[key] = draw(near(holder[key]))
        elif kind == "any":
            holder[key] = draw(VALUES)
        elif kind == "remove":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["auroc", "files", "key", "x", "checksum", "detector"]) | st.text(max_size=4))] = draw(
                VALUES
            )
        else:
            other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
            holder[key], holder[other] = holder[other], holder[key]
    return content


@st.composite
def damages(draw: st.DrawFn, original: bytes) -> bytes:
    """`original` with bytes changed, lost, doubled or cut off."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "double", "insert"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + draw(st.integers(1, 40))]
        elif kind == "double":
            content[at:at] = content[at : at + 40]
        else:
            content[at:at] = draw(st.binary(max_size=8))
    return bytes(content)


def told(record: RunRecord) -> tuple[Any, ...]:
    """All that tables take from a record."""
    return record, record.files, record.job.label


def same(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return fill(tmp_path_factory.mktemp("fuzz") / "out", [outcome("a"), outcome("b", shift=2.0)])


def run(*words: object) -> tuple[int, str]:
    """`bench` in this process; its exit code and what it says on stderr. An exception is the test's failure."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in words])
    return code, said.getvalue()


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_mutated_record_is_refused_or_the_same(stored: Store, examples: int) -> None:
    path = stored.record_path(outcome("a").record.job)
    original, whole = json.loads(path.read_bytes()), told(read_record(path))

    def check(content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with replaced(path, data):
            try:
                record = read_record(path)
            except CorruptFile as error:
                assert "\n" not in str(error)
                return
            assert told(record) == whole

    explore(examples, mutations(original) | damages(path.read_bytes()), check)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_record_of_somebody_elses_making_never_breaks_a_command(stored: Store, examples: int) -> None:
    """With a checksum that fits: whoever makes one can lie, but not crash what reads it."""
    path = stored.record_path(outcome("a").record.job)
    original = {name: value for name, value in json.loads(path.read_bytes()).items() if name != "checksum"}
    original["notes"]["leaked"] = 1

    def check(content: Any) -> None:
        try:
            data = sealed(content)
        except ValueError:  # not a finite number: no reader accepts it either
            data = json.dumps(content).encode()
        with replaced(path, data):
            try:
                frame = runs_frame(stored.records())
                tables, _ = tables_of(frame), leaks(frame)
            except BenchError as error:
                assert "\n" not in str(error)
                return
            for write in WRITERS.values():
                write(tables)

    explore(examples, mutations(original), check)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_mutated_record_of_format_1_keeps_its_numbers(tmp_path: Path, examples: int) -> None:
    """Held to its key and its scores: metrics, job, counts and label. Its seconds and notes have no second witness."""
    published = sorted((PUBLISHED / "records").glob("*.json"))[0]
    path, scores = tmp_path / "records" / published.name, tmp_path / "scores" / f"{published.stem}.npz"
    for copy_of, at in ((published, path), (PUBLISHED / "scores" / scores.name, scores)):
        at.parent.mkdir()
        shutil.copy(copy_of, at)
    original, whole = json.loads(path.read_bytes()), read_record(path)
    shown = {name: (original[name]) for name in ("job", "metrics", "counts", "status")}

    def check(content: Any) -> None:
        if not isinstance(content, dict) or content.get("format") != 1:
            return
        with replaced(path, json.dumps(content).encode()):
            try:
                record = read_record(path)
            except CorruptFile as error:
                assert "\n" not in str(error)
                return
        if record.status == "failed":  # it says that there is no number
            return
        assert record.job == whole.job and {n: record.metrics[n] for n in shown["metrics"]} == dict(whole.metrics)
        for name in ("test_normal", "test_anomalous", "reference"):
            assert record.counts.get(name, whole.counts[name]) == whole.counts[name]

    explore(min(examples, 2000), mutations(original), check)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_mutated_scores_are_refused_or_the_same(stored: Store, examples: int) -> None:
    job = outcome("a").record.job
    path, record_path, whole = stored.scores_path(job), stored.record_path(job), stored.scores(job)
    unvouched = json.loads(record_path.read_bytes()) | {"files": {}}
    unvouched.pop("checksum")

    def check(content: bytes) -> None:
        with replaced(path, content):
            try:
                found = stored.scores(job)
            except CorruptFile as error:
                assert "\n" not in str(error)
            else:
                assert content == whole_bytes and all(np.array_equal(found[name], whole[name]) for name in whole)
            with replaced(record_path, sealed(unvouched)), contextlib.suppress(CorruptFile):  # no digest: no crash all the same
                stored.scores(job)

    whole_bytes = path.read_bytes()
    explore(examples, damages(whole_bytes), check)


CONFIG: dict[str, Any] = {
    "models": [
        "mean_intensity",
        "pca[n_components=3]",
        {"name": "knn", "options": {"k": 2}},
        {"class_path": "anomalib.models.Padim"},
    ],
    "datasets": ["digits", {"name": "digits", "options": {"image_size": 16}}],
    "protocols": ["one-anomalous/strict-v1"],
    "classes": ["0", 1],
    "seeds": "0-1",
    "epochs": 2,
    "image_size": 16,
    "hparams": {"n_components": 4},
    "train_fraction": 0.5,
    "contamination": 0.1,
    "limit": 3,
    "out": "results/x",
    "device": "cpu",
    "retries": 1,
    "timeout": 5.0,
}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_mutated_config_is_refused_in_one_line_or_runs_dry(tmp_path: Path, examples: int, monkeypatch) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    # jsonargparse asks who called it, by looking up the source of every frame: of pytest and Hypothesis a hundred, 0.4 s.
    monkeypatch.setattr(inspect, "stack", lambda: [(sys._getframe(1),), (sys._getframe(2),)])
    config, plain = tmp_path / "sweep.yaml", {**CONFIG, "models": CONFIG["models"][:3]}

    def check(content: Any) -> None:
        text = content if isinstance(content, bytes) else yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "replace")
        config.write_bytes(text)
        code, said = run("run", "--config", config, "--limit", "3", "--dry-run")
        assert code in (0, 2), said
        assert code == 0 or (said.startswith("bench: error: ") and said.count("\n") == 1), said
        assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]

    explore(examples, mutations(plain) | mutations(CONFIG) | damages(yaml.safe_dump(plain).encode()), check)
