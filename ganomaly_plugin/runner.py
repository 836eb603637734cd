"""Jobs → records. One job's failure is its record; the sweep goes on."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ganomaly_plugin.cell import Cell
from ganomaly_plugin.claims import Claims
from ganomaly_plugin.core import Chunk, Executor, Job, Outcome, RunRecord, canonical_json
from ganomaly_plugin.detectors.base import resolve_device
from ganomaly_plugin.errors import FAULTS, BenchError, InvalidInput, one_line
from ganomaly_plugin.escape import printable, storable
from ganomaly_plugin.images import check_images
from ganomaly_plugin.integrity import check_storable
from ganomaly_plugin.provenance import environment
from ganomaly_plugin.stacking import why_alone, why_not_compiled
from ganomaly_plugin.status import JobStatus
from ganomaly_plugin.store import Store
from ganomaly_plugin.training.captured import record_on
from ganomaly_plugin.training.room import make_room
from ganomaly_plugin.training.stack import How
from ganomaly_plugin.training.together import Member, fit_together

_LOOK_AGAIN = 1.0  # seconds between looks at jobs that another sweep is at


@dataclass(frozen=True)
class Settings:
    """How to run jobs, as opposed to what they are: nothing here changes a job's key."""

    device: str = "auto"
    data_root: str | None = None
    status: str | None = None  # folder where running jobs tell how far they are; None: nobody watches
    compiled: bool = False  # call networks in training through torch.compile, where the method allows it
    how: How | None = None  # how the models of a stack advance; None: as the device likes it best
    cuda_graphs: bool = True  # let stacks on a GPU replay their steps as CUDA graphs


