"""Which runner works on which job: several `bench run` on one results folder share the work without doing any of it twice."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from types import TracebackType

from ganomaly_plugin.core import Job

HEARTBEAT = 10.0  # seconds between signs of life
EXPIRY = 120.0  # seconds without one, after which a claim from another machine is void


class Claims:
    """Claims on jobs, one file each in `folder`; a context manager that releases its own at the end.

    A claim is void when its process is gone (on this machine), or when it has shown no sign of life for `EXPIRY`
    seconds of the file system's own clock (on another). Creating a file exclusively is atomic, on NFS since version 3.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._me = {"host": socket.gethostname(), "pid": os.getpid()}

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._beat, name="claims", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        with self._lock:
            for path in self._held:
                path.unlink(missing_ok=True)
            self._held.clear()
        with contextlib.suppress(OSError):  # others may still hold claims there
            self.folder.rmdir()

    def take(self, job: Job) -> bool:
        """Claim `job`; False when a living runner has it."""
        path = self._path(job)
        if self._create(path):
            return True
        if not self._is_void(path):
            return False
        # Of several runners that find a void claim, the one that renames it away may take its place.
        grave = path.with_name(f".{path.name}.{self._me['host']}.{self._me['pid']}")
        try:
            path.rename(grave)
        except OSError:
            return False
        grave.unlink(missing_ok=True)
        return self._create(path)

    def release(self, job: Job) -> None:
        """Give `job` up: its record is stored."""
        with self._lock:
            self._held.discard(self._path(job))
        self._path(job).unlink(missing_ok=True)

    def _path(self, job: Job) -> Path:
        return self.folder / f"{job.slug}.json"

    def _create(self, path: Path) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)  # a runner that ended may have removed it
        try:
            with path.open("x") as file:
                json.dump(self._me, file)
        except FileExistsError:
            return False
        with self._lock:
            self._held.add(path)
        return True

    def _is_void(self, path: Path) -> bool:
        try:
            age = self._now() - path.stat().st_mtime
            holder = json.loads(path.read_text())
            host, pid = holder["host"], int(holder["pid"])
        except FileNotFoundError:
            return False  # released just now: its record is there, or the next look takes it
        except (ValueError, KeyError, TypeError):
            return age > HEARTBEAT  # written in part by a runner that died; a living one needs no time for this
        if host == self._me["host"]:
            return not is_alive(pid)
        return age > EXPIRY

    def _now(self) -> float:
        """The file system's time, which is what the ages of its files are measured by."""
        probe = self.folder / f".now.{self._me['host']}.{self._me['pid']}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT):
            with self._lock:
                for path in self._held:
                    with contextlib.suppress(OSError):
                        os.utime(path)


def is_alive(pid: int) -> bool:
    """Whether there is a process `pid` on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
