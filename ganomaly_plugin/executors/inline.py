"""Jobs one after another in this process: the simplest executor, and the one to debug with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ganomaly_plugin.core import Job, Outcome


class InlineExecutor:
    """Runs each job here, in order."""

    def map(self, run: Callable[[Job], Outcome], jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Yield the outcome of each job as it is done."""
        for job in jobs:
            yield run(job)
