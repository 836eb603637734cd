"""Executors: the same records from each, and what a crash, a kill, a hang, Ctrl-C or a second runner does to a sweep."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from sweeps import alone, jobs, start, store_in, wait_for

from ganomaly_plugin import runner
from ganomaly_plugin.claims import Claims, is_alive
from ganomaly_plugin.core import Chunk, Executor, Outcome
from ganomaly_plugin.detectors.mean_intensity import MeanIntensity
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.executors import local, ray_cluster, worker
from ganomaly_plugin.executors.choose import Where, make_executor
from ganomaly_plugin.executors.inline import InlineExecutor
from ganomaly_plugin.executors.local import LocalExecutor, local_slots, worker_threads
from ganomaly_plugin.executors.processes import descendants, interrupts_blocked, kill_with_descendants
from ganomaly_plugin.executors.tries import NODE_TRIES, Tries
from ganomaly_plugin.runner import Settings, failure, make_plan, run_chunk, run_job, sweep
from ganomaly_plugin.store import Store, read_record

SETTINGS = Settings(device="cpu")
LOST = functools.partial(failure, settings=SETTINGS)
Make = Any  # makes an executor from options of `Where`; its `kind` is the executor's name


SWEEP = ("run", "--datasets", "digits", "--classes", "0", "--device", "cpu", "--out", "out")
HERE = ("--executor", "inline")  # where the test is not about workers: to start one takes seconds


KINDS = ["inline", "local", *(pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in ("ray", "slurm"))]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, folder: Path) -> Make:
    """Makes the executor under test, with two places to work where it has places."""
    kind = request.param
    options_of: dict[str, dict[str, Any]] = {"local": {"workers": 2}}
    if kind == "ray":
        options_of["ray"] = {"address": request.getfixturevalue("ray_cluster").address}
    if kind == "slurm":
        request.getfixturevalue("slurm")
        options_of["slurm"] = {"cpus_per_job": 1, "slurm_folder": str(folder / "private")}

    def executor(**options: Any) -> Executor:
        return make_executor(Where(executor=kind, **options_of.get(kind, {}), **options), LOST, store_in(folder))

    executor.kind = kind
    return executor


def outcomes_of(executor: Executor, chunks: Iterable[Chunk]) -> dict[str, Outcome]:
    """Outcomes by job key; each job has one."""
    found: dict[str, Outcome] = {}
    for outcome in executor.map(functools.partial(alone, settings=SETTINGS), iter(chunks)):
        assert outcome.record.job.key not in found
        found[outcome.record.job.key] = outcome
    return found


def test_every_job_has_one_outcome_and_it_is_the_same_anywhere(make: Make) -> None:
    forks = [f"crashing_detectors:{name}" for name in ("StartsProcesses", "Forks") if make.kind == "local"]  # else Ray's affair
    todo = jobs("mean_intensity", "pca", "ae[features=2]", *forks, "faulty_detectors:NanScores", classes="0,1")
    found = outcomes_of(make(), [tuple(todo[:4]), *((job,) for job in todo[4:])])
    assert list(found) and found.keys() == {job.key for job in todo}
    for job in todo:
        here, there = run_job(job, SETTINGS), found[job.key].record
        assert there.status == here.record.status == ("failed" if "Nan" in job.detector else "done"), there.traceback
        assert there.metrics == here.record.metrics and there.error == here.record.error
        assert there.environment["command"] == here.record.environment["command"]


@pytest.mark.parametrize("make", [pytest.param("local", marks=pytest.mark.slow), *KINDS[2:]], indirect=True)
def test_a_job_is_blamed_for_what_happens_to_it_alone(make: Make) -> None:
    """A crash and a hang fail alone; the neighbours in a lost stack, and a job whose worker died once, are run again."""
    crash, neighbour, hang, once = jobs(
        "crashing_detectors:Segfaults", "mean_intensity", "crashing_detectors:Hangs", "crashing_detectors:DiesOnce"
    )
    found = outcomes_of(make(timeout=20.0, retries=1), [(neighbour, crash), (hang,), (once,)])
    told = {job.detector.split(":")[-1]: found[job.key].record.error or "done" for job in (crash, neighbour, hang, once)}
    assert told["mean_intensity"] == told["DiesOnce"] == "done", told
    assert "(try 2)" in told["Segfaults"] and ("SIGSEGV" in told["Segfaults"] or make.kind == "ray"), told
    assert "--timeout 20 s" in told["Hangs"] and "(try" not in told["Hangs"], told


def test_a_lost_stack_is_run_again_one_by_one_and_a_lost_machine_is_no_fault() -> None:
    first, second = jobs("pca", "mean_intensity")
    tries = Tries(LOST, retries=0)
    assert tries.settle((first, second), [second], "hung", 1.0, final=True) == ([(second,)], [])
    for _ in range(NODE_TRIES - 1):
        assert tries.settle((second,), [second], "its machine was lost", 1.0, node=True) == ([(second,)], [])
    again, (failed,) = tries.settle((second,), [second], "its machine was lost", 1.0, node=True)
    assert not again and failed.record.error == f"its machine was lost (try {NODE_TRIES})"
    again, (failed,) = tries.settle((first,), [first], "it died", 1.0)
    assert not again and failed.record.error == "it died"
    patient = Tries(LOST, retries=NODE_TRIES + 1)  # more than machines have anyway
    tried = [patient.settle((first,), [first], "its machine was lost", 1.0, node=True)[0] for _ in range(NODE_TRIES + 2)]
    assert tried == [[(first,)]] * (NODE_TRIES + 1) + [[]]


def test_a_stack_that_fails_as_a_whole_is_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise MemoryError("no room for so many")

    monkeypatch.setattr("ganomaly_plugin.runner.fit_together", too_large)
    todo = tuple(jobs("ae[features=2,latent_dim=4]", classes="0,1"))
    outcomes = list(run_chunk(todo, SETTINGS))
    assert [outcome.record.job for outcome in outcomes] == list(todo)
    assert {outcome.record.status for outcome in outcomes} == {"done"}
    assert "2 jobs do not train together, and run one by one: MemoryError: no room for so many" in capsys.readouterr().err


def test_what_a_job_does_to_its_process_is_its_own_affair(capsys: pytest.CaptureFixture[str]) -> None:
    def surroundings() -> list[object]:
        return [Path.cwd(), *(read() for read, _ in runner._SWITCHES)]

    before = surroundings()
    stack = jobs("crashing_detectors:ExitsAfterTraining[features=2,latent_dim=2]", classes="0,1")
    single = jobs(*(f"crashing_detectors:{name}" for name in ("Exits", "Unspeakable", "Wanders")), "mean_intensity")
    errors = []
    for chunk in (tuple(stack), *((job,) for job in single)):
        errors += [outcome.record.error for outcome in run_chunk(chunk, SETTINGS)]
        assert surroundings() == before
    assert errors == [*["SystemExit: 0"] * 3, "Fault", None, None]
    printed = capsys.readouterr()
    assert not printed.out and "printed by a detector" in printed.err


def test_results_go_where_bench_run_was_started(folder: Path, bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("ganomaly_plugin.runner._here", lambda: None)  # as if nobody could say where that was
    words = (*SWEEP, "--models", "crashing_detectors:Wanders,mean_intensity", "--epochs", 1)
    code, stdout, stderr = bench(*words)
    assert code == 0 and len(Store(folder / "out").records()) == 2, stderr
    assert "printed" not in stdout and "printed by a detector" in stderr


def test_jobs_go_on_where_their_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setattr(sys, "argv", ["bench", "run", f"--out={tmp_path}"])

    def removes(detector: MeanIntensity, images: torch.Tensor, **options: Any) -> None:
        (tmp_path / "gone").rmdir()
        detector.mean_, detector.std_ = 0.0, 1.0

    monkeypatch.setattr(MeanIntensity, "_fit", removes)
    for job in jobs("mean_intensity", "pca"):
        (outcome,) = run_chunk((job,), SETTINGS)
        assert outcome.record.error is None
        assert outcome.record.environment["command"] == ["bench", "run", f"--out=…/{tmp_path.name}"]


def test_a_job_that_forks_is_done_once() -> None:
    (job,) = jobs("crashing_detectors:Forks")
    (outcome,) = run_chunk((job,), SETTINGS)
    assert outcome.record.status == "done"
    assert os.waitpid(sys.modules["crashing_detectors"].Forks.child, 0)[1] == 0


def test_what_a_job_does_to_its_worker_is_its_own_affair(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prints, interrupts, after = jobs("crashing_detectors:Wanders", "crashing_detectors:Interrupts", "mean_intensity")
    executor = make_executor(Where(workers=1, retries=1), LOST, store_in(folder))
    found = outcomes_of(executor, [(prints,), (interrupts,), (after,)])
    errors = [found[job.key].record.error for job in (prints, interrupts, after)]
    assert errors == [None, "KeyboardInterrupt: from a detector", None]
    printed = capfd.readouterr()
    assert not printed.out and "printed by a detector" in printed.err and "Traceback" not in printed.err


@pytest.mark.parametrize("sent", ["no pickle", "no outcome", "another job's"])
def test_a_worker_that_cannot_be_understood_is_lost(sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GRACE", 0.1)
    ours, theirs = get_context("fork").Pipe()
    process = get_context("fork").Process(target=time.sleep, args=(1000,))
    process.start()
    mine, other = jobs("mean_intensity", "pca")
    worker = local._Worker(None, alone, None, left=[mine], process=process, pipe=ours)
    theirs.send_bytes(b"?") if sent == "no pickle" else theirs.send(None if sent == "no outcome" else LOST(other, "", 0.0))
    assert not list(worker.receive())
    process.join(30)  # a busy machine takes its time to end what is killed
    assert not worker.is_alive()
    assert re.match("its worker process was killed: it could no longer be understood .*Error", worker.death())


@pytest.mark.parametrize(("code", "said"), [(3, "exit code 3"), (-signal.SIGTERM, "SIGTERM"), (-40, "signal 40")])
def test_every_end_of_a_worker_has_words(code: int, said: str) -> None:
    process = SimpleNamespace(join=lambda seconds: None, exitcode=code)
    assert local._Worker(None, alone, None, process=process).death().endswith(said)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing says what a process started")
def test_what_a_job_started_ends_with_its_worker() -> None:
    process = get_context("fork").Process(target=subprocess.run, args=(["sh", "-c", "sleep 1000; true"],))
    process.start()
    wait_for(lambda: len(descendants(process.pid)) == 2)
    below = descendants(process.pid)
    kill_with_descendants(process)
    wait_for(lambda: not any(map(is_alive, [process.pid, *below])))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends at the next turn of a thread")
def test_a_worker_that_gives_no_thread_a_turn_ends_with_its_runner() -> None:
    script = """if True:
        import os, re, signal
        from ganomaly_plugin.executors.processes import end_with_parent
        parent = os.getpid()
        if os.fork() == 0:
            end_with_parent(parent)
            print(os.getpid(), flush=True)
            re.match("(a+)+b", "a" * 60)
        signal.pause()
    """
    runner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(runner.stdout.readline())
    runner.kill()
    runner.wait()
    wait_for(lambda: not is_alive(pid))


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows")
def test_ctrl_c_waits_for_a_worker_to_be_ready() -> None:
    script = """if True:
        import os, signal
        from ganomaly_plugin.executors.processes import let_interrupts_in
        os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGINT, lambda *_: print("heard", flush=True))
        let_interrupts_in()
    """
    with interrupts_blocked():
        worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert worker.communicate()[0] == "heard\n" and worker.returncode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
def test_two_runners_share_the_work(folder: Path) -> None:
    runners = [start(*SWEEP, "--models", "crashing_detectors:Slow", "--seeds", "0-9", *HERE, cwd=folder) for _ in range(2)]
    outputs = [runner.communicate(timeout=120) for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], outputs
    assert sorted((folder / "fits").read_text().split(), key=int) == [str(seed) for seed in range(10)]
    assert outputs[0][0] == outputs[1][0] and not (folder / "out" / "claims").exists()


@pytest.mark.slow
def test_a_killed_runner_loses_and_repeats_nothing(folder: Path) -> None:
    words = (*SWEEP, "--models", "crashing_detectors:Slow", "--seeds", "0-5", *HERE)
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


@pytest.mark.parametrize("where", [HERE, pytest.param(("--workers", 2), marks=pytest.mark.slow)], ids=["inline", "local"])
def test_ctrl_c_writes_the_tables_and_leaves_nothing_running(folder: Path, where: tuple[object, ...]) -> None:
    runner = start(*SWEEP, "--models", "crashing_detectors:Slow", "--seeds", "0-60", *where, cwd=folder)
    wait_for(lambda: len(list((folder / "out").glob("records/*.json"))) >= 1)
    runner.send_signal(signal.SIGINT)
    stdout, stderr = runner.communicate(timeout=30)
    assert runner.returncode == 130 and "interrupted: finished jobs are kept" in stderr and "AUROC" in stdout, stderr
    done = len(list((folder / "out" / "records").glob("*.json")))
    assert len(pd.read_csv(folder / "out" / "runs.csv")) == done < 61
    fits = (folder / "fits").read_text()
    time.sleep(1)
    assert (folder / "fits").read_text() == fits


def interrupted(folder: Path, model: str) -> tuple[str, str, int]:
    """stdout, stderr and how many records there are, of a stack of six jobs that gets Ctrl-C after its first record."""
    words = ("--models", f"crashing_detectors:{model}[features=2,latent_dim=2]", "--image-size", 16, "--trainer", "stacked")
    runner = start(*SWEEP, *words, "--steps", 1, "--seeds", "0-5", cwd=folder)
    wait_for(lambda: len(list((folder / "out").glob("records/*.json"))) >= 1)
    runner.send_signal(signal.SIGINT)
    stdout, stderr = runner.communicate(timeout=60)
    assert runner.returncode == 130, stderr
    return stdout, stderr, len(list((folder / "out" / "records").glob("*.json")))


@pytest.mark.slow
def test_ctrl_c_lets_trained_models_be_recorded(folder: Path) -> None:
    stdout, stderr, count = interrupted(folder, "SlowToScore")
    assert "recording 5 trained models first" in stderr and "AUROC" in stdout, stderr
    assert count == 6


@pytest.mark.slow
def test_ctrl_c_trains_nothing_more(folder: Path) -> None:
    """Of a stack that did not train as a whole, whose jobs run one by one."""
    _, stderr, count = interrupted(folder, "SlowAlone")
    assert "run one by one" in stderr and "models first" not in stderr, stderr
    assert count < 6


def test_time_in_which_a_sweep_is_suspended_is_not_a_job_s(monkeypatch: pytest.MonkeyPatch) -> None:
    now, watched = [100.0], SimpleNamespace(since=90.0, signs=list)
    monkeypatch.setattr(local.time, "monotonic", lambda: now[0])
    for seconds, since in ((0.1, 90.0), (local._LOOK, 90.0), (local._LOOK + 3600.0, 3690.0)):
        monkeypatch.setattr(local.connection, "wait", lambda _, timeout, s=seconds: now.__setitem__(0, now[0] + s))
        local._await_sign([watched])
        assert watched.since == since


@pytest.mark.slow
def test_a_broken_device_costs_the_job_that_broke_it(folder: Path) -> None:
    breaks, needs = jobs("crashing_detectors:BreaksDevice", "crashing_detectors:NeedsDevice")
    executor = make_executor(Where(workers=1), LOST, store_in(folder))
    for chunks in ([(breaks,), (needs,)], [(needs, breaks)], [(breaks, needs)]):
        found = outcomes_of(executor, chunks)
        assert found[needs.key].record.status == "done" and "illegal memory access" in found[breaks.key].record.error


@pytest.mark.slow
def test_a_device_that_breaks_after_a_result_costs_no_job(folder: Path) -> None:
    breaks, needs = jobs("crashing_detectors:BreaksDeviceAfterScoring", "crashing_detectors:NeedsDevice")
    executor = make_executor(Where(workers=1), LOST, store_in(folder))
    for chunks in ([(breaks,), (needs,)], [(breaks, needs)]):
        found = outcomes_of(executor, chunks)
        assert found[needs.key].record.status == found[breaks.key].record.status == "done"
        assert "illegal memory access" in found[breaks.key].record.notes["samples"]


def test_it_is_the_job_s_own_gpu_that_is_asked_whether_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", asked.append)
    assert not any(map(worker._device_is_broken, ("cuda:1", "cuda", "cpu"))) and asked == ["cuda:1", "cuda", None]


@pytest.mark.slow
def test_workers_end_when_their_runner_is_killed(folder: Path) -> None:
    runner = start(*SWEEP, "--models", "crashing_detectors:Slow", "--seeds", "0-60", "--workers", 1, cwd=folder)
    wait_for(lambda: len(list((folder / "out").glob("records/*.json"))) >= 1)
    runner.kill()
    runner.wait()
    time.sleep(2.5)  # the worker looks every second
    fits = (folder / "fits").read_text()
    time.sleep(1)
    assert (folder / "fits").read_text() == fits


@pytest.mark.slow
def test_a_runner_that_fails_in_mid_sweep_waits_for_no_worker(folder: Path) -> None:
    script = """if __name__ == "__main__":
        from test_executors import LOST, SETTINGS, alone, functools, jobs
        from ganomaly_plugin.executors.local import LocalExecutor

        todo = [(job,) for job in jobs("crashing_detectors:Slow", "mean_intensity")]
        running = LocalExecutor([None, None], LOST).map(functools.partial(alone, settings=SETTINGS), todo)
        next(running)
        raise SystemExit(3)  # and nobody closes what is running
    """
    (folder / "script.py").write_text(script)
    assert subprocess.run([sys.executable, "script.py"], cwd=folder, timeout=90, check=False).returncode == 3


def test_an_executor_starts_when_there_is_a_job_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not each second while another runner has all that is left, of which is told once."""
    (job,), store, seen = jobs("mean_intensity"), store_in(tmp_path), []

    class Executor(InlineExecutor):
        def map(self, run, chunks):
            seen.append(time.monotonic())
            return super().map(run, chunks)

    def run(chunk: Chunk) -> Iterable[Outcome]:
        return alone(chunk, SETTINGS)

    with Claims(store.folder / "claims") as other:
        assert other.take(job)
        timer = threading.Timer(1.5, other.release, [job])
        timer.start()
        began = time.monotonic()
        records = list(sweep(make_plan([job], store), store, Executor(), run, lambda jobs: [tuple(jobs)]))
    assert [record.status for record in records] == ["done"] and len(seen) == 1 and seen[0] - began > 1
    who = f"(pid {os.getpid()} on {os.uname().nodename})"
    assert capsys.readouterr().err == f"waiting for 1 job that another bench run is at {who}\n"


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


