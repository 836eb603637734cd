"""Jobs as tasks of SLURM job arrays, through submitit. The nodes write the records; this process watches, and may be closed.

submitit pickles what a task runs. Its folder is private and lies outside the results folder, and nothing that a task leaves
there is ever unpickled: a result is a record in the results folder, and what a task's end means SLURM is asked.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ganomaly_plugin.core import Chunk, Job, Outcome
from ganomaly_plugin.errors import InvalidInput, one_line
from ganomaly_plugin.executors.slurm_node import NodeTask, Packed, fingerprint
from ganomaly_plugin.executors.slurm_queue import how_it_ended, largest_array, queue, was_taken_out
from ganomaly_plugin.executors.submissions import Submission, Submissions
from ganomaly_plugin.executors.tries import Lost, Tries
from ganomaly_plugin.files import as_path
from ganomaly_plugin.store import Store

_LOOK = 1.0  # seconds between looks at the results folder
_ASK = 5.0  # seconds between questions to SLURM
_CLEAN = 10  # looks at whether the last tasks have gone
_ON_ITS_WAY = 600.0  # seconds in which a submission that SLURM does not know may be one that is being made
_ABSENT = 2  # answers without a task, after which it has ended: its record may be late on a network file system


@dataclass(frozen=True)
class Resources:
    """What a task asks SLURM for; None: as the site has it.

    Attributes:
        partition: Where.
        minutes: Time limit.
        memory: Of a node, such as "8G".
        gpus: GPUs.
        cpus: Processors.
        parallel: Tasks of an array that may run at once.
        more: Further options of sbatch, by name: account, qos, constraint and so on.
    """

    partition: str | None = None
    minutes: int | None = None
    memory: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    parallel: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def for_submitit(self) -> dict[str, Any]:
        """The parameters of submitit's SlurmExecutor."""
        asked = {
            "partition": self.partition,
            "time": self.minutes,
            "mem": self.memory,
            "gpus_per_node": self.gpus,
            "cpus_per_task": self.cpus,
            "array_parallelism": self.parallel or 256,
            "wckey": None,
            "stderr_to_stdout": True,
        }
        return {**asked, "additional_parameters": {"requeue": True, **self.more}}


