"""A results folder: one JSON record a job, written atomically, its scores beside it. Tables are made from it alone."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ganomaly_plugin.core import Job, Outcome, RunRecord
from ganomaly_plugin.errors import CorruptFile, InvalidInput

MARKER = "bench.json"
FORMAT = 1


def atomic_write(path: Path, content: bytes) -> None:
    """Write `path` so that a reader, or a crash, sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, on systems where a folder can be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Store:
    """The records under one folder.

    Args:
        folder: The results folder. `create` makes it; without it the folder must be a results folder already.

    Raises:
        InvalidInput: The folder is missing, not writable, or holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str], *, create: bool = False) -> None:
        self.folder = Path(folder)
        self.records_dir = self.folder / "records"
        self.scores_dir = self.folder / "scores"
        marker = self.marker_of(folder)
        if not create:
            if not marker.is_file():
                raise InvalidInput(f"{self.folder} is not a results folder (no {MARKER}). Give the --out of a bench run.")
        else:
            self._create(marker)
        self._check_format(marker)

    @staticmethod
    def marker_of(folder: str | os.PathLike[str]) -> Path:
        """The file that makes `folder` a results folder."""
        return Path(folder) / MARKER

    def _create(self, marker: Path) -> None:
        try:
            if self.folder.exists() and not marker.is_file() and any(self.folder.iterdir()):
                raise InvalidInput(
                    f"{self.folder} exists, is not empty and is not a results folder (no {MARKER}). "
                    "Choose another --out, or empty it."
                )
            self.records_dir.mkdir(parents=True, exist_ok=True)
            self.scores_dir.mkdir(exist_ok=True)
            if marker.is_file():
                atomic_write(self.folder / ".writable", b"")
                (self.folder / ".writable").unlink(missing_ok=True)
            else:
                atomic_write(marker, json.dumps({"ganomaly_plugin_results": FORMAT}).encode() + b"\n")
        except OSError as error:
            reason = error.strerror or str(error)
            raise InvalidInput(f"Cannot write to the output folder {self.folder}: {reason}. Choose another --out.") from error

    def _check_format(self, marker: Path) -> None:
        try:
            found = json.loads(marker.read_text()).get("ganomaly_plugin_results")
        except (OSError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{marker} is damaged. Restore it: {json.dumps({'ganomaly_plugin_results': FORMAT})}") from error
        if found != FORMAT:
            raise InvalidInput(
                f"{self.folder} has results of format {found!r}, this version reads {FORMAT}. Choose another --out."
            )

    def record_path(self, job: Job) -> Path:
        """Where the record of `job` is."""
        return self.records_dir / f"{job.slug}.json"

    def scores_path(self, job: Job) -> Path:
        """Where the scores of `job` are."""
        return self.scores_dir / f"{job.slug}.npz"

    def images_path(self, job: Job) -> Path:
        """Where sample images of `job` are, if there are any."""
        return self.folder / "images" / f"{job.slug}.npz"

    def put(self, outcome: Outcome) -> None:
        """Store an outcome: the scores first, then the record that vouches for them."""
        record = outcome.record
        for path, arrays in ((self.scores_path(record.job), outcome.arrays), (self.images_path(record.job), outcome.images)):
            if arrays:
                path.parent.mkdir(exist_ok=True)
                buffer = io.BytesIO()
                np.savez_compressed(buffer, allow_pickle=False, **dict(arrays))
                atomic_write(path, buffer.getvalue())
        text = json.dumps(record.to_dict(), indent=1, allow_nan=False)
        atomic_write(self.record_path(record.job), text.encode() + b"\n")

    def get(self, job: Job) -> RunRecord | None:
        """The record of `job`, or None when there is none.

        Raises:
            CorruptFile: The record is damaged, or belongs to another job.
        """
        path = self.record_path(job)
        return read_record(path) if path.is_file() else None

    def records(self) -> list[RunRecord]:
        """All records, by file name.

        Raises:
            CorruptFile: One is damaged; names it and says how to go on.
        """
        return [read_record(path) for path in sorted(self.records_dir.glob("*.json"))]

    def scores(self, job: Job) -> dict[str, np.ndarray]:
        """The arrays of a done job: `score`, `is_anomaly`, `test_index`, `reference_score`.

        Raises:
            CorruptFile: The file is missing or damaged.
        """
        return self._read(self.scores_path(job), job)

    def images(self, job: Job) -> dict[str, np.ndarray]:
        """Sample images of a done job, as `samples.sample` makes them; {} when it has none.

        Raises:
            CorruptFile: The file is damaged.
        """
        path = self.images_path(job)
        return self._read(path, job) if path.is_file() else {}

    def _read(self, path: Path, job: Job) -> dict[str, np.ndarray]:
        todo = f"Delete {self.record_path(job)} and run again."
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except FileNotFoundError as error:
            raise CorruptFile(f"The scores {path} are missing. {todo}") from error
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
            raise CorruptFile(f"The scores {path} are damaged ({type(error).__name__}). {todo}") from error


def read_record(path: Path) -> RunRecord:
    """The record in the file `path`.

    Raises:
        CorruptFile: It is truncated, of another format, or its key is not its job's.
    """
    todo = f"Delete it to run that job again: {path}"
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFile(f"The record {path.name} is truncated or not JSON. {todo}") from error
    try:
        record = _parse(content)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CorruptFile(f"The record {path.name} is not complete ({error}). {todo}") from error
    if content.get("key") != record.job.key:
        raise CorruptFile(f"The record {path.name} does not match its key {content.get('key')!r}: it was edited. {todo}")
    return record


def _parse(content: Mapping[str, Any]) -> RunRecord:
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')!r}, this version reads {FORMAT}")
    fields = {name: value for name, value in content.items() if name not in ("format", "key")}
    record = RunRecord(**{**fields, "job": Job.from_dict(fields["job"])})
    if record.status not in ("done", "failed"):
        raise ValueError(f"status {record.status!r}")
    if record.status == "done" and not all(_is_share(record.metrics[name]) for name in ("auroc", "auprc")):
        raise ValueError("a metric is not a number in [0, 1]")
    return record


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
