"""SLURM: what is remembered of submissions, and a real cluster whose jobs are cancelled, requeued, preempted and taken up.

The second half runs with `pytest -m slurm tests/test_slurm.py tests/test_executors.py`.
"""

from __future__ import annotations

import functools
import math
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
from sweeps import jobs, start, store_in, wait_for

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.executors import slurm, slurm_queue, submissions
from ganomaly_plugin.executors.choose import Where
from ganomaly_plugin.executors.slurm import check_slurm, minutes_of, private_folder
from ganomaly_plugin.executors.slurm_node import Packed
from ganomaly_plugin.executors.slurm_queue import Queued
from ganomaly_plugin.executors.submissions import Submission, Submissions
from ganomaly_plugin.runner import Settings, failure, run_chunk
from ganomaly_plugin.store import Store

LOST = functools.partial(failure, settings=Settings(device="cpu"))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("1:30:00", 90), ("0:00:01", 1), ("2-12", 3600), ("1-00:30", 1470), ("1-00:00:30", 1441)],
)
def test_time_limits_are_read_as_slurm_does(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "1h", "-3", "1:2:3:4", "1-"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--time must be"):
        minutes_of(text)


def test_pickles_stay_in_a_private_folder_outside_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = private_folder(tmp_path / "out", None)
    assert made == tmp_path / "cache" / "ganomaly_plugin" / "slurm" and made.stat().st_mode & 0o777 == 0o700
    with pytest.raises(InvalidInput, match="must not be inside the results folder"):
        private_folder(tmp_path / "out", str(tmp_path / "out" / "slurm"))
    for others in (0o777, 0o770, 0o702):
        made.chmod(others)
        with pytest.raises(InvalidInput, match="can be written by others"):
            private_folder(tmp_path / "out", None)


def test_what_a_task_asks_for() -> None:
    asked = {"partition": "gpu", "time": "1:30:00", "memory": "8G", "cpus_per_job": 3.0, "gpus_per_job": 2.0, "max_parallel": 4}
    told = Where(executor="slurm", retries=0, sbatch="qos=a", **asked).resources().for_submitit()
    assert told.pop("additional_parameters") == {"requeue": True, "qos": "a"}
    names = ("partition", "time", "mem", "cpus_per_task", "gpus_per_node", "array_parallelism")
    assert [told[name] for name in names] == ["gpu", 90, "8G", 3, 2, 4]
    told = Where(executor="slurm").resources().for_submitit()
    assert [told[name] for name in names] == [None] * 5 + [256]


def test_what_slurm_says_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, str] = {}
    monkeypatch.setattr(slurm_queue, "_ask", lambda *words: said.get(words[0]))
    assert slurm_queue.queue() is None and slurm_queue.largest_array() == 1000
    assert slurm_queue.how_it_ended("12") == ("UNKNOWN", "?")
    said |= {"squeue": "12|N/A|bench-a\n13|4|bench-b|c\n", "scontrol": "MaxArraySize = 51\nJobState=TIMEOUT ExitCode=0:15"}
    assert slurm_queue.queue() == [Queued("12", "bench-a"), Queued("13_4", "bench-b|c")]
    assert slurm_queue.largest_array() == 50 and slurm_queue.how_it_ended("12") == ("TIMEOUT", "0:15")
    said["sacct"] = "NODE_FAIL|1:0\nCANCELLED by 1000|0:9\n"  # it was queued again
    assert slurm_queue.how_it_ended("12") == ("CANCELLED", "0:9")


def test_a_task_has_ended_when_slurm_has_not_named_it_twice_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = slurm.SlurmExecutor(store_in(tmp_path), lambda *_: None, tmp_path / "private", slurm.Resources())  # type: ignore
    chunk = tuple(jobs("pca"))
    executor._watched = [slurm._Watched(Submission.of([chunk], {}), "12", chunk, list(chunk), 0.0)]
    answers = iter([[], [Queued("12", "bench-a")], [], None, []])
    monkeypatch.setattr(slurm, "queue", lambda: next(answers))
    assert [len(executor._ended()) for _ in range(5)] == [0, 0, 0, 0, 1]