def test_what_a_ray_task_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "RayExecutor", lambda address, lost, **options: (address, options))
    asked = Where(executor="ray", address="a:1", cpus_per_job=0.0, gpus_per_job=0.25, timeout=9.0, retries=2)
    wanted = ("a:1", {"cpus": 0.0, "gpus": 0.25, "timeout": 9.0, "retries": 2})  # no processor beside the GPU's share
    assert make_executor(asked, LOST, store_in(tmp_path)) == wanted
    usual = (None, {"cpus": 1.0, "gpus": 0.0, "timeout": None, "retries": 0})
    assert make_executor(Where(executor="ray", retries=0), LOST, store_in(tmp_path)) == usual


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_slots(["0", "1"], 2, None) == ["0", "0", "1", "1"]
    assert local_slots(None, 1, 3) == [None] * 3 and local_slots(None, 2, None) == [None] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-5f")  # of which these are the numbers 0 and 1
    assert local_slots(["1", "0"], 1, None) == ["GPU-5f", "4"]


def test_workers_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [worker_threads(n) for n in (1, 2, 3, 20)] == [None, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [worker_threads(n) for n in (1, 2, 3, 20)] == [None, 3, 2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "lokal"}, "--executor must be inline.*got 'lokal'. Did you mean 'local'"),
        ({"executor": "inline", "timeout": 3.0}, "--timeout is for --executor local.*, not inline"),
        ({"executor": "inline", "jobs_per_device": 3}, "--jobs-per-device is for --executor local, not inline"),
        ({"partition": "gpu"}, "--partition is for --executor slurm, not local"),
        ({"executor": "ray", "devices": ("0",)}, "--devices is for --executor local, not ray"),
        ({"address": "10.0.0.1:6379"}, "--address is for --executor ray, not local"),
        ({"executor": "ray", "gpus_per_job": -0.5}, "--gpus-per-job must be at least 0, got -0.5"),
        ({"executor": "ray", "gpus_per_job": 1.5}, "--gpus-per-job must be a whole number above 1 for Ray, got 1.5"),
        ({"executor": "ray", "cpus_per_job": 1e-5}, "--cpus-per-job must be 0 or at least 0.0001 for Ray, got 1e-05"),
        ({"executor": "slurm", "workers": 2}, "--workers is for --executor local, not slurm"),
        ({"executor": "slurm", "gpus_per_job": 0.5}, "--gpus-per-job must be a whole number for SLURM, got 0.5"),
        ({"executor": "slurm", "time": "soon"}, "--time must be minutes, H:MM:SS or D-HH:MM, got 'soon'"),
        ({"executor": "slurm", "sbatch": "account"}, "Cannot read 'account' in --sbatch"),
        (
            {"executor": "slurm", "sbatch": "exclude=n1,n2"},
            "'n2' in --sbatch. Write name=value, .* in quotes: .*exclude=\"n1,n2\"",
        ),
        ({"executor": "slurm", "sbatch": "a b=c"}, "Cannot read 'a b=c' in --sbatch"),
        ({"executor": "slurm", "sbatch": "qos=a,qos=b"}, "qos is given twice in --sbatch"),
        ({"executor": "slurm", "sbatch": 'comment="\\q"'}, "Cannot read .* in --sbatch"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"retries": -1}, "--retries must be at least 0"),
        ({"timeout": 0.0}, "--timeout must be more than 0"),
        ({"workers": 2, "jobs_per_device": 2}, "either --workers, or --devices"),
        ({"devices": ("99",)}, "numbers of GPUs"),
        ({"devices": ()}, "numbers of GPUs.*got ''"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Where(**options)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("begin=16:00,account=0077,comment=yes", {"begin": "16:00", "account": "0077", "comment": "yes"}),
        ("mail-type=END, qos = a b", {"mail-type": "END", "qos": "a b"}),
        ("exclude=\"n1,n2\",mail-user='a,b'", {"exclude": "n1,n2", "mail-user": "a,b"}),
        ("nodelist=n[1,3-4],gres=gpu:a100:2", {"nodelist": "n[1,3-4]", "gres": "gpu:a100:2"}),
        ("dependency=afterok:12?afterok:13,comment=", {"dependency": "afterok:12?afterok:13", "comment": ""}),
        ("exclusive=true,comment='true'", {"exclusive": True, "comment": "true"}),
    ],
)
def test_what_sbatch_is_told_is_the_text_it_is(text: str, told: dict[str, Any]) -> None:
    assert Where(executor="slurm", sbatch=text).resources().more == told


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        ({"executor": "ray"}, "cuda:1", "--device must be auto, cpu or cuda on a cluster.*got 'cuda:1'"),
        ({"executor": "slurm"}, "cuda", "needs --gpus-per-job"),
    ],
)
def test_devices_of_a_cluster_are_not_chosen_here(options: dict[str, Any], device: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Where(**options).check_device(device)
    Where(**options, gpus_per_job=1).check_device("cuda")
    Where(**options).check_device("auto")


def test_a_worker_process_is_the_default(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    executor = make_executor(Where(timeout=5.0, retries=2), LOST, store)
    assert isinstance(executor, LocalExecutor) and executor.slots == [None] and executor.tries.retries == 2
    assert isinstance(make_executor(Where(), LOST, store), LocalExecutor)
    assert isinstance(make_executor(Where(executor="inline"), LOST, store), InlineExecutor)


@pytest.mark.slow
def test_a_failed_job_that_is_retried_replaces_its_record(folder: Path, bench) -> None:
    words = ("run", "--datasets", "digits", "--classes", "0", "--device", "cpu", "--out", folder / "out")
    words = (*words, "--models", "crashing_detectors:DiesOnce", "--workers", 1)
    assert bench(*words)[0] == 1
    code, _, stderr = bench(*words, "--retry-failed")
    assert code == 0 and "1 to run" in stderr
    (path,) = (folder / "out" / "records").glob("*.json")
    assert read_record(path).status == "done"
