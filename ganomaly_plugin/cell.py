"""One job between its data and its outcome: what is trained on, what is scored, and what is made of the scores."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ganomaly_plugin import facts
from ganomaly_plugin.core import Detector, Job, Outcome, RunRecord
from ganomaly_plugin.datasets.base import ImageDataset, load_dataset
from ganomaly_plugin.datasets.splits import Split, get_protocol, leaked, make_split
from ganomaly_plugin.errors import FAULTS, InvalidInput, one_line
from ganomaly_plugin.metrics import RANKING_METRICS, auroc, check_scores, named_arrays
from ganomaly_plugin.pixel_metrics import aupro, pixel_auroc
from ganomaly_plugin.provenance import environment
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.samples import sample
from ganomaly_plugin.seeding import seed_all, seeded
from ganomaly_plugin.status import JobStatus

REFERENCE_LIMIT = 2000  # training images scored for the threshold when a protocol holds none out


def _seed(job: Job) -> int:
    """Of the global generators, for detectors that use them: from the job alone."""
    return int(job.key, 16) % 2**32


class Cell:
    """A job with its data and a detector that is yet to be fitted.

    Args:
        job: The job.
        data_root: Folder of the data sets.
        device: The torch device that it is trained and scored on.

    Raises:
        BenchError: The data set, the split or the detector cannot be had.
    """

    def __init__(self, job: Job, *, data_root: str | None, device: str) -> None:
        seed_all(_seed(job))
        self.job, self.device = job, device
        self.dataset = load_dataset(job.dataset, root=data_root, **job.data)
        self.split = make_split(self.dataset, job.protocol, job.category, job.seed, **job.sampling)
        self.oracle = Oracle(self) if get_protocol(job.protocol).oracle else None
        self.detector: Any = make_detector(job.detector, **job.hparams)

    @property
    def budget(self) -> dict[str, int | None]:
        """The job's epochs or steps, as `fit` takes them."""
        return {"epochs": self.job.epochs} if self.job.steps is None else {"steps": self.job.steps}

    def fit(self, status: JobStatus) -> float:
        """Train the detector; the seconds that took, without what the oracle took."""
        began = time.perf_counter()
        train = self.dataset.images[self.split.train]
        hook = status.hook(self.oracle)
        self.detector.fit(train, seed=self.job.seed, device=self.device, on_epoch=hook, **self.budget)
        return time.perf_counter() - began - (self.oracle.seconds if self.oracle else 0.0)

    def score(self, index: np.ndarray) -> np.ndarray:
        """Checked scores of the images at `index`, float64 `(n,)`."""
        return check_scores(self.detector.score(self.dataset.images[index]), len(index), self.job.detector_label)

    def outcome(self, fit_seconds: float) -> Outcome:
        """Score with the fitted detector and make the record."""
        seed_all(_seed(self.job))  # scores are the same alone and in a stack that drew before
        job, split, detector, label = self.job, self.split, self.detector, self.job.detector_label
        began = time.perf_counter()
        score = self.score(split.test)
        score_seconds = time.perf_counter() - began

        reference_index, origin = _reference(job, split)
        reference = self.score(reference_index)
        metrics = {name: measure(split.is_anomaly, score) for name, measure in RANKING_METRICS.items()}
        history = facts.history(detector, label)
        if self.oracle is not None and self.oracle.aurocs:
            aurocs = self.oracle.aurocs
            metrics["auroc_oracle"] = max(aurocs)
            metrics["oracle_epoch"] = float(np.argmax(aurocs)) + 1
            history = [{**(history[k] if k < len(history) else {}), "oracle_auroc": value} for k, value in enumerate(aurocs)]
        notes: dict[str, Any] = {"describe": facts.described(detector, label)}
        notes["source"], notes["data"] = dict(self.dataset.source), self.dataset.digest
        notes["leaked"] = leaked(self.dataset, split)
        test = self.dataset.images[split.test]
        metrics |= _pixel_metrics(detector, test, self.dataset, split, notes)
        arrays = {"score": score, "is_anomaly": split.is_anomaly, "test_index": split.test, "reference_score": reference}
        if self.dataset.files is not None:
            arrays["test_file"] = self.dataset.files[split.test]
        arrays |= named_arrays(*facts.named_scores(detector, label, test, self.dataset.images[reference_index]))
        try:
            images = sample(detector, test, split.is_anomaly, score)
        except FAULTS as error:  # no part of the result
            images, notes["samples"] = {}, one_line(error)
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
            environment=environment(self.device),
            history=history,
        )
        return Outcome(record, arrays, images)


def _pixel_metrics(
    detector: Any, test: np.ndarray, dataset: ImageDataset, split: Split, notes: dict[str, Any]
) -> dict[str, float]:
    """Pixel AUROC and AUPRO where there are masks and anomaly maps; a measure that cannot be taken is a note instead."""
    if dataset.masks is None or not getattr(detector, "has_anomaly_map", False):
        return {}
    tested = split.test[split.is_anomaly]
    without = 0 if dataset.has_mask is None else int((~dataset.has_mask[tested]).sum())
    if without:  # the pixels of their defects would count as normal
        why = f"{without} of {len(tested)} tested anomalies have no mask. Give each of them one, or leave them out."
        notes |= {"pixel_auroc": why, "aupro": why}
        return {}
    masks = dataset.masks[split.test]
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


class Oracle:
    """Test AUROC after each epoch: what choosing the epoch on the test set would give. Recorded, never the result."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.aurocs: list[float] = []
        self.seconds = 0.0

    def __call__(self, epoch: int, detector: Detector) -> None:
        """Score the test images after `epoch`; epoch 1 begins anew, for a fit may have to be started again."""
        if epoch == 1:
            self.aurocs, self.seconds = [], 0.0
        began = time.perf_counter()
        images, device = self.cell.dataset.images[self.cell.split.test], self.cell.device
        with seeded(_seed(self.cell.job), [device] if device.startswith("cuda") else []):  # training goes on after it
            score = check_scores(detector.score(images), len(images), self.cell.job.detector_label)
        self.aurocs.append(auroc(self.cell.split.is_anomaly, score))
        self.seconds += time.perf_counter() - began
