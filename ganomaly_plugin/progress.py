"""Progress of a sweep on stderr: a live table on a terminal (see `live`), one plain line a job anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.escape import printable

if TYPE_CHECKING:
    from ganomaly_plugin.runner import Plan

STATUS_FOLDER = "running"  # in a results folder, while somebody watches


def describe(record: RunRecord) -> str:
    """One line for a finished job."""
    return printable(_described(record))


def _described(record: RunRecord) -> str:
    job = record.job
    where = f"{job.detector_label} · {job.dataset} · {job.part} · seed {job.seed}"
    if record.status == "failed":
        return f"{where}: FAILED: {record.error}"
    seconds = sum(record.seconds.values())
    said = record.notes.get("describe", {}).get("fallbacks")  # of another package's detector this may be anything
    words = said if isinstance(said, (list, tuple)) and all(isinstance(each, str) for each in said) else []
    return "; ".join([f"{where}: AUROC {record.metrics['auroc']:.3f} ({seconds:.1f} s)", *words])


def status_folder(out: Path, stream: TextIO | None = None) -> Path | None:
    """Where running jobs shall tell how far they are: below `out` when `stream` (stderr) is a terminal, else nowhere."""
    from rich.console import Console

    stream = stream or sys.stderr
    console = Console(file=stream)
    watched = stream.isatty() and console.is_interactive and not console.options.ascii_only  # dumb ones cannot redraw
    return out.resolve() / STATUS_FOLDER if watched else None


@contextlib.contextmanager
def following(plan: Plan, folder: Path | None) -> Iterator[Follower]:
    """Show the sweep `plan` on stderr: live where `folder` (of `status_folder`) is given, else in lines."""
    if folder is None:
        yield Lines(len(plan.missing))
        return
    from ganomaly_plugin.live import live

    with live(plan, folder) as shown:
        yield shown


class Follower(ABC):
    """Is told of each record as it comes."""

    @abstractmethod
    def add(self, record: RunRecord) -> None:
        """Show `record`."""

    def follow(self, records: Iterable[RunRecord]) -> Iterator[RunRecord]:
        """Yield `records`, each shown before."""
        for record in records:
            self.add(record)
            yield record


class Lines(Follower):
    """One plain line a job, for logs."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.count, self.stream = total, 0, stream or sys.stderr

    def add(self, record: RunRecord) -> None:
        """Print a line."""
        self.count += 1
        print(f"[{self.count}/{self.total}] {describe(record)}", file=self.stream, flush=True)


def elapsed(began: float) -> str:
    """Time since `began` (`time.perf_counter`), for people."""
    seconds = time.perf_counter() - began
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
