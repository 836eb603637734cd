"""Jobs → records. One job's failure is its record; the sweep goes on."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ganomaly_plugin.claims import Claims
from ganomaly_plugin.core import Chunk, Detector, Executor, Job, Outcome, RunRecord
from ganomaly_plugin.datasets.base import load_dataset
from ganomaly_plugin.datasets.splits import Split, get_protocol, make_split
from ganomaly_plugin.detectors.base import resolve_device
from ganomaly_plugin.errors import BenchError, InvalidInput, one_line
from ganomaly_plugin.integrity import check_storable
from ganomaly_plugin.metrics import RANKING_METRICS, auroc, check_scores, named_arrays
from ganomaly_plugin.pixel_metrics import aupro, pixel_auroc
from ganomaly_plugin.provenance import environment
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.samples import sample
from ganomaly_plugin.status import JobStatus
from ganomaly_plugin.store import Store

_LOOK_AGAIN = 1.0  # seconds between looks at jobs that another sweep is at
REFERENCE_LIMIT = 2000  # training images scored for the threshold when a protocol holds none out


@dataclass(frozen=True)
class Settings:
    """How to run jobs, as opposed to what they are: nothing here changes a job's key."""

    device: str = "auto"
    data_root: str | None = None
    status: str | None = None  # folder where running jobs tell how far they are; None: nobody watches


def seed_everything(job: Job) -> None:
    """Seed the global generators from the job alone, for detectors that use them."""
    seed = int(job.key, 16) % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - other packages' detectors read the global state
    torch.manual_seed(seed)


def run_job(job: Job, settings: Settings) -> Outcome:
    """Run one job from data to record; an error becomes a failed record."""
    began = time.perf_counter()
    try:
        with JobStatus(settings.status, job) as status:
            outcome = _run(job, settings, status)
        check_storable(outcome.record)
        return outcome
    except Exception as error:  # a detector may raise anything, and the sweep goes on
        trace = None if isinstance(error, BenchError) else traceback.format_exc()
        return failure(job, one_line(error), time.perf_counter() - began, settings, trace)


def failure(job: Job, error: str, seconds: float, settings: Settings, trace: str | None = None) -> Outcome:
    """The outcome of a job that failed, with the reason in one line."""
    record = RunRecord(
        job=job,
        status="failed",
        error=error,
        traceback=trace,
        seconds={"total": seconds},
        environment=environment(_device_name(settings.device)),
    )
    return Outcome(record)


def run_chunk(chunk: Chunk, settings: Settings) -> Iterator[Outcome]:
    """Run the jobs of a chunk; exactly one outcome each."""
    for job in chunk:
        yield run_job(job, settings)


def _device_name(device: str) -> str:
    try:
        return str(resolve_device(device))
    except BenchError:
        return device


