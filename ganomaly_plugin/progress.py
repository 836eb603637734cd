"""Progress of a sweep on stderr: a live bar on a terminal, one plain line a job anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

from ganomaly_plugin.core import RunRecord


def describe(record: RunRecord) -> str:
    """One line for a finished job."""
    job = record.job
    where = f"{job.label or job.detector} · {job.dataset} · class {job.category} · seed {job.seed}"
    if record.status == "failed":
        return f"{where}: FAILED: {record.error}"
    seconds = sum(record.seconds.values())
    said = record.notes.get("describe", {}).get("fallbacks", [])
    return "; ".join([f"{where}: AUROC {record.metrics['auroc']:.3f} ({seconds:.1f} s)", *said])


def follow(records: Iterable[RunRecord], total: int, stream: TextIO | None = None) -> Iterator[RunRecord]:
    """Yield `records`, showing each on `stream` (stderr) as it comes; `total` of them are expected."""
    stream = stream or sys.stderr
    return _bar(records, total, stream) if stream.isatty() else _lines(records, total, stream)


def _lines(records: Iterable[RunRecord], total: int, stream: TextIO) -> Iterator[RunRecord]:
    for count, record in enumerate(records, 1):
        print(f"[{count}/{total}] {describe(record)}", file=stream, flush=True)
        yield record


def _bar(records: Iterable[RunRecord], total: int, stream: TextIO) -> Iterator[RunRecord]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        task = progress.add_task("jobs", total=total)
        for record in records:
            style = "red" if record.status == "failed" else "default"
            progress.console.print(f"[{style}]{escape(describe(record))}[/{style}]", highlight=False)
            progress.advance(task)
            yield record


def elapsed(began: float) -> str:
    """Time since `began` (`time.perf_counter`), for people."""
    seconds = time.perf_counter() - began
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
