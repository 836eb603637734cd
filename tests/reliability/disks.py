"""Disks that fill up or turn read-only in the middle of a sweep. Mounts small file systems: needs root on Linux."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from runners import Row, Runner, faults, run

from ganomaly_plugin.store import Store

SWEEP = ("run", "--models", "tiny:Tiny", "--datasets", "digits[image_size=16]", "--seeds", "0-9", "--device", "cpu")


@contextlib.contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` mounted at `at`."""
    at.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def remount(at: Path, options: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{options}", str(at)], capture_output=True).returncode == 0


def disks(folder: Path, times: int = 5, seed: int = 0) -> list[Row]:
    """Full and read-only disks in mid-sweep, and folders that were read-only from the start."""
    if os.name != "posix" or os.geteuid() != 0:
        return [Row("disk full, read-only", 0, "not run: mounting needs root", "no finished record lost", False)]
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    calm = run(*SWEEP, "--executor", "inline", "--out", "calm", cwd=folder)
    assert calm.wait() == 0, calm.text
    return [
        _disturbed(folder, "disk full", times, lambda runner, at: None, lambda: f"{rng.randrange(200, 900)}k", len(calm.jobs)),
        _disturbed(folder, "disk turns read-only", times, _read_only, lambda: "64m", len(calm.jobs), rng),
        _from_the_start(folder),
    ]


def _read_only(runner: Runner, at: Path) -> None:
    while runner.running and not remount(at, "ro"):  # busy while a file is open for writing
        time.sleep(0.001)


def _disturbed(folder: Path, what: str, times: int, disturb, size, jobs: int, rng: random.Random | None = None) -> Row:
    problems, kept_before = [], []
    for turn in range(times):
        how = ("--executor", "inline") if turn % 2 else ("--workers", "2")
        with small_disk(folder / f"{what.replace(' ', '-')}-{turn}", size()) as at:
            runner = Runner(*SWEEP, *how, "--out", at / "out", cwd=folder)
            if rng is not None:
                wait_for = rng.randrange(1, jobs // 2)
                while runner.running and len(runner.jobs) < wait_for:
                    time.sleep(0.001)
                disturb(runner, at)
            code = runner.wait()
            errors = [line for _, line in runner.lines if line.startswith("bench: error: ")]
            if code != 1 or len(errors) != 1 or "Traceback" in runner.text:
                problems.append(f"exit code {code}, {len(errors)} messages: {runner.text[-200:]}")
            kept = {path: path.read_bytes() for path in Store(at / "out").records_dir.glob("*.json")}
            kept_before.append(len(kept))
            if len(runner.jobs) > len(kept):
                problems.append(f"{len(runner.jobs)} jobs were told, {len(kept)} are kept")
            assert remount(at, "rw,size=64m")
            again = run(*SWEEP, *how, "--out", at / "out", cwd=folder)
            problems += [f"exit code {again.wait()} afterwards"] if again.wait() else []
            problems += ["a kept record changed"] if any(path.read_bytes() != old for path, old in kept.items()) else []
            problems += faults(at / "out", folder / "calm", [runner, again])
    result = f"{sum(kept_before)} finished records kept, the rest done on a second start, one line and exit code 1"
    return Row(
        what, times, result if not problems else "; ".join(problems[:3]), "no record lost, a clear message", not problems
    )


def _from_the_start(folder: Path) -> Row:
    problems = []
    with small_disk(folder / "read-only", "64m") as at:
        run(*SWEEP, "--executor", "inline", "--out", at / "out", "--limit", "3", cwd=folder)
        assert remount(at, "ro")
        for words, code, text in (
            ((*SWEEP, "--out", at / "out"), 2, "Cannot write to the output folder"),
            ((*SWEEP, "--out", at / "new"), 2, "Cannot write to the output folder"),
            (("tables", at / "out"), 0, "Cannot write tables"),
        ):
            runner = run(*words, cwd=folder)
            if runner.wait() != code or text not in runner.text or len(runner.lines) != 1:
                problems.append(f"{words[0]}: exit code {runner.wait()}: {runner.text[-200:]}")
    result = "bench run says so before any work (exit code 2), bench tables prints its tables"
    return Row("read-only folder", 3, result if not problems else "; ".join(problems), "a clear message", not problems)
