"""What is killed without warning: runners, workers, and runners that others wait for."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from runners import Row, Runner, faults, preload, run

SWEEP = ("run", "--models", "tiny:Tiny,pca,ae[features=2,latent_dim=4,steps=2]", "--datasets", "digits[image_size=16]")
SWEEP = (*SWEEP, "--seeds", "0-4", "--device", "cpu")
MODES = {"inline": ("--executor", "inline"), "2 workers": ("--workers", "2")}


def kill_runner(folder: Path, kills: int = 100, seed: int = 0) -> list[Row]:
    """kill -9 of the runner's whole process group at random moments of a sweep; the same command again each time."""
    preload()
    rows = []
    for number, (mode, how) in enumerate(MODES.items()):
        share = kills - round(0.8 * kills) if number else round(0.8 * kills)
        rows += [_kill_runner(folder / f"runner-{number}", (*SWEEP, *how), mode, share, random.Random(seed + number))]
    return rows


def _kill_runner(folder: Path, words: tuple[str, ...], mode: str, kills: int, rng: random.Random) -> Row:
    folder.mkdir(parents=True)
    calm = Runner(*words, "--out", "calm", cwd=folder, fork="inline" in words)
    assert calm.wait() == 0 and calm.sweeping_since is not None, calm.text
    first, last = (calm.jobs[k][0] - calm.sweeping_since for k in (0, -1))
    reach = first + (last - first) / 4
    done, sweeps, problems, lives = 0, 0, [], []
    while done < kills or lives:
        runner = Runner(*words, "--out", "out", cwd=folder, fork="inline" in words)
        lives.append(runner)
        if done < kills:
            while runner.running and runner.sweeping_since is None:
                time.sleep(0.01)
            moment = rng.uniform(0, reach)
            while runner.running and time.monotonic() < (runner.sweeping_since or 0) + moment:
                time.sleep(0.002)
        if done < kills and runner.running:
            runner.kill()
            done += 1
            print(f"  {mode}: kill {done} after {len(runner.jobs)} jobs", file=sys.stderr, flush=True)
            continue
        code = runner.wait()
        sweeps += 1
        problems += [f"exit code {code}"] if code else []
        problems += faults(folder / "out", folder / "calm", lives)
        shutil.rmtree(folder / "out")
        lives = []
    jobs = len(calm.jobs)
    result = f"{sweeps} sweeps of {jobs} jobs ended, tables and scores byte-equal" if not problems else "; ".join(problems[:3])
    return Row(f"kill -9 of the runner and its group, {mode}", kills, result, "each job once, tables byte-equal", not problems)


def kill_workers(folder: Path, kills: int = 50, seed: int = 0) -> list[Row]:
    """kill -9 of a random worker while a sweep goes on with --retries."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    words = ("run", "--models", "tiny:Tiny[pause=0.05]", "--datasets", "digits[image_size=16]", "--seeds", "0-9")
    words = (*words, "--device", "cpu", "--workers", "2", "--retries", "10")
    calm = run(*words, "--out", "calm", cwd=folder)
    assert calm.wait() == 0, calm.text
    done, sweeps, problems = 0, 0, []
    while done < kills:
        runner, seen = Runner(*words, "--out", "out", cwd=folder), 0
        while runner.running:
            time.sleep(rng.uniform(0.05, 0.6))
            workers = runner.workers()
            if done < kills and workers and len(runner.jobs) > seen:  # it got on since the last kill
                seen = len(runner.jobs)
                os.kill(rng.choice(workers), signal.SIGKILL)
                done += 1
                print(f"  worker: kill {done} after {seen} jobs", file=sys.stderr, flush=True)
        sweeps += 1
        problems += [f"exit code {runner.wait()}: {runner.text[-300:]}"] if runner.wait() else []
        problems += faults(folder / "out", folder / "calm", [runner])
        shutil.rmtree(folder / "out")
    result = f"{sweeps} sweeps of {len(calm.jobs)} jobs complete, none failed, none twice"
    result = result if not problems else "; ".join(problems[:3])
    return [Row("kill -9 of a worker, --workers 2 --retries 10", kills, result, "complete, none twice", not problems)]


def together(folder: Path, runners: int = 4, seeds: str = "0-9") -> list[Row]:
    """Several runners at once on one folder; one is killed in the middle, so that its claims are stale."""
    folder.mkdir(parents=True)
    words = ("run", "--models", "tiny:Tiny[pause=0.1]", "--datasets", "digits[image_size=16]", "--classes", "0,1,2")
    words = (*words, "--seeds", seeds, "--device", "cpu", "--executor", "inline")
    calm = run(*words, "--out", "calm", cwd=folder)
    assert calm.wait() == 0, calm.text
    rows = []
    for kind, hosts in (("one machine", [None] * runners), ("two machines", ["a", "b"] * (runners // 2))):
        for killed in (False, True):
            log = folder / "fits"
            log.unlink(missing_ok=True)
            started = [Runner(*words, "--out", "out", cwd=folder, host=host, log=log) for host in hosts]
            while killed and not any(len(runner.jobs) >= 2 for runner in started):
                assert any(runner.running for runner in started)
                time.sleep(0.005)
            if killed:
                victim = max(started, key=lambda runner: len(runner.jobs))
                victim.kill()
                started.remove(victim)
            problems = [f"exit code {runner.wait()}: {runner.text[-300:]}" for runner in started if runner.wait()]
            problems += faults(folder / "out", folder / "calm")
            fits, jobs = len(log.read_text().split()), len(calm.jobs)
            allowed = jobs + killed  # the job that the killed one was at is done again
            problems += [f"{fits} fits for {jobs} jobs"] if not jobs <= fits <= allowed else []
            shutil.rmtree(folder / "out")
            what = f"{len(hosts)} runners on one folder, {kind}{', one killed -9' if killed else ''}"
            result = f"{jobs} jobs, {fits} fits, tables byte-equal" if not problems else "; ".join(problems[:3])
            rows.append(Row(what, 1, result, "no job twice on a machine" if not killed else "its job once more", not problems))
    return rows