#: How to read and to set what detectors may change for their whole process, so that others' numbers would depend on the order.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (np.geterr, lambda kinds: np.seterr(**kinds)),
)


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Around what a detector does: what it changes for its whole process is put back, for the jobs that come after.

    What it prints goes to stderr, since stdout is for tables.
    """
    folder, process, switches = _here(), os.getpid(), [read() for read, _ in _SWITCHES]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if os.getpid() != process:  # a fork that the job let go on: one of the two is enough
            os._exit(0)
        for (read, switch), before in zip(_SWITCHES, switches, strict=True):
            if read() != before:
                switch(before)
        if folder is not None and folder != _here():
            with contextlib.suppress(OSError):  # somebody has removed it meanwhile
                os.chdir(folder)


def _here() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - no Path: each job asks twice
    except OSError:  # somebody has removed it
        return None


@_surroundings()
def run_job(job: Job, settings: Settings) -> Outcome:
    """Run one job from data to record; an error becomes a failed record."""
    began = time.perf_counter()
    try:
        with JobStatus(settings.status, job) as status:
            cell = Cell(job, data_root=settings.data_root, device=str(resolve_device(settings.device)))
            status.images = len(cell.split.train)
            if settings.compiled and why_not_compiled(job) is None:
                cell.detector.compiled = True
            outcome = cell.outcome(cell.fit(status))
        check_storable(outcome.record)
        return outcome
    except FAULTS as error:  # a detector may raise anything, and the sweep goes on
        return _failed(job, error, time.perf_counter() - began, settings)


def _failed(job: Job, error: BaseException, seconds: float, settings: Settings) -> Outcome:
    trace = None if isinstance(error, BenchError) else "".join(traceback.format_exception(error))
    return failure(job, one_line(error), seconds, settings, trace)


def failure(job: Job, error: str, seconds: float, settings: Settings, trace: str | None = None) -> Outcome:
    """The outcome of a job that failed, with the reason in one line; what is no text of UTF-8 is escaped."""
    record = RunRecord(
        job=job,
        status="failed",
        error=storable(error),
        traceback=None if trace is None else storable(trace),
        seconds={"total": seconds},
        environment=environment(_device_name(settings.device)),
    )
    return Outcome(record)


def run_chunk(chunk: Chunk, settings: Settings) -> Iterator[Outcome]:
    """Run the jobs of a chunk; exactly one outcome each. Several are a stack: their models are trained together.

    When that fails as a whole the jobs left are run one by one. Where a way of stacking is named, a job alone is a stack too:
    its numbers depend on what else there is to do by rounding only.
    """
    left = list(chunk)
    if len(chunk) > 1 or (settings.how is not None and _stacks(chunk[0])):
        try:
            outcomes = _run_stack(chunk, settings)
            while outcome := _next(outcomes):
                left.remove(outcome.record.job)
                yield outcome
        except FAULTS as error:  # whose fault it is shows when each runs alone
            several = f"{len(left)} jobs do not train together, and run one by one"
            what = several if len(left) > 1 else "1 job does not train in a stack, and runs by itself"
            print(f"{what}: {one_line(error)}", file=sys.stderr)
        if left:
            with contextlib.suppress(RuntimeError):  # from a device that refuses everything, as the jobs will then say
                make_room()
    for job in left:
        yield run_job(job, settings)


@_surroundings()
def _next(outcomes: Iterator[Outcome]) -> Outcome | None:
    return next(outcomes, None)


def _stacks(job: Job) -> bool:
    try:
        return why_alone(job) is None
    except FAULTS:  # its detector cannot be made here, as its record will say
        return False


def _run_stack(chunk: Chunk, settings: Settings) -> Iterator[Outcome]:
    """Train the models of jobs that share detector, hyperparameters, data and budget together, and score each by itself."""
    device = resolve_device(settings.device)
    began = time.perf_counter()
    cells: list[tuple[Cell, Member]] = []
    with contextlib.ExitStack() as watched:
        for job in chunk:
            status = watched.enter_context(JobStatus(settings.status, job))
            try:
                cell = Cell(job, data_root=settings.data_root, device=str(device))
            except FAULTS as error:  # its own affair, as in `run_job`
                yield _failed(job, error, time.perf_counter() - began, settings)
                continue
            status.images = len(cell.split.train)
            index = torch.from_numpy(cell.split.train)
            cells.append((cell, Member(cell.detector, index, job.seed, status.hook(cell.oracle))))
        if not cells:
            return
        first = cells[0][0]
        steps, epochs = first.job.steps, first.job.epochs
        members, images = [member for _, member in cells], check_images(first.dataset.images)
        record = record_on(device) if settings.cuda_graphs else None
        began = time.perf_counter()
        fit_together(members, images, epochs=epochs, steps=steps, device=device, how=settings.how, record=record)
        oracles = sum(cell.oracle.seconds for cell, _ in cells if cell.oracle)
        seconds = (time.perf_counter() - began - oracles) / len(cells)  # each job's share
        failures = []
        for cell, member in cells:
            try:
                if member.error is not None:
                    raise member.error
                outcome = cell.outcome(seconds)
                check_storable(outcome.record)
            except FAULTS as error:
                failures.append(_failed(cell.job, error, seconds, settings))
            else:
                yield outcome
        yield from failures  # last: --fail-fast stops at the first


def _device_name(device: str) -> str:
    try:
        return str(resolve_device(device))
    except BenchError:
        return device


@dataclass
class Plan:
    """What a sweep still has to do: all its jobs, and those whose record is missing."""

    jobs: list[Job]
    missing: list[Job]
    done: list[RunRecord]
    failed: list[RunRecord]
    again: list[RunRecord]  # old failures among the missing


def make_plan(jobs: list[Job], store: Store | None, *, retry_failed: bool = False) -> Plan:
    """Compare `jobs` with the records of `store`; a failed job is run again only with `retry_failed`.

    Raises:
        CorruptFile: A record or its scores are damaged.
    """
    plan = Plan(jobs, [], [], [], [])
    for job in jobs:
        record = store.get(job) if store is not None else None
        if store is not None and record is not None and record.status == "done":
            store.scores(job)
            plan.done.append(record)
        elif record is not None and not retry_failed:
            plan.failed.append(record)
        else:
            plan.missing.append(job)
            plan.again += [record] if record is not None else []
    return plan


def check_unchanged(plan: Plan, store: Store, splits: Mapping[str, str]) -> None:
    """Raise InvalidInput when finished jobs are of other images or splits than `splits` has now for jobs of `plan`.

    Whatever their detectors, jobs on the same data with the same class and seed share a table.
    """
    now = {_of_split(job): splits[job.key] for job in plan.jobs if job.key in splits}
    found = store.records_as_stored() if plan.missing else plan.done  # which is all that counts where nothing is added
    done = [record for record in found if record.status == "done" and _of_split(record.job) in now]
    stale = [record.job for record in done if record.split_digest not in (None, now[_of_split(record.job)])]
    if stale:
        raise InvalidInput(
            f"{stale[0].dataset} has changed: {len(stale)} of {len(done)} finished jobs are of other images or splits, "
            f"and are not repeated. Give another --out, or delete their records, such as {store.record_path(stale[0])}."
        )


def _of_split(job: Job) -> str:
    """Equal for jobs that must have equal splits."""
    return canonical_json([job.dataset, dict(job.data), job.protocol, dict(job.sampling), job.category, job.seed])


#: Which jobs go together: every job in exactly one chunk.
Chunked = Callable[[list[Job]], Iterable[Chunk]]


def sweep(
    plan: Plan,
    store: Store,
    executor: Executor,
    run: Callable[[Chunk], Iterable[Outcome]],
    chunked: Chunked,
) -> Generator[RunRecord, None, None]:
    """Run what is missing, store each outcome as it comes, and yield its record.

    Another sweep on the same folder at the same time takes its share: a job that it is at is left to it, and comes from
    the store once it is done there.
    """
    before = {record.job.key: record for record in plan.again}
    waiting, told = list(plan.missing), False
    with Claims(store.folder / "claims") as claims:
        while waiting:
            taken: set[str] = set()
            mine = _claimed(chunked(waiting), store, before, claims, taken)
            first = next(mine, None)
            # An executor may have to ask a cluster before it starts: only where there is something to do.
            for outcome in executor.map(run, itertools.chain([first], mine)) if first is not None else ():
                settled = store.settle(outcome)
                claims.release(settled.job)
                yield settled
            left = [job for job in waiting if job.key not in taken]
            waiting = []
            for job in left:
                record = store.get(job)
                if record is None or record == before.get(job.key):
                    waiting.append(job)
                else:
                    yield record
            if waiting:
                told = told or _tell_who_is_at(waiting, claims)
                time.sleep(_LOOK_AGAIN)


def _tell_who_is_at(jobs: list[Job], claims: Claims) -> bool:
    """Say whom a sweep waits for, where that is known."""
    holders = sorted({holder for job in jobs if (holder := claims.holder(job)) is not None})
    if holders:
        count = f"{len(jobs)} jobs" if len(jobs) > 1 else "1 job"
        print(f"waiting for {count} that another bench run is at ({printable(', '.join(holders))})", file=sys.stderr)
    return bool(holders)


def _claimed(
    chunks: Iterable[Chunk], store: Store, before: dict[str, RunRecord], claims: Claims, taken: set[str]
) -> Iterator[Chunk]:
    """The chunks, less the jobs that somebody else is at or has finished since, claimed as an executor asks for them."""
    for chunk in chunks:
        mine = []
        for job in chunk:
            if store.get(job) == before.get(job.key) and claims.take(job):
                if store.get(job) == before.get(job.key):
                    mine.append(job)
                else:  # finished by another between the look and the claim
                    claims.release(job)
        taken.update(job.key for job in mine)
        if mine:
            yield tuple(mine)
