"""Jobs one after another in this process: the simplest executor, and the one to debug with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ganomaly_plugin.core import Chunk, Outcome


class InlineExecutor:
    """Runs each chunk here, in order."""

    parting = ""

    def map(self, run: Callable[[Chunk], Iterable[Outcome]], chunks: Iterable[Chunk]) -> Iterator[Outcome]:
        """Yield the outcome of each job as it is done."""
        for chunk in chunks:
            yield from run(chunk)
