"""What the runner itself costs: seconds and memory for each job, and tables of very many records."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from pathlib import Path

import numpy as np
from runners import Row, Runner, run

from ganomaly_plugin.core import Job, Outcome, RunRecord
from ganomaly_plugin.metrics import RANKING_METRICS
from ganomaly_plugin.provenance import environment
from ganomaly_plugin.store import Store

LIMITS = {"inline": 20, "2 workers": 100}  # ms a job
GROWTH = 16.0  # MiB from the tenth of the jobs to the last that count as flat


def overhead(folder: Path, jobs: int = 1000, repeats: int = 3) -> list[Row]:
    """Jobs that do nothing: the time from the first to the last, and the runner's memory meanwhile.

    The limits are on processor time, which other programs on the machine move less; the clock's time stands beside it.
    """
    folder.mkdir(parents=True)
    words = ("run", "--models", "tiny:Tiny", "--datasets", "digits[image_size=16]", "--device", "cpu")
    words = (*words, "--seeds", f"0-{jobs // 10 - 1}")
    rows = []
    for mode, how in (("inline", ("--executor", "inline")), ("2 workers", ("--workers", "2"))):
        clock, busy, growth = [], [], []
        for turn in range(repeats):
            runner, seen = Runner(*words, *how, "--out", f"{mode[0]}-{turn}", cwd=folder), []
            while runner.running:
                count = len(runner.jobs)
                if jobs // 10 <= count < jobs:
                    with contextlib.suppress(OSError):
                        seen.append((count, runner.cpu(), runner.rss()))
                time.sleep(0.05)
            assert runner.wait() == 0 and len(runner.jobs) == jobs, runner.text[-2000:]
            clock.append(1000 * (runner.jobs[-1][0] - runner.jobs[0][0]) / (jobs - 1))
            (first, began, small), (last, ended, _) = seen[0], seen[-1]
            busy.append(1000 * (ended - began) / (last - first))
            growth.append(max(size for *_, size in seen) - small)
        spent, passed, largest = statistics.median(busy), statistics.median(clock), max(growth)
        what = f"{jobs} tiny jobs, {mode}"
        result = f"{spent:.1f} of the processor ({_spread(busy)}), {passed:.1f} by the clock ({_spread(clock)})"
        rows.append(Row(f"{what}: ms a job after start-up", repeats, result, f"< {LIMITS[mode]}", spent < LIMITS[mode]))
        what += f": growth of the runner's memory after the {jobs // 10}th"
        rows.append(Row(what, repeats, f"{largest:.1f} MiB at most", f"flat: < {GROWTH:.0f} MiB", largest < GROWTH))
    return rows


def _spread(values: list[float], digits: int = 1) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in sorted(values))


def many_records(out: Path, count: int) -> Store:
    """A results folder of `count` finished jobs as `bench run` would have left it."""
    store, around = Store(out, create=True), environment("cpu")
    truth = np.arange(360) < 36
    sync, os.fsync = os.fsync, lambda handle: None  # making the folder is not what is measured
    try:
        for k in range(count):
            detector, category, seed = f"d{k // 1000}", str(k // 100 % 10), k % 100
            job = Job(detector, {"features": 16, "lr": 2e-4, "betas": [0.5, 0.999]}, "digits", {"image_size": 16},
                      "one-anomalous/strict-v1", category, seed, 15, label=detector)  # fmt: skip
            score = np.random.default_rng(k).normal(truth, 1.0)
            record = RunRecord(
                job,
                "done",
                metrics={name: measure(truth, score) for name, measure in RANKING_METRICS.items()},
                counts={"train": 1300, "train_anomalous": 0, "reference": 144, "test_normal": 324, "test_anomalous": 36},
                seconds={"fit": 1.5, "score": 0.1},
                split_digest=f"{category}-{seed}",
                reference="held-out",
                notes={"describe": {"parameters": 181041, "steps": 300, "trainer": "plain"}, "source": {"sha256": "0" * 64}},
                environment=around,
                history=[{"generator": 1.0 / (epoch + 1), "discriminator": 0.5} for epoch in range(15)],
            )
            arrays = {"score": score, "is_anomaly": truth, "test_index": np.arange(360), "reference_score": score[36:180]}
            store.put(Outcome(record, arrays))
    finally:
        os.fsync = sync
    return store


def tables(folder: Path, count: int = 10_000, repeats: int = 5) -> list[Row]:
    """`bench tables` on very many records, from the start of the process to its end."""
    folder.mkdir(parents=True)
    many_records(folder / "out", count)
    clock, busy = [], []
    for _ in range(repeats):
        began, before = time.monotonic(), os.times()
        runner = run("tables", folder / "out", cwd=folder)
        clock.append(time.monotonic() - began)
        after = os.times()
        busy.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert runner.wait() == 0 and "AUROC" in runner.stdout, runner.text
    spent, passed = statistics.median(busy), statistics.median(clock)
    result = f"{spent:.2f} of the processor ({_spread(busy, 2)}), {passed:.2f} by the clock ({_spread(clock, 2)})"
    what = f"bench tables on {count:,} records, checksums checked: s, start-up included"
    return [Row(what, repeats, result, "< 3", spent < 3)]