def test_submissions_are_remembered_and_damaged_ones_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = jobs("pca", "mean_intensity", "ae[features=2]")
    remembered = Submissions(tmp_path)
    one, other = Submission.of([(first, second), (third,)], {first.key: "0123"}), Submission.of([(third,)], {})
    for submission in (one, other):
        remembered.put(submission)
    assert {each.name: each for each in remembered.all()} == {one.name: one, other.name: other} and one.tasks() == []
    monkeypatch.setattr(time, "time", lambda: 0.0)  # another machine's clock, which the files' are not held to
    assert 0 <= remembered.age(one) < 600
    queue = [Queued("12_0", one.name), Queued("12_1", one.name), Queued("13", other.name), Queued("14", "another")]
    assert one.found_in(queue).tasks() == ["12_0", "12_1"] and other.found_in(queue).tasks() == ["13"]
    assert one.found_in(queue[3:]) == one
    path = remembered.folder / f"{one.name}.json"
    for content in (
        "{",
        "[]",
        "{}",
        path.read_text().replace(one.name, other.name),
        path.read_text().replace("null", '"; rm"'),
    ):
        path.write_text(content)
        assert [each.name for each in remembered.all()] == [other.name]
    path.unlink()
    remembered.drop(other)
    assert not remembered.folder.exists()


def test_what_another_runner_submits_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = slurm.SlurmExecutor(store_in(tmp_path), lambda *_: None, tmp_path / "private", slurm.Resources())  # type: ignore
    ended, other = (Submission.of([tuple(jobs("pca"))], {}) for _ in range(2))
    for submission in (ended, other):
        (executor.folder / submission.name).mkdir(parents=True)
    executor.submissions.put(replace(ended, array="11"))

    def queue() -> list[Queued]:
        executor.submissions.put(replace(other, array="12"))  # too late for the answer
        return []

    monkeypatch.setattr(slurm, "queue", queue)
    assert executor._take_up([]) == []
    assert executor.submissions.all() == [replace(other, array="12")]
    assert [path.name for path in executor.folder.iterdir()] == [other.name]


def test_jobs_that_slurm_has_no_room_for_are_told_beside_those_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = private_folder(tmp_path / "out", str(tmp_path / "private"))
    executor = slurm.SlurmExecutor(store_in(tmp_path), LOST, private, slurm.Resources())
    submitit = pytest.importorskip("submitit")
    room = [[types.SimpleNamespace(job_id="7")]]

    def submit_array(submitter: object, tasks: list[object]) -> list[object]:
        if not room:
            raise submitit.core.utils.FailedJobError("sbatch: error: QOSMaxSubmitJobPerUserLimit")
        return room.pop()

    monkeypatch.setattr(submitit.SlurmExecutor, "submit_array", submit_array)
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", lambda *_: 1)
    monkeypatch.setattr(slurm, "largest_array", lambda: 1)
    with pytest.raises(InvalidInput, match=r"not take 1 jobs.*Limit.*--limit.*SLURM keeps 1 jobs.*scancel 7"):
        executor._submit([(job,) for job in jobs("pca", "mean_intensity")], {}, Packed.of(run_chunk))
    assert [path.name for path in private.iterdir()] == [submission.name for submission in executor.submissions.all()]


def test_what_slurm_forgets_before_it_begins_is_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = slurm.SlurmExecutor(store_in(tmp_path), LOST, tmp_path / "private", slurm.Resources())
    monkeypatch.setattr(slurm, "how_it_ended", lambda task: ("UNKNOWN", "?"))
    chunk = tuple(jobs("pca"))
    submission = replace(Submission.of([chunk], {}), array="7")
    watched = slurm._Watched(submission, "7", chunk, list(chunk), 0.0)
    assert executor._settle(watched) == ([chunk], [])
    log = executor.folder / submission.name / "7_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("Killed\n")
    again, (failed,) = executor._settle(watched)
    assert not again and "UNKNOWN, exit code ?; Killed" in (failed.record.error or "")