def minutes_of(text: str) -> int:
    """SLURM's ways to write a time limit, in minutes: "90", "90:00", "1:30:00", "2-12", "2-12:30", "2-12:30:00".

    Raises:
        InvalidInput: `text` is none of them.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not found:
        raise InvalidInput(f"--time must be minutes, H:MM:SS or D-HH:MM, got {text!r}.")
    days, *parts = (int(part) if part is not None else None for part in found.groups())
    first, second, third = parts
    if days is not None or third is not None:  # it begins with hours
        seconds = ((days or 0) * 24 + (first or 0)) * 3600 + (second or 0) * 60 + (third or 0)
    else:
        seconds = (first or 0) * 60 + (second or 0)
    if not seconds:
        raise InvalidInput(f"--time must be more than 0, got {text!r}.")
    return -(-seconds // 60)


def private_folder(results: Path, asked: str | None) -> Path:
    """The folder of submitit's pickles and logs: ours alone, outside the results, on a disk that the nodes share.

    Raises:
        InvalidInput: It is not.
    """
    cache = as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = as_path(asked).resolve() if asked else cache.resolve() / "ganomaly_plugin" / "slurm"
    if folder.is_relative_to(results.resolve()):
        raise InvalidInput(f"--slurm-folder must not be inside the results folder, got {folder}: it holds pickles.")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        raise InvalidInput(f"Cannot make {folder}: {error.strerror}. Give another --slurm-folder.") from error
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise InvalidInput(
            f"{folder} can be written by others, and holds pickles. chmod 700 it, or give another --slurm-folder."
        )
    return folder


def check_slurm() -> None:
    """Raise InvalidInput unless submitit is installed and SLURM answers."""
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise InvalidInput("--executor slurm needs submitit: pip install 'ganomaly-plugin[slurm]'.") from error
    missing = [name for name in ("sbatch", "srun", "squeue", "scontrol") if shutil.which(name) is None]
    if missing:
        raise InvalidInput(f"--executor slurm needs SLURM's commands; there is no {missing[0]} here. Run it on a login node.")
    if queue() is None:
        raise InvalidInput("SLURM does not answer: squeue failed. Is this a login node, and slurmctld up?")


@dataclass
class _Watched:
    """A task that has jobs of ours."""

    submission: Submission
    task: str
    chunk: Chunk
    left: list[Job]
    since: float
    absent: int = 0  # answers of SLURM, one after another, that do not name it


class SlurmExecutor:
    """Runs each chunk as a task of a job array; several `bench run`, one after another, may watch the same tasks.

    Args:
        store: The results folder, on a disk that the nodes share.
        lost: Makes the outcome of a job whose task or worker died.
        folder: As `private_folder` gives it.
        resources: What each task gets.
        timeout: Seconds that a job may take.
        retries: Further tries for a job whose task or worker died. SLURM itself queues a preempted task again, and one
            whose node failed.
    """

    def __init__(
        self, store: Store, lost: Lost, folder: Path, resources: Resources, *, timeout: float | None = None, retries: int = 0
    ) -> None:
        self.store, self.lost, self.folder, self.resources = store, lost, folder, resources
        self.timeout, self.tries = timeout, Tries(lost, retries)
        self.submissions = Submissions(store.folder)
        self._watched: list[_Watched] = []

    @property
    def parting(self) -> str:
        """What happens to the tasks that are still with SLURM."""
        jobs = sum(len(watched.left) for watched in self._watched)
        if not jobs:
            return ""
        arrays = sorted({watched.task.partition("_")[0] for watched in self._watched if watched.left})
        return (
            f"SLURM keeps {jobs} jobs and goes on with them; the same command collects their results. "
            f"To cancel them: scancel {' '.join(arrays)}"
        )

    def map(self, run: Callable[[Chunk], Iterable[Outcome]], chunks: Iterable[Chunk]) -> Iterator[Outcome]:
        """Submit what is not submitted yet, and yield outcomes as records appear."""
        packed, chunks = Packed.of(run), list(chunks)
        before = self._fingerprints(job for chunk in chunks for job in chunk)  # first: what changes from here on is new
        self._watched = self._take_up(chunks)
        known = {job.key for watched in self._watched for job in watched.left}
        rest = (tuple(job for job in chunk if job.key not in known) for chunk in chunks)
        self._submit([chunk for chunk in rest if chunk], before, packed)
        asked = time.monotonic()
        while self._watched:
            yield from self._collect()
            if time.monotonic() - asked >= _ASK:
                ended = self._ended()
                yield from self._collect()  # what came before the end
                for watched in ended:
                    again, failed = self._settle(watched)
                    self._watched.remove(watched)
                    self._submit(again, self._fingerprints(job for chunk in again for job in chunk), packed)
                    yield from failed
                asked = time.monotonic()
            self._watched = [watched for watched in self._watched if watched.left]
            if self._watched:
                time.sleep(_LOOK)
        for _ in range(_CLEAN):  # the tasks' processes end soon after their last record
            if not self._forget_ended():
                break
            time.sleep(_LOOK)

    def _fingerprints(self, jobs: Iterable[Job]) -> dict[str, str]:
        found = {job.key: fingerprint(self.store, job) for job in jobs}
        return {key: value for key, value in found.items() if value is not None}

    def _take_up(self, chunks: Iterable[Chunk]) -> list[_Watched]:
        """The tasks, submitted by an earlier `bench run` and not ended, that jobs of ours are in."""
        wanted = {job.key: job for chunk in chunks for job in chunk}
        taken: list[_Watched] = []
        while (living := self._forget_ended()) is None:  # without an answer, what SLURM has would be submitted again
            print("SLURM does not answer; asking again", file=sys.stderr)
            time.sleep(_ASK)
        for submission in living:
            for task, keys in zip(submission.tasks(), submission.keys, strict=True):
                jobs = tuple(wanted.pop(key) for key in keys if key in wanted)
                if jobs:
                    taken.append(_Watched(submission, task, jobs, list(jobs), time.monotonic()))
        if taken:
            jobs_taken = sum(len(watched.left) for watched in taken)
            print(f"SLURM has {jobs_taken} of these jobs from before; waiting for them", file=sys.stderr)
        return taken

    def _forget_ended(self) -> list[Submission] | None:
        """Forget submissions that have no task with SLURM any more, their private files with them; returns the others.

        None when SLURM does not answer, and nothing is forgotten.
        """
        known = self.submissions.all()  # before SLURM is asked: of what is submitted in between its answer would say nothing
        now = queue()
        if now is None:
            return None
        living = []
        for submission in (each.found_in(now) for each in known):
            if any(queued.name == submission.name for queued in now):
                self.submissions.put(submission)
                living.append(submission)
            elif submission.array is not None or self.submissions.age(submission) > _ON_ITS_WAY:
                self._forget(submission)
        return living

    def _forget(self, submission: Submission) -> None:
        self.submissions.drop(submission)
        shutil.rmtree(self.folder / submission.name, ignore_errors=True)

    def _submit(self, chunks: Sequence[Chunk], before: dict[str, str], run: Packed) -> None:
        size = largest_array() if chunks else 1
        for start in range(0, len(chunks), size):
            self._submit_array(chunks[start : start + size], before, run)

    def _submit_array(self, chunks: Sequence[Chunk], before: dict[str, str], run: Packed) -> None:
        from submitit import SlurmExecutor as Submitter
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        keys = {job.key for chunk in chunks for job in chunk}
        submission = Submission.of(chunks, {key: value for key, value in before.items() if key in keys})
        tasks = [
            NodeTask(
                folder=str(self.store.folder.resolve()),
                chunk=chunk,
                before={job.key: before[job.key] for job in chunk if job.key in before},
                run=run,
                lost=Packed.of(self.lost),
                timeout=self.timeout,
                retries=self.tries.retries,
                command=tuple(sys.argv),
            )
            for chunk in chunks
        ]
        self.submissions.put(submission)  # before SLURM has it: its name there leads back to this
        try:
            (self.folder / submission.name).mkdir(mode=0o700)
            submitter = Submitter(self.folder / submission.name)
            submitter.update_parameters(job_name=submission.name, **self.resources.for_submitit())
            submitted = submitter.submit_array(tasks)
        except (FailedJobError, FailedSubmissionError, ValueError, TypeError, OSError, subprocess.SubprocessError) as error:
            self._forget(submission)
            why = f"SLURM did not take {len(keys)} jobs: {one_line(error).rstrip('.')}"
            todo = "Mend that, or give it fewer at a time (--limit); the same command goes on from there."
            raise InvalidInput(" ".join(filter(None, (f"{why}. {todo}", self.parting)))) from error
        submission = replace(submission, array=submitted[0].job_id.partition("_")[0])
        self.submissions.put(submission)
        now = time.monotonic()
        for chunk, task in zip(chunks, submission.tasks(), strict=True):
            self._watched.append(_Watched(submission, task, chunk, list(chunk), now))
        jobs = sum(map(len, chunks))
        print(f"submitted {jobs} jobs to SLURM: array {submission.array}, {len(chunks)} tasks", file=sys.stderr)

    def _collect(self) -> Iterator[Outcome]:
        """Outcomes whose records are new. The node has stored their arrays."""
        list(self.store.records_dir.iterdir())  # a network file system looks again
        for watched in self._watched:
            for job in list(watched.left):
                if fingerprint(self.store, job) not in (None, watched.submission.before.get(job.key)):
                    record = self.store.get(job)
                    if record is not None:
                        watched.left.remove(job)
                        yield Outcome(record)

    def _ended(self) -> list[_Watched]:
        """Tasks that SLURM has ended, seen so often that their records would be here if there were any."""
        now = queue()
        if now is None:
            return []
        tasks = {queued.task for queued in now}
        for watched in self._watched:
            watched.absent = 0 if watched.task in tasks else watched.absent + 1
        return [watched for watched in self._watched if watched.absent >= _ABSENT]

    def _settle(self, watched: _Watched) -> tuple[list[Chunk], list[Outcome]]:
        state, code = how_it_ended(watched.task)
        words = self._last_line(watched)
        if forgotten := state == "UNKNOWN" and not words:  # before it began
            state = "CANCELLED" if was_taken_out(watched.task) else state
        final = state in ("CANCELLED", "DEADLINE", "TIMEOUT")
        node = not final and (forgotten or state in ("BOOT_FAIL", "NODE_FAIL", "PREEMPTED"))
        line = "" if final or node else words
        why = f"its SLURM task ended without a result: {state}, exit code {code}{f'; {line}' if line else ''}"
        seconds = time.monotonic() - watched.since
        return self.tries.settle(watched.chunk, watched.left, why, seconds, final=final, node=node)

    def _last_line(self, watched: _Watched) -> str:
        """The last words of a task, from submitit's log."""
        try:
            text = (self.folder / watched.submission.name / f"{watched.task}_0_log.out").read_text(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""
