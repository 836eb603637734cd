"""What was submitted to SLURM, remembered as JSON in the results folder, so that another `bench run` can take it up."""

from __future__ import annotations

import contextlib
import json
import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ganomaly_plugin.core import Chunk
from ganomaly_plugin.executors.slurm_queue import Queued
from ganomaly_plugin.files import atomic_write, time_of


@dataclass(frozen=True)
class Submission:
    """One job array.

    Attributes:
        name: Its name in SLURM, which nothing else has.
        keys: The job keys of each of its tasks.
        before: Fingerprints, by job key, of records that it is to replace.
        array: SLURM's number of it; None: it was on its way when its runner died.
    """

    name: str
    keys: tuple[tuple[str, ...], ...]
    before: dict[str, str]
    array: str | None = None

    @classmethod
    def of(cls, chunks: Sequence[Chunk], before: dict[str, str]) -> Submission:
        """A new one, for `chunks`."""
        return cls(f"bench-{uuid.uuid4().hex[:12]}", tuple(tuple(job.key for job in chunk) for chunk in chunks), before)

    def tasks(self) -> list[str]:
        """The id of each task, as `scancel` takes it; [] while SLURM's number is not known."""
        if self.array is None:
            return []
        return [self.array] if len(self.keys) == 1 else [f"{self.array}_{k}" for k in range(len(self.keys))]

    def found_in(self, queue: Iterable[Queued]) -> Submission:
        """This submission with SLURM's number, when `queue` has it."""
        arrays = {each.task.partition("_")[0] for each in queue if each.name == self.name}
        return self if self.array or not arrays else Submission(self.name, self.keys, self.before, min(arrays))


class Submissions:
    """The submissions of one results folder, one file each under `slurm/`.

    Damaged files are passed over: the worst that follows is a job that SLURM runs and that finds its record there.
    """

    def __init__(self, results: Path) -> None:
        self.folder = results / "slurm"

    def put(self, submission: Submission) -> None:
        """Remember `submission`, or what has become of it."""
        content = json.dumps(asdict(submission)).encode() + b"\n"
        while True:
            with contextlib.suppress(FileExistsError):  # two make it at once
                self.folder.mkdir(exist_ok=True)
            try:
                return atomic_write(self._path(submission), content)
            except FileNotFoundError:  # a runner that ended has just removed the folder
                continue

    def age(self, submission: Submission) -> float:
        """Seconds since it was last put; infinite when another runner has dropped it."""
        try:
            return time_of(self.folder) - self._path(submission).stat().st_mtime
        except FileNotFoundError:
            return math.inf

    def drop(self, submission: Submission) -> None:
        """Forget it."""
        self._path(submission).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there are others in it, or another runner has removed it
            self.folder.rmdir()

    def all(self) -> list[Submission]:
        """Those that are remembered."""
        found = []
        for path in sorted(self.folder.glob("bench-*.json")):
            try:
                content = json.loads(path.read_bytes())
                keys = tuple(tuple(str(key) for key in task) for task in content["keys"])
                before = {str(key): str(value) for key, value in content["before"].items()}
                array = content["array"]
                if path.stem == content["name"] and (array is None or str(array).isdecimal()):
                    found.append(Submission(path.stem, keys, before, array))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
        return found

    def _path(self, submission: Submission) -> Path:
        return self.folder / f"{submission.name}.json"