def test_a_task_cancelled_before_it_began_is_not_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without accounting SLURM forgets it, and knows the rest of its array."""
    said = {"7": "JobId=7 ArrayTaskId=1 JobState=PENDING", "8": "JobId=8 ArrayTaskId=0-1 JobState=CANCELLED"}
    monkeypatch.setattr(slurm_queue, "_ask", lambda *words: said.get(words[-1]))
    executor, chunk = slurm.SlurmExecutor(store_in(tmp_path), LOST, tmp_path, slurm.Resources()), tuple(jobs("pca"))
    for task, is_lost in (("7_0", False), ("8_0", False), ("9_0", True), ("9", True)):
        again, failed = executor._settle(slurm._Watched(Submission.of([chunk], {}), task, chunk, list(chunk), 0.0))
        assert again == ([chunk] if is_lost else [])
        assert ["without a result: CANCELLED" in str(outcome.record.error) for outcome in failed] == [True] * (not is_lost)


def test_runners_may_remove_the_folder_of_submissions_under_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered, submission, calls = Submissions(tmp_path), Submission.of([tuple(jobs("pca"))], {}), []
    remembered.drop(submission)
    assert remembered.age(submission) == math.inf

    def write(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 1:
            path.parent.rmdir()
        path.write_bytes(content)

    monkeypatch.setattr(submissions, "atomic_write", write)
    remembered.put(submission)
    assert remembered.all() == [submission] and len(calls) == 2


def test_without_submitit_or_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InvalidInput, match=r"needs submitit: pip install 'ganomaly-plugin\[slurm\]'"):
        check_slurm()
    monkeypatch.setitem(sys.modules, "submitit", types.ModuleType("submitit"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InvalidInput, match=r"there is no sbatch here\. Run it on a login node"):
        check_slurm()


def words(folder: Path, seeds: str) -> tuple[object, ...]:
    options = ("--executor", "slurm", "--cpus-per-job", 1, "--time", 10, "--slurm-folder", folder / "private")
    what = ("--models", "crashing_detectors:Slow", "--datasets", "digits", "--classes", "0", "--device", "cpu")
    return ("run", *what, "--seeds", seeds, *options, "--out", "out")


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def running() -> list[str]:
    return ask("squeue", "-h", "-r", "-t", "running", "-o", "%F_%K").split()


def fits(folder: Path) -> list[int]:
    return sorted(int(seed) for seed in (folder / "fits").read_text().split())


def seeds_done(folder: Path) -> list[int]:
    return sorted(record.job.seed for record in Store(folder / "out").records() if record.status == "done")


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_a_closed_runner_is_taken_up(folder: Path) -> None:
    first = start(*words(folder, "0-5"), cwd=folder)
    wait_for(lambda: len(list((folder / "out").glob("records/*.json"))) >= 1, 300)
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate(timeout=60)
    assert first.returncode == 130 and "AUROC" in stdout, stderr
    kept = re.search(r"SLURM keeps (\d) jobs and goes on with them.*scancel (\d+)", stderr)
    assert kept, stderr
    second = start(*words(folder, "0-5"), cwd=folder)
    _, stderr = second.communicate(timeout=400)
    assert second.returncode == 0 and "submitted" not in stderr, stderr
    assert fits(folder) == seeds_done(folder) == list(range(6))
    assert not (folder / "out" / "slurm").exists() and not list((folder / "private").iterdir())


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_cancelled_requeued_and_preempted(folder: Path) -> None:
    runner = start(*words(folder, "0-5"), "--hparams", "seconds=6", cwd=folder)
    wait_for(lambda: len(running()) == 2, 120)
    requeued, cancelled = running()
    ask("scontrol", "requeue", requeued)
    ask("scancel", cancelled)
    wait_for(lambda: len(list((folder / "out").glob("records/*.json"))) >= 2, 300)
    wait_for(lambda: len(running()) >= 1, 300)
    ask("sbatch", "--partition=urgent", "--nodes=1", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    _, stderr = runner.communicate(timeout=550)
    assert runner.returncode == 1 and stderr.count("CANCELLED") == 2, stderr  # as it happened, and at the end
    seed = int(cancelled.partition("_")[2])
    assert seeds_done(folder) == [k for k in range(6) if k != seed]
    again = start(*words(folder, "0-5"), "--hparams", "seconds=6", "--retry-failed", cwd=folder)
    _, stderr = again.communicate(timeout=400)
    assert again.returncode == 0 and "submitted 1 jobs" in stderr, stderr
    assert seeds_done(folder) == list(range(6))


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_what_slurm_refuses_is_one_line_before_any_work(folder: Path) -> None:
    refused = start(*words(folder, "0"), "--partition", "no-such", cwd=folder)
    _, stderr = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "SLURM did not take 1 jobs" in stderr and "partition" in stderr, stderr
    assert "Traceback" not in stderr and not (folder / "out" / "slurm").exists()
    assert not list((folder / "private").iterdir())
