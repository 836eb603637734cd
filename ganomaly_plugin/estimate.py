"""How long a sweep still takes, from what its jobs took so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from ganomaly_plugin.core import Job
from ganomaly_plugin.status import Status

#: Jobs of one kind take about equally long.
Kind = tuple[str, str]


def kind_of(job: Job) -> Kind:
    """What the duration of `job` mostly depends on."""
    return (job.detector_label, job.dataset)


def job_left(status: Status, expected: float | None, now: float) -> float | None:
    """Seconds that a running job still takes: by its own epochs while it trains, else by what its kind takes."""
    spent = max(0.0, now - status.started)
    if 0 < status.share < 1:
        return spent * (1 - status.share) / status.share
    return None if expected is None else max(0.0, expected - spent)


def expected_seconds(
    took: Iterable[tuple[Job, float]], running: Iterable[tuple[Job, Status]], now: float
) -> tuple[dict[Kind, float], float | None]:
    """Median seconds of a job of each kind that is known, and of all of them.

    Args:
        took: Finished jobs and their seconds.
        running: Those at work; where none of a kind is finished, their pace stands for it.
        now: Seconds since 1970.
    """
    finished: dict[Kind, list[float]] = {}
    paced: dict[Kind, list[float]] = {}
    for job, seconds in took:
        finished.setdefault(kind_of(job), []).append(seconds)
    for job, status in running:
        if status.share > 0:
            paced.setdefault(kind_of(job), []).append(max(0.0, now - status.started) / status.share)
    known = {kind: statistics.median(each) for kind, each in {**paced, **finished}.items()}
    return known, statistics.median(known.values()) if known else None


def sweep_left(
    waiting: Iterable[Job], running: Iterable[tuple[Job, Status]], took: Iterable[tuple[Job, float]], workers: int, now: float
) -> float | None:
    """Seconds until all is done, with `workers` jobs at a time; None while there is nothing to tell by."""
    running = list(running)
    known, typical = expected_seconds(took, running, now)
    if typical is None:
        return None
    left = [job_left(status, known.get(kind_of(job), typical), now) or 0.0 for job, status in running]
    work = sum(known.get(kind_of(job), typical) for job in waiting) + sum(left)
    return max([work / max(1, workers), *left])


def clock(seconds: float | None) -> str:
    """`0:07`, `12:30` or `3:05:00`; a dash for None."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
