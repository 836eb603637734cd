"""What running jobs tell of themselves: one small file each, for whoever watches the sweep from another process.

Nothing depends on these files. A reader passes over one that is damaged or that a dead process left behind, and no file is
written unless somebody watches.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ganomaly_plugin.claims import is_alive, this_host, this_system
from ganomaly_plugin.core import Detector, Job, OnEpoch

INTERVAL = 1.0  # seconds between two writes of a job's file


@dataclass(frozen=True)
class Status:
    """How far a running job is.

    Attributes:
        started: When it began, seconds since 1970.
        host: The system it runs on, as `here` calls it.
        pid: Its process there.
        done: Epochs or steps behind it.
        total: Those it will take at most; None when the method has none.
        unit: "epochs" or "steps".
        losses: Mean losses of the last epoch.
        images_per_second: Training images in a second of the last epoch; None before its end.
    """

    started: float
    host: str
    pid: int
    done: int = 0
    total: int | None = None
    unit: str = "epochs"
    losses: Mapping[str, float] = field(default_factory=dict)
    images_per_second: float | None = None

    @property
    def share(self) -> float:
        """The part of the training that is done, in [0, 1]; 0 where that is not known."""
        return min(1.0, self.done / self.total) if self.total else 0.0


def here() -> str:
    """What tells this machine, and this container of it, from others."""
    return f"{this_host()} {this_system()}"


class JobStatus:
    """Keeps the file of one job up to date while it runs; a context manager, whose end removes the file.

    Args:
        folder: Where the watcher looks; None, or a folder that is not there (another machine's disk): write nothing.
        job: The job.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, job: Job) -> None:
        self.path = Path(folder) / f"{job.slug}.json" if folder is not None and Path(folder).is_dir() else None
        self.job = job
        self.images = 0  # in the training set, once that is known
        self.status = Status(time.time(), here(), os.getpid(), total=job.epochs or job.steps)
        self._written = 0.0

    def __enter__(self) -> JobStatus:
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def hook(self, inner: OnEpoch | None) -> OnEpoch | None:
        """What to give `fit` as `on_epoch`: `inner`, and a note of the epoch before it if anybody watches."""
        return inner if self.path is None else _Hook(self, inner)

    def epoch(self, epoch: int, detector: Detector, seconds: float) -> None:
        """Note that `epoch` took `seconds`."""
        stages = len(getattr(getattr(detector, "recipe", None), "stages", ())) or 1
        in_steps = self.job.steps is not None
        done = int(getattr(detector, "steps_", 0)) if in_steps else epoch
        total = self.job.steps if in_steps else self.job.epochs
        history = getattr(detector, "history_", None) or [{}]
        rate = self.images / seconds if self.images and seconds > 0 else None
        self.status = replace(
            self.status,
            done=done,
            total=None if total is None else total * stages,
            unit="steps" if in_steps else "epochs",
            losses=dict(history[-1]),
            images_per_second=rate,
        )
        if time.monotonic() - self._written >= INTERVAL:
            self._write()

    def _write(self) -> None:
        """Replace the file in one step. No fsync: after a power cut nobody wants it."""
        if self.path is None:
            return
        partial = self.path.with_name(f".{self.path.name}.{this_host()}.{self.status.pid}.tmp")
        with contextlib.suppress(OSError):  # the disk is full, or the watcher has gone: the job matters more
            partial.write_text(json.dumps(asdict(self.status)))
            partial.replace(self.path)
        self._written = time.monotonic()


class _Hook:
    """`on_epoch` that times epochs without what `inner` does between them."""

    def __init__(self, status: JobStatus, inner: OnEpoch | None) -> None:
        self.status, self.inner = status, inner
        self.scores = inner is not None  # whether the detector must be ready to score; see RecipeDetector
        self.began = time.perf_counter()

    def __call__(self, epoch: int, detector: Detector) -> None:
        self.status.epoch(epoch, detector, time.perf_counter() - self.began)
        if self.inner is not None:
            self.inner(epoch, detector)
        self.began = time.perf_counter()


class Board:
    """Where a watcher reads the files of running jobs; a context manager that makes the folder and clears up after itself.

    Args:
        folder: A folder of its own; several watchers may share it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._host = here()
        self._since = 0.0

    def __enter__(self) -> Board:
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f".since.{this_host()}.{os.getpid()}"
        probe.touch()
        self._since = probe.stat().st_mtime  # the file system's clock, not this machine's
        probe.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for path in [*self.folder.glob("*.json"), *self.folder.glob(".*.tmp")]:
            if self._read(path) is None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others may still be running
            self.folder.rmdir()

    def read(self, slugs: Mapping[str, Any]) -> dict[str, Status]:
        """The status of each job of `slugs` that is running now, by slug."""
        found = {}
        with contextlib.suppress(OSError):
            for path in self.folder.glob("*.json"):
                status = self._read(path) if path.stem in slugs else None
                if status is not None:
                    found[path.stem] = status
        return found

    def _read(self, path: Path) -> Status | None:
        """The status in `path`; None when it is damaged or its process is no more."""
        try:
            written = path.stat().st_mtime
            status = Status(**json.loads(path.read_bytes()))
            numbers = [status.started, status.done, status.total or 0, status.images_per_second or 0, *status.losses.values()]
            if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
                return None
            living = is_alive(int(status.pid)) if status.host == self._host else written >= self._since
        except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return None
        return status if living else None