def _run(job: Job, settings: Settings, status: JobStatus) -> Outcome:
    seed_everything(job)
    device = str(resolve_device(settings.device))
    dataset = load_dataset(job.dataset, root=settings.data_root, **job.data)
    split = make_split(dataset, job.protocol, job.category, job.seed, **job.sampling)
    test = dataset.images[split.test]
    oracle = _Oracle(job, test, split.is_anomaly) if get_protocol(job.protocol).oracle else None
    detector = make_detector(job.detector, **job.hparams)

    began = time.perf_counter()
    budget = {"epochs": job.epochs} if job.steps is None else {"steps": job.steps}
    status.images = len(split.train)
    detector.fit(dataset.images[split.train], seed=job.seed, device=device, on_epoch=status.hook(oracle), **budget)
    fit_seconds = time.perf_counter() - began - (oracle.seconds if oracle else 0.0)
    began = time.perf_counter()
    score = check_scores(detector.score(test), len(test), job.label or job.detector)
    score_seconds = time.perf_counter() - began

    reference_index, origin = _reference(job, split)
    reference = check_scores(detector.score(dataset.images[reference_index]), len(reference_index), job.label or job.detector)
    metrics = {name: measure(split.is_anomaly, score) for name, measure in RANKING_METRICS.items()}
    history: list[dict[str, float]] = [dict(losses) for losses in getattr(detector, "history_", [])]
    if oracle is not None and oracle.aurocs:
        metrics["auroc_oracle"] = max(oracle.aurocs)
        metrics["oracle_epoch"] = float(np.argmax(oracle.aurocs)) + 1
        history = [{**(history[k] if k < len(history) else {}), "oracle_auroc": value} for k, value in enumerate(oracle.aurocs)]
    notes: dict[str, Any] = {"describe": detector.describe() if hasattr(detector, "describe") else {}}
    notes["source"] = dict(dataset.source)
    if dataset.masks is not None and getattr(detector, "has_anomaly_map", False):
        metrics |= _pixel_metrics(detector, test, dataset.masks[split.test], notes)
    n_anomalous = int(split.is_anomaly.sum())
    record = RunRecord(
        job=job,
        status="done",
        metrics=metrics,
        counts={
            "train": len(split.train),
            "train_anomalous": split.contaminating,
            "reference": len(reference),
            "test_normal": len(test) - n_anomalous,
            "test_anomalous": n_anomalous,
        },
        seconds={"fit": fit_seconds, "score": score_seconds},
        split_digest=split.digest,
        reference=origin,
        notes=notes,
        environment=environment(device),
        history=history,
    )
    arrays = {"score": score, "is_anomaly": split.is_anomaly, "test_index": split.test, "reference_score": reference}
    if hasattr(detector, "named_scores"):
        arrays |= named_arrays(detector.named_scores(test), detector.named_scores(dataset.images[reference_index]))
    return Outcome(record, arrays, sample(detector, test, split.is_anomaly, score))


def _pixel_metrics(detector: Any, test: np.ndarray, masks: np.ndarray, notes: dict[str, Any]) -> dict[str, float]:
    """Pixel AUROC and AUPRO of the anomaly maps; a measure that cannot be taken is a note instead."""
    maps = np.asarray(detector.anomaly_map(test))
    found = {}
    for name, measure in (("pixel_auroc", pixel_auroc), ("aupro", aupro)):
        try:
            found[name] = measure(maps, masks)
        except InvalidInput as error:
            notes[name] = one_line(error)
    return found


def _reference(job: Job, split: Split) -> tuple[np.ndarray, str]:
    """Normal images for a threshold: the held-out ones, else a seeded sample of the training images."""
    if len(split.reference):
        return split.reference, "held-out"
    order = np.random.default_rng([job.seed, 3]).permutation(split.train)
    return np.sort(order[:REFERENCE_LIMIT]), "train"


class _Oracle:
    """Test AUROC after each epoch: what choosing the epoch on the test set would give. Recorded, never the result."""

    def __init__(self, job: Job, test: np.ndarray, is_anomaly: np.ndarray) -> None:
        self.name, self.test, self.is_anomaly = job.label or job.detector, test, is_anomaly
        self.aurocs: list[float] = []
        self.seconds = 0.0

    def __call__(self, epoch: int, detector: Detector) -> None:
        began = time.perf_counter()
        score = check_scores(detector.score(self.test), len(self.test), self.name)
        self.aurocs.append(auroc(self.is_anomaly, score))
        self.seconds += time.perf_counter() - began


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


def sweep(
    plan: Plan, store: Store, executor: Executor, run: Callable[[Chunk], Iterable[Outcome]]
) -> Generator[RunRecord, None, None]:
    """Run what is missing, store each outcome as it comes, and yield its record.

    Another sweep on the same folder at the same time takes its share: a job that it is at is left to it, and comes from
    the store once it is done there.
    """
    before = {record.job.key: record for record in plan.again}
    waiting = list(plan.missing)
    with Claims(store.folder / "claims") as claims:
        while waiting:
            taken: set[str] = set()
            for outcome in executor.map(run, _claimed(waiting, store, before, claims, taken)):
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
                time.sleep(_LOOK_AGAIN)


def _claimed(jobs: list[Job], store: Store, before: dict[str, RunRecord], claims: Claims, taken: set[str]) -> Iterator[Chunk]:
    """Those of `jobs` that nobody else is at or has finished since, each claimed as an executor asks for it."""
    for job in jobs:
        if store.get(job) == before.get(job.key) and claims.take(job):
            if store.get(job) == before.get(job.key):
                taken.add(job.key)
                yield (job,)
            else:  # finished by another between the look and the claim
                claims.release(job)
