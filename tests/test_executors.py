"""Executors: the same records from each, and what a crash, a kill, a hang, Ctrl-C or a second runner does to a sweep."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from ganomaly_plugin.claims import Claims
from ganomaly_plugin.config import expand
from ganomaly_plugin.core import Executor, Job
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.executors.choose import Where, make_executor
from ganomaly_plugin.executors.inline import InlineExecutor
from ganomaly_plugin.executors.local import LocalExecutor, local_slots
from ganomaly_plugin.runner import Settings, failure, run_chunk
from ganomaly_plugin.store import Store, read_record

SETTINGS = Settings(device="cpu")
LOST = functools.partial(failure, settings=SETTINGS)


def jobs(*models: str, classes: str = "0") -> list[Job]:
    from ganomaly_plugin.commands import DEFAULTS
    from ganomaly_plugin.config import Experiment
    from ganomaly_plugin.selection import Selection, parse_selection

    options = {**DEFAULTS, "datasets": [Selection("digits", {"image_size": 16})], "classes": classes.split(",")}
    selections = [parse_selection(model, "model") for model in models]
    return expand(Experiment(**{**options, "models": selections, "epochs": 1}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where crashing detectors remember things, known to this process and to those it starts."""
    monkeypatch.setenv("BENCH_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """`bench` in a process of its own."""
    command = [sys.executable, "-m", "ganomaly_plugin", *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SWEEP = ("run", "--datasets", "digits", "--classes", "0", "--device", "cpu", "--out", "out")


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.parametrize("executor", [InlineExecutor(), LocalExecutor([None, None], LOST)], ids=["inline", "local"])
def test_every_job_has_one_outcome_and_it_is_the_same_anywhere(executor: Executor) -> None:
    todo = jobs("mean_intensity", "pca", "ae[features=2]", classes="0,1")
    chunks = [tuple(todo[:3]), *((job,) for job in todo[3:])]
    run = functools.partial(run_chunk, settings=SETTINGS)
    outcomes = list(executor.map(run, iter(chunks)))
    assert sorted(o.record.job.key for o in outcomes) == sorted(job.key for job in todo)
    for outcome in outcomes:
        (alone,) = run_chunk((outcome.record.job,), SETTINGS)
        assert outcome.record.status == "done" and alone.record.metrics == outcome.record.metrics


def test_crashes_and_hangs_cost_one_job_each(folder: Path) -> None:
    todo = jobs("crashing_detectors:Segfaults", "mean_intensity", "crashing_detectors:Hangs", "pca")
    executor = LocalExecutor([None], LOST, timeout=15)
    outcomes = {
        o.record.job.detector: o.record for o in executor.map(functools.partial(run_chunk, settings=SETTINGS), [tuple(todo)])
    }
    assert {name: record.status for name, record in outcomes.items()} == {
        "crashing_detectors:Segfaults": "failed",
        "mean_intensity": "done",
        "crashing_detectors:Hangs": "failed",
        "pca": "done",
    }
    assert "ended by SIGSEGV" in (outcomes["crashing_detectors:Segfaults"].error or "")
    assert "--timeout 15 s" in (outcomes["crashing_detectors:Hangs"].error or "")


def test_retries_are_for_dead_workers_only(folder: Path, bench) -> None:
    words = ["run", "--datasets", "digits", "--classes", "0", "--device", "cpu"]
    code, _, stderr = bench(*words, "--models", "crashing_detectors:DiesOnce", "--retries", 1, "--out", folder / "a")
    assert code == 0 and "FAILED" not in stderr, stderr
    code, _, stderr = bench(*words, "--models", "crashing_detectors:Segfaults,pca", "--retries", 1, "--out", folder / "b")
    assert code == 1 and "ended by SIGSEGV (try 2)" in stderr and "AUROC" in stderr
    assert Counter(r.status for r in Store(folder / "b").records()) == {"failed": 1, "done": 1}


def test_two_runners_share_the_work(folder: Path) -> None:
    runners = [start(*SWEEP, "--models", "crashing_detectors:Slow", "--seeds", "0-9", cwd=folder) for _ in range(2)]
    outputs = [runner.communicate(timeout=120) for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], outputs
    assert sorted((folder / "fits").read_text().split(), key=int) == [str(seed) for seed in range(10)]
    assert outputs[0][0] == outputs[1][0] and not (folder / "out" / "claims").exists()


def test_a_killed_runner_loses_and_repeats_nothing(folder: Path) -> None:
    words = (*SWEEP, "--models", "crashing_detectors:Slow", "--seeds", "0-5")
    first = start(*words, cwd=folder)
    wait_for(lambda: len(list((folder / "out").glob("records/*.json"))) >= 2)
    first.kill()
    first.communicate()
    kept = {path: path.read_bytes() for path in (folder / "out" / "records").glob("*.json")}
    second = start(*words, cwd=folder)
    _, stderr = second.communicate(timeout=60)
    assert second.returncode == 0 and f"{len(kept)} done before" in stderr, stderr
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(pd.read_csv(folder / "out" / "runs.csv")) == 6


@pytest.mark.parametrize("workers", [(), ("--workers", 2)], ids=["inline", "local"])
def test_ctrl_c_writes_the_tables_and_leaves_nothing_running(folder: Path, workers: tuple[object, ...]) -> None:
    runner = start(*SWEEP, "--models", "crashing_detectors:Slow", "--seeds", "0-60", *workers, cwd=folder)
    wait_for(lambda: len(list((folder / "out").glob("records/*.json"))) >= 1)
    runner.send_signal(signal.SIGINT)
    stdout, stderr = runner.communicate(timeout=30)
    assert runner.returncode == 130 and "interrupted: finished jobs are kept" in stderr and "AUROC" in stdout, stderr
    done = len(list((folder / "out" / "records").glob("*.json")))
    assert len(pd.read_csv(folder / "out" / "runs.csv")) == done < 61
    fits = (folder / "fits").read_text()
    time.sleep(1)
    assert (folder / "fits").read_text() == fits


def test_workers_end_when_their_runner_is_killed(folder: Path) -> None:
    runner = start(*SWEEP, "--models", "crashing_detectors:Slow", "--seeds", "0-60", "--workers", 1, cwd=folder)
    wait_for(lambda: len(list((folder / "out").glob("records/*.json"))) >= 1)
    runner.kill()
    runner.wait()
    time.sleep(2.5)  # the worker looks every second
    fits = (folder / "fits").read_text()
    time.sleep(1)
    assert (folder / "fits").read_text() == fits


def test_fail_fast(folder: Path, bench) -> None:
    words = ("run", "--datasets", "digits", "--classes", "0", "--seeds", "0-2", "--device", "cpu", "--out", folder / "out")
    code, _, stderr = bench(*words, "--models", "faulty_detectors:NanScores", "--fail-fast")
    assert code == 1 and "--fail-fast" in stderr and len(Store(folder / "out").records()) == 1


def test_claims_of_the_living_hold_and_those_of_the_dead_do_not(tmp_path: Path) -> None:
    (job,) = jobs("pca")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with Claims(tmp_path / "claims") as mine, Claims(tmp_path / "claims") as yours:
        assert mine.take(job) and not yours.take(job)
        mine.release(job)
        assert yours.take(job)
        yours.release(job)
        path = tmp_path / "claims" / f"{job.slug}.json"
        path.write_text(json.dumps({"host": os.uname().nodename, "pid": dead.pid}))
        assert mine.take(job)
        mine.release(job)
        path.write_text(json.dumps({"host": "another", "pid": 1}))
        assert not mine.take(job)
        os.utime(path, (time.time() - 600,) * 2)
        assert mine.take(job)
    assert not (tmp_path / "claims").exists()


def test_slots() -> None:
    assert local_slots(["0", "1"], 2, None) == ["0", "0", "1", "1"]
    assert local_slots(None, 1, 3) == [None] * 3 and local_slots(None, 2, None) == [None] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"timeout": 0.0}, "timeout must be more than 0"),
        ({"workers": 2, "jobs_per_device": 2}, "either --workers, or --devices"),
        ({"devices": ("99",)}, "numbers of GPUs"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Where(**options)


def test_the_simplest_executor_is_taken() -> None:
    assert isinstance(make_executor(Where(), LOST), InlineExecutor)
    executor = make_executor(Where(timeout=5.0, retries=2), LOST)
    assert isinstance(executor, LocalExecutor) and executor.slots == [None] and executor.retries == 2


def test_a_failed_job_that_is_retried_replaces_its_record(folder: Path, bench) -> None:
    words = ("run", "--datasets", "digits", "--classes", "0", "--device", "cpu", "--out", folder / "out")
    words = (*words, "--models", "crashing_detectors:DiesOnce", "--workers", 1)
    assert bench(*words)[0] == 1
    code, _, stderr = bench(*words, "--retry-failed")
    assert code == 0 and "1 to run" in stderr
    (path,) = (folder / "out" / "records").glob("*.json")
    assert read_record(path).status == "done"
