"""A results folder: one JSON record a job, written atomically, its scores beside it. Tables are made from it alone."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ganomaly_plugin.core import Job, Outcome, RunRecord
from ganomaly_plugin.errors import BenchError, CannotStore, CorruptFile, InvalidInput, one_line
from ganomaly_plugin.files import as_path, atomic_write, sweep_out
from ganomaly_plugin.integrity import check_against_scores, file_digest, sealed, unsealed
from ganomaly_plugin.labels import distinctly_labelled

MARKER = "bench.json"
_TRIES = 5  # to store an outcome while others store one of the same job
FORMAT = 1  # of the folder; each record names its own


class Store:
    """The records under one folder.

    Args:
        folder: The results folder. `create` makes it; without it the folder must be a results folder already.

    Raises:
        InvalidInput: The folder is missing, not writable, or holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str], *, create: bool = False) -> None:
        self.folder = as_path(folder)
        self.records_dir = self.folder / "records"
        self.scores_dir = self.folder / "scores"
        marker = self.marker_of(self.folder)
        if not create:
            if not marker.is_file():
                raise InvalidInput(f"{self.folder} is not a results folder (no {MARKER}). Give the --out of a bench run.")
        else:
            self._create(marker)
        self._check_format(marker)

    @staticmethod
    def marker_of(folder: str | os.PathLike[str]) -> Path:
        """The file that makes `folder` a results folder."""
        return as_path(folder) / MARKER

    def _create(self, marker: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The marker comes before all else, so that of several runners that make the folder none takes it for a foreign one.
            others = [path for path in self.folder.iterdir() if not path.name.startswith(f".{MARKER}.")]
            if others and not marker.is_file():
                raise InvalidInput(
                    f"{self.folder} exists, is not empty and is not a results folder (no {MARKER}). "
                    "Choose another --out, or empty it."
                )
            if marker.is_file():
                atomic_write(self.folder / ".writable", b"")
                (self.folder / ".writable").unlink(missing_ok=True)
            else:
                atomic_write(marker, json.dumps({"ganomaly_plugin_results": FORMAT}).encode() + b"\n")
            for folder in (self.records_dir, self.scores_dir):
                folder.mkdir(exist_ok=True)
                sweep_out(folder)
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
        """Store an outcome: the scores first, then the record that vouches for them.

        Raises:
            CannotStore: The disk is full, read-only or gone; what was there before is as it was.
            CorruptFile: The record that is there now, another machine's, is damaged.
        """
        job, paths = outcome.record.job, self._paths(outcome.record.job)
        contents = {kind: _npz(arrays) for kind, arrays in (("scores", outcome.arrays), ("images", outcome.images)) if arrays}
        files = {kind: file_digest(content) for kind, content in contents.items()}
        try:
            for _ in range(_TRIES):
                for kind, content in contents.items():
                    paths[kind].parent.mkdir(exist_ok=True)
                    atomic_write(paths[kind], content)
                atomic_write(self.record_path(job), sealed(replace(outcome.record, files=files).to_dict()))
                if self._is_whole(job):  # else another machine stored the same job meanwhile, and has put half of its own there
                    break
        except OSError as error:
            raise CannotStore(
                f"Cannot store the result of {job.title} in {self.folder}: {error.strerror or error}. "
                "Finished records are kept; mend that, and the same command goes on from there."
            ) from error

    def _paths(self, job: Job) -> dict[str, Path]:
        """Where the files are that a record of `job` vouches for, by what it calls them."""
        return {"scores": self.scores_path(job), "images": self.images_path(job)}

    def _is_whole(self, job: Job) -> bool:
        """Whether the files of `job` are those that its record, whoever stored it, vouches for."""
        files = _parse(self.record_path(job))[0].files
        return all(file_digest(path.read_bytes()) == files[kind] for kind, path in self._paths(job).items() if kind in files)

    def settle(self, outcome: Outcome) -> RunRecord:
        """Store an outcome unless its job is done already, by whoever; the record that stands.

        Raises:
            CannotStore: See `put`.
            CorruptFile: The record that is there is damaged.
        """
        before = self.get(outcome.record.job)
        if before is not None and before.status == "done":
            return before
        self.put(outcome)
        return outcome.record

    def get(self, job: Job) -> RunRecord | None:
        """The record of `job`, or None when there is none.

        Raises:
            CorruptFile: The record is damaged, or belongs to another job.
        """
        path = self.record_path(job)
        return read_record(path) if path.is_file() else None

    def records(self) -> list[RunRecord]:
        """All records, by file name, labelled so that no two settings share a label.

        Raises:
            CorruptFile: One is damaged; names it and says how to go on.
        """
        return distinctly_labelled(self.records_as_stored())

    def records_as_stored(self) -> list[RunRecord]:
        """Likewise, with the labels that they were stored with, whatever else is in the folder."""
        with without_collections():
            paths = sorted(self.records_dir.glob("*.json"), key=lambda path: path.name)
            return [read_record(path) for path in paths if not path.name.startswith(".")]  # ._NAME is a system's own

    def scores(self, job: Job) -> dict[str, np.ndarray]:
        """The arrays of a done job: `score`, `is_anomaly`, `test_index`, `reference_score`, and of image files `test_file`.

        Raises:
            CorruptFile: The file is missing, damaged, or not the one that its record vouches for.
        """
        return self._read(job, "scores")

    def images(self, job: Job) -> dict[str, np.ndarray]:
        """Sample images of a done job, as `samples.sample` makes them; {} when it has none.

        Raises:
            CorruptFile: The file is damaged, or not the one that its record vouches for.
        """
        return self._read(job, "images") if self.images_path(job).is_file() else {}

    def _read(self, job: Job, kind: str) -> dict[str, np.ndarray]:
        record, _ = _parse(self.record_path(job))
        return _read_arrays(self._paths(job)[kind], kind, record.files.get(kind), self.record_path(job))


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No look for cycles meanwhile: records have none, and over 10,000 of them it takes as long as reading their JSON."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


_MEND = "Mend its permissions or its disk; nothing else is known to be wrong with it."


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """`arrays` as the content of an `.npz` file, compressed, without pickling: `np.savez` does that from NumPy 2.2 on only.

    Raises:
        ValueError: One holds objects.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    return buffer.getvalue()


def _read_arrays(path: Path, kind: str, digest: str | None, record_path: Path) -> dict[str, np.ndarray]:
    """The arrays in the `.npz` file `path`, read without unpickling; `digest` is its sha256, None: not known."""
    todo = f"Delete {record_path} and run again."
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        if not any(path.parent.glob("*.npz")):  # published without them
            todo = "None are kept there: for more than tables of AUROC and AUPRC, run that sweep with another --out."
        raise CorruptFile(f"The {kind} {path} are missing. {todo}") from error
    except OSError as error:
        raise CorruptFile(f"The {kind} {path} cannot be read ({error.strerror or error}). {_MEND}") from error
    if digest is not None and digest != file_digest(content):
        raise CorruptFile(f"The {kind} {path} are damaged, or not those of their record. {todo}")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            # Before NumPy 2.2, `np.savez(..., allow_pickle=False)` stored an array of that name.
            return {name: archive[name] for name in archive.files if name != "allow_pickle"}
    except Exception as error:  # zipfile, zlib and NumPy raise many types for a damaged archive
        raise CorruptFile(f"The {kind} {path} are damaged ({type(error).__name__}). {todo}") from error


def read_record(path: Path) -> RunRecord:
    """The record in the file `path`. One of format 1, which has no checksum, is held to its scores.

    Raises:
        CorruptFile: It is truncated, of another format, not what was stored, or does not fit its scores.
    """
    record, form = _parse(path)
    if form == 1 and record.status == "done":
        arrays = _read_arrays(path.parent.parent / "scores" / f"{path.stem}.npz", "scores", None, path)
        try:
            check_against_scores(record, arrays)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = one_line(error) if isinstance(error, BenchError) else error
            raise CorruptFile(f"The record {path.name} does not fit its scores ({reason}). Delete both: {path}") from error
    return record


def _parse(path: Path) -> tuple[RunRecord, int]:
    """The record in `path` and its format."""
    todo = f"Delete it to run that job again: {path}"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptFile(f"The record {path} cannot be read ({error.strerror or error}). {_MEND}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"The record {path.name} is truncated or not JSON. {todo}") from error
    try:
        record = unsealed(content)
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"The record {path.name} is not complete ({error}). {todo}") from error
    if path.stem != record.job.slug:
        raise CorruptFile(f"The record {path.name} is that of {record.job.slug}: it was renamed or copied. {todo}")
    return record, int(content["format"])
