"""What a SLURM task does on its node: run one chunk in a worker process, write its records into the shared results folder.

Nothing here imports torch before a worker does: the process that SLURM starts only watches over the one that works.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ganomaly_plugin.core import Chunk, Job
from ganomaly_plugin.executors.local import LocalExecutor
from ganomaly_plugin.store import Store


@dataclass(frozen=True)
class Packed:
    """A callable that is unpacked where it is called, so that to pass it on imports nothing."""

    content: bytes

    @classmethod
    def of(cls, function: Any) -> Packed:
        """Pack `function`."""
        return cls(pickle.dumps(function))

    def __call__(self, *words: Any) -> Any:
        """Unpack and call it."""
        return pickle.loads(self.content)(*words)


def fingerprint(store: Store, job: Job) -> str | None:
    """A digest of the record of `job` as it is now; None without one."""
    try:
        return hashlib.sha256(store.record_path(job).read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class NodeTask:
    """One task of a job array.

    Attributes:
        folder: The results folder.
        chunk: The jobs.
        before: Fingerprints, by job key, of records that are to be replaced.
        run: What a worker does with a chunk, packed.
        lost: Makes the outcome of a job whose worker died, packed.
        timeout: Seconds that a job may take.
        retries: Further tries for a job whose worker died.
        command: The command line that the records tell of.
    """

    folder: str
    chunk: Chunk
    before: Mapping[str, str]
    run: Packed
    lost: Packed
    timeout: float | None
    retries: int
    command: tuple[str, ...]

    def __call__(self) -> None:
        """Run what has no record yet: a task that SLURM queued again goes on where it was."""
        # SLURM's signals mean: cancelled, preempted, out of time. The task ends without blaming its job; what comes next
        # is SLURM's decision. SIGUSR2 is submitit's warning of the time limit: a job may use all of its time.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        sys.argv = list(self.command)
        if "SLURM_CPUS_PER_TASK" in os.environ:
            os.environ["OMP_NUM_THREADS"] = os.environ["SLURM_CPUS_PER_TASK"]
        store = Store(self.folder)
        left = tuple(job for job in self.chunk if fingerprint(store, job) == self.before.get(job.key))
        if left:
            executor = LocalExecutor([None], self.lost, timeout=self.timeout, retries=self.retries)
            for outcome in executor.map(self.run, [left]):
                store.settle(outcome)
