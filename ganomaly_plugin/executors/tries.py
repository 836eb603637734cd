"""What becomes of jobs whose worker was lost: tried again, or failed. One rule for every executor that has workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ganomaly_plugin.core import Chunk, Job, Outcome

#: `lost(job, why, seconds)` makes the failed outcome of a job that a worker took with it.
Lost = Callable[[Job, str, float], Outcome]

NODE_TRIES = 5  # machines that may be lost under a job before it is suspected of taking them down


class Tries:
    """Counts lost workers.

    A job is blamed only for what happens to it alone: when a chunk of several jobs is lost, whatever the reason, its
    unfinished jobs are run again one by one. Blame is a failed record after `retries` further tries, and at once when
    trying again would be no different (`final`).
    """

    def __init__(self, lost: Lost, retries: int) -> None:
        self.lost, self.retries = lost, retries
        self._deaths: Counter[str] = Counter()  # of workers, by job key
        self._nodes: Counter[str] = Counter()  # of machines

    def settle(
        self, chunk: Chunk, left: Iterable[Job], why: str, seconds: float, *, final: bool = False, node: bool = False
    ) -> tuple[list[Chunk], list[Outcome]]:
        """Decide about the jobs `left` of a lost `chunk`.

        Args:
            chunk: The jobs that were run together.
            left: Those of them without an outcome.
            why: What happened, for people; becomes the record's error.
            seconds: How long the chunk had run.
            final: It would happen again: a time limit.
            node: The whole machine was lost, which is hardly the job's fault.

        Returns:
            Chunks to run again, and outcomes of jobs that have failed.
        """
        if len(chunk) > 1:
            return [(job,) for job in left], []
        again: list[Chunk] = []
        failed: list[Outcome] = []
        for job in left:
            counter, limit = (self._nodes, max(self.retries, NODE_TRIES - 1)) if node else (self._deaths, self.retries)
            counter[job.key] += 1
            if not final and counter[job.key] <= limit:
                again.append((job,))
            else:
                tries = f" (try {counter[job.key]})" if counter[job.key] > 1 else ""
                failed.append(self.lost(job, why + tries, seconds))
        return again, failed
