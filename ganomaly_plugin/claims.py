"""Which runner works on which job: several `bench run` on one results folder share the work without doing any of it twice."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from ganomaly_plugin.core import Job
from ganomaly_plugin.errors import CannotStore
from ganomaly_plugin.files import locked_folder, sweep_out, time_of

HEARTBEAT = 10.0  # seconds between signs of life
EXPIRY = 120.0  # seconds without one, after which a claim from another machine is void


class Claims:
    """Claims on jobs, one file each in `folder`; a context manager that releases its own at the end.

    A claim is void when its process is gone, or it was copied here with its folder (on this machine), or when it has shown
    no sign of life for `EXPIRY` seconds of the file system's own clock (on another). Creating a file exclusively is atomic,
    on NFS since version 3. On one machine a job never has two holders. On several it may, when a holder was taken for dead
    and was not; their results then count once (`Store.settle`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[Path, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._me = {"host": this_host(), "system": this_system(), "pid": os.getpid(), "started": started(os.getpid())}

    def __enter__(self) -> Claims:
        self._make_folder()
        sweep_out(self.folder)
        threading.Thread(target=self._beat, name="claims", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        with self._lock:
            held, self._held = self._held, {}
        for path, claim in held.items():
            self._remove(path, claim)
        self._bury()
        with contextlib.suppress(OSError):  # others may still hold claims there
            self.folder.rmdir()

    def take(self, job: Job) -> bool:
        """Claim `job`; False when a living runner has it.

        Raises:
            CannotStore: No claim can be written.
        """
        path = self._path(job)
        try:
            return self._create(path) or (self._void(path) is not None and self._take_over(path))
        except OSError as error:
            raise CannotStore(
                f"Cannot write to {self.folder}: {error.strerror or error}. Finished records are kept; "
                "mend that, and the same command goes on from there."
            ) from error

    def holder(self, job: Job) -> str | None:
        """Whose claim on `job` there is, for people; None when there is none, or it does not say."""
        claim = _read(self._path(job)) or {}
        return f"pid {claim['pid']} on {claim['host']}" if {"pid", "host"} <= claim.keys() else None

    def release(self, job: Job) -> None:
        """Give `job` up: its record is stored."""
        path = self._path(job)
        with self._lock:
            claim = self._held.pop(path, None)
        if claim is not None:
            self._remove(path, claim)

    def _path(self, job: Job) -> Path:
        return self.folder / f"{job.slug}.json"

    def _make_folder(self) -> None:
        with contextlib.suppress(FileExistsError):  # two make it at once
            self.folder.mkdir(parents=True, exist_ok=True)

    def _create(self, path: Path) -> bool:
        while True:
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                break
            except FileExistsError:
                return False
            except FileNotFoundError:  # a runner that ended has just removed the folder
                self._make_folder()
        try:
            with os.fdopen(handle, "w") as file:
                claim = {**self._me, "folder": self._identity(), "token": secrets.token_hex(8)}
                json.dump(claim, file)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        with self._lock:
            self._held[path] = claim
        return True

    def _take_over(self, path: Path) -> bool:
        """Put a claim of ours in the place of a void one: of several runners that saw it, one."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked_folder(self.folder))  # those of this machine, one after another
            except FileNotFoundError:
                return False
            void = self._void(path)
            if void is None:
                return False
            grave = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            try:
                path.rename(grave)
            except OSError:  # another machine was faster
                return False
            if _read(grave) != void:  # it was so much faster that this is its new claim: give that back
                with contextlib.suppress(OSError):
                    os.link(grave, path)
                grave.unlink(missing_ok=True)
                return False
            grave.unlink(missing_ok=True)
            return self._create(path)

    def _void(self, path: Path) -> dict[str, Any] | None:
        """The void claim in `path`, {} for one that was written in part; None when it holds, or there is none."""
        claim = _read(path)
        if claim is None:
            return None
        try:
            if self._is_near(claim):
                here = claim.get("folder") in (None, self._identity())  # older claims do not say
                return None if here and is_alive(claim["pid"], claim.get("started")) else claim
            age = time_of(self.folder) - path.stat().st_mtime
        except FileNotFoundError:
            return None
        # Written in part by a runner that died; a living one needs no time for this.
        limit = EXPIRY if claim else HEARTBEAT
        return claim if age > limit else None

    def _is_near(self, claim: dict[str, Any]) -> bool:
        """Whether the claim's process number means something to this process."""
        same = claim.get("host") == self._me["host"] and claim.get("system", self._me["system"]) == self._me["system"]
        return same and isinstance(claim.get("pid"), int)

    def _remove(self, path: Path, claim: dict[str, Any]) -> None:
        """Remove `claim`, unless somebody who took us for dead has put another in its place."""
        with contextlib.suppress(OSError):  # where nothing can be written, it ends with this process
            if _read(path) == claim:
                path.unlink(missing_ok=True)

    def _bury(self) -> None:
        """Remove what runners of this machine who were killed have left: nobody may want to take those jobs again."""
        with contextlib.suppress(OSError), locked_folder(self.folder):
            for path in self.folder.glob("*.json"):
                if self._is_near(_read(path) or {}) and self._void(path) is not None:
                    path.unlink(missing_ok=True)

    def _identity(self) -> str:
        """What tells the folder from a copy of it: of two folders on one machine not both are equal."""
        found = self.folder.stat()
        return f"{found.st_dev}:{found.st_ino}"

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT):
            with self._lock:
                held = list(self._held)
            for path in held:
                with contextlib.suppress(OSError):
                    os.utime(path)


def _read(path: Path) -> dict[str, Any] | None:
    """The claim in `path`; {} when it is no whole claim, None when there is no such file."""
    try:
        claim = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None  # released just now: its record is there, or the next look takes it
    except ValueError:
        return {}
    return claim if isinstance(claim, dict) else {}


def this_host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def this_system() -> str:
    """What tells systems of one name apart whose process numbers mean different things: the boot, and the container."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def is_alive(pid: int, since: int | None = None) -> bool:
    """Whether the process `pid` of this machine runs, and is the one that started at `since` (see `started`)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = started(pid)
    return now != _ENDED and (since is None or now is None or now == since)


_ENDED = -1


def started(pid: int) -> int | None:
    """When the process started, in ticks of the system's clock since its start; None where the system does not say.

    -1 for one that has ended and whose parent has not noticed yet.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return _ENDED if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
