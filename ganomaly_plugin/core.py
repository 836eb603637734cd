"""The nouns that everything else passes along: jobs, records, and what a detector and an executor are.

Data flows one way, config → jobs → fit/score → records → tables. This module is the currency of that flow:
it imports no heavy package, so that `bench --help` does not wait for torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

#: Called after each epoch as `on_epoch(epoch, detector)`, epochs counted from 1; the detector can score.
OnEpoch = Callable[[int, "Detector"], None]


@runtime_checkable
class Detector(Protocol):
    """An image anomaly detector: all that the runner ever sees of a method.

    Constructors only store hyperparameters. Images are `(n, c, h, w)`, uint8 in [0, 255] or float in [-1, 1].
    A detector may also have `anomaly_map(images) -> (n, h, w)`, `history_` (one dict of mean losses an epoch), `hparams`
    (its hyperparameters) and `describe()` (plain facts for the record).

    Another package's detector needs no more than these three methods to be run and compared. The easy way to the rest
    (checked images, one-line errors, files that `load_detector` reads) is to subclass
    `ganomaly_plugin.detectors.base.BaseDetector`. Without it, `load_detector` wants from `save` a `torch.save` file of
    tensors and plain values with BaseDetector's keys, and from the class `_load_state(state, device)`.
    `bench test package.module:Class` runs the conformance suite (`ganomaly_plugin.conformance`) on either.
    """

    def fit(
        self,
        images: ArrayLike,
        *,
        seed: int = 0,
        epochs: int | None = None,
        device: str = "auto",
        on_epoch: OnEpoch | None = None,
    ) -> Detector:
        """Learn from normal images only and return self. `epochs=None` takes the method's published budget."""
        ...

    def score(self, images: ArrayLike) -> np.ndarray:
        """Anomaly scores, float64 `(n,)`; higher is more anomalous, on no fixed scale."""
        ...

    def save(self, path: str) -> None:
        """Write the fitted detector to one file that `load_detector` reads without unpickling code."""
        ...


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
_UNSAFE = re.compile(r"[^A-Za-z0-9_.]+")  # in a file's name


def canonical_json(value: Any) -> str:
    """`value` as the one JSON text that equal values share (sorted keys, no spaces, tuples as lists)."""
    return _CANONICAL.encode(value)


@dataclass(frozen=True)
class Job:
    """One cell of a sweep: everything that determines its result, and nothing else.

    `hparams` and `data` are fully resolved (defaults included), so two ways of writing one job share its `key`,
    and a change of a default is a different job.
    """

    detector: str
    hparams: Mapping[str, Any]
    dataset: str
    data: Mapping[str, Any]  # image_size and the data set's own options
    protocol: str
    category: str  # the class that is anomalous, or normal: the protocol says which
    seed: int
    epochs: int | None  # None: the detector has no epochs
    sampling: Mapping[str, Any] = field(default_factory=dict)  # train_fraction, contamination; only when they are set
    steps: int | None = None  # the budget in steps; epochs is None then
    label: str = field(default="", compare=False)  # how tables call the detector; not part of the key

    @functools.cached_property
    def key(self) -> str:
        """A 16-digit hash of the job; leaves out device, workers, output folder, order and label, and steps when unset."""
        content = {name: getattr(self, name) for name in _KEYED}
        if self.steps is None:  # records from before there were budgets in steps keep their keys
            del content["steps"]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]

    @property
    def slug(self) -> str:
        """The readable stem of the job's files: detector, data set, class, seed, then the key."""
        words = [self.detector, self.dataset, self.category, f"s{self.seed}", self.key]
        return "-".join(_UNSAFE.sub("_", word).strip("._")[:40] or "x" for word in words)

    @property
    def detector_label(self) -> str:
        """How tables and messages call the detector."""
        return self.label or self.detector

    @property
    def title(self) -> str:
        """How messages call the job."""
        return f"{self.detector_label} · {self.dataset} · {self.protocol} · {self.part} · seed {self.seed}"

    @property
    def part(self) -> str:
        """The class in words, after the category of a data set that has some, as MVTec AD does."""
        category = self.data.get("category")
        return f"{category} · class {self.category}" if category else f"class {self.category}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict from which `from_dict` makes the same job."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Job:
        """The inverse of `to_dict`; a missing or unknown field raises TypeError."""
        return cls(**content)


_KEYED = tuple(each.name for each in fields(Job) if each.name != "label")

Status = Literal["done", "failed"]


@dataclass(frozen=True)
class RunRecord:
    """What became of one job. Tables are made from records alone."""

    job: Job
    status: Status
    error: str | None = None  # one line, for a failed job
    traceback: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)  # images: train, of them anomalous, reference, test
    seconds: Mapping[str, float] = field(default_factory=dict)  # fit, score
    split_digest: str | None = None
    reference: str | None = None  # where normal reference scores come from: "held-out" or "train"
    notes: Mapping[str, Any] = field(default_factory=dict)  # what a detector says of its fit; where its images came from
    environment: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)  # mean losses, one entry an epoch
    files: Mapping[str, str] = field(default_factory=dict, compare=False)  # sha256 of its scores and images; the store's

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, with the job's key beside the job."""
        return {"format": 2, "key": self.job.key, **asdict(self)}


@dataclass(frozen=True)
class Outcome:
    """A finished job on its way to the store: its record and, when done, its arrays and sample images (`.npz`)."""

    record: RunRecord
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    images: Mapping[str, np.ndarray] = field(default_factory=dict)


#: Jobs that are run together, in one process on one device: one job, or a stack of jobs trained at once.
Chunk = tuple[Job, ...]


class Executor(Protocol):
    """Runs chunks of jobs somewhere and yields outcomes in any order; a job that fails is an outcome, not an exception."""

    @property
    def parting(self) -> str:
        """What to tell who leaves a sweep about the jobs that were running; empty: they ended with it."""
        ...

    def map(self, run: Callable[[Chunk], Iterable[Outcome]], chunks: Iterable[Chunk]) -> Iterator[Outcome]:
        """Apply `run` to each chunk; each of its jobs has exactly one outcome."""
        ...
