"""Jobs as Ray tasks. The driver writes the results, so nodes need this package (and the data sets) and no shared folder."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganomaly_plugin.core import Chunk, Job, Outcome
from ganomaly_plugin.errors import InvalidInput, one_line
from ganomaly_plugin.executors.tries import Lost, Tries
from ganomaly_plugin.streams import mend_streams

_LOOK = 0.5  # seconds between looks at the clock
_REACH = 10.0  # seconds for the head of a cluster to answer at all


def connect(address: str | None) -> tuple[Any, bool]:
    """Connect this process to the cluster at `address`: "host:port", or "auto" for the one on this machine.

    None takes $RAY_ADDRESS, and without it starts Ray on this machine alone.

    Returns:
        Ray, and whether it was connected here: a process that is connected stays so.

    Raises:
        InvalidInput: Ray is not installed, or nothing answers there.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to send any
    if address is None:  # this machine alone: Ray listens on 127.0.0.1, as it does by default on Windows and macOS
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise InvalidInput("--executor ray needs Ray: pip install 'ganomaly-plugin[ray]'.") from error
    if ray.is_initialized():
        return ray, False
    if address is not None and address != "auto":
        check_address(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, **options)
        else:
            ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        todo = " If it was started with a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN." if address else ""
        raise InvalidInput(
            f"Cannot connect to Ray at {address or 'this machine'}: {one_line(error)[:300].rstrip('.')}.{todo}"
        ) from error
    return ray, True


def check_address(address: str) -> None:
    """Raise InvalidInput unless `address` is "host:port" and something listens there: Ray itself waits for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise InvalidInput(f"--address must be auto or host:port of the head, such as 10.0.0.1:6379, got {address!r}.")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(f"No Ray cluster answers at {address}: {reason}. Start one there with ray start --head.") from error


def work(run: Callable[[Chunk], Iterable[Outcome]], chunk: Chunk, folder: str, command: list[str]) -> Iterator[Any]:
    """The task: a first value when the worker is ready to work, then the outcomes of `chunk`."""
    with contextlib.suppress(OSError):  # relative paths mean the same where the driver's folder is there too
        os.chdir(folder)
    sys.argv = command  # what the records tell of
    mend_streams()
    yield None
    yield from run(chunk)


@dataclass
class _Task:
    """A chunk on its way through the cluster."""

    values: Any  # Ray's generator of what `work` yields
    chunk: Chunk
    left: list[Job]
    began: float | None = None  # when its worker was ready


class RayExecutor:
    """Runs each chunk as a task on a cluster. Connected from the start, so that what is wrong shows before any work.

    Args:
        address: Of the cluster, as `connect` takes it.
        lost: Makes the outcome of a job whose worker died or hung.
        cpus: Processors of each task; may be a fraction.
        gpus: GPUs of each task; a fraction shares one.
        timeout: Seconds that a job may take, and a chunk for each of its jobs; waiting for a place does not count.
        retries: How many times a job is tried again after its worker died. A job whose node was lost is run again anyway.
    """

    parting = ""

    def __init__(
        self,
        address: str | None,
        lost: Lost,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        timeout: float | None = None,
        retries: int = 0,
    ) -> None:
        self.address, self.cpus, self.gpus = address, cpus, gpus
        self.timeout, self.tries = timeout, Tries(lost, retries)
        self.ray, self._ours = connect(address)

    def map(self, run: Callable[[Chunk], Iterable[Outcome]], chunks: Iterable[Chunk]) -> Iterator[Outcome]:
        """Yield outcomes as they come; so many chunks are taken that the cluster always has some waiting."""
        connect(self.address)  # again, after an earlier map
        with contextlib.redirect_stdout(sys.stderr):  # Ray tells of lost nodes and more on stdout, which is for tables
            try:
                yield from self._map(run, iter(chunks))
            finally:
                if self._ours:
                    self.ray.shutdown()

    def _map(self, run: Callable[[Chunk], Iterable[Outcome]], source: Iterator[Chunk]) -> Iterator[Outcome]:
        # Ray's own retries would hide from us which try it is, and whose fault.
        remote = self.ray.remote(max_retries=0, num_cpus=self.cpus, num_gpus=self.gpus)(work)
        packed, folder, told = self.ray.put(run), str(Path.cwd()), False
        again, tasks = deque[Chunk](), list[_Task]()
        try:
            while True:
                while len(tasks) < 2 * self._places():
                    chunk = again.popleft() if again else next(source, None)
                    if chunk is None:
                        break
                    tasks.append(_Task(remote.remote(packed, chunk, folder, list(sys.argv)), chunk, list(chunk)))
                if not tasks:
                    return
                if not told and not self._fits():
                    print(f"no node of the Ray cluster has {self._wish()}; waiting for one", file=sys.stderr)
                    told = True
                ready, _ = self.ray.wait([task.values for task in tasks], timeout=_LOOK)
                for task in list(tasks):
                    if task.values in ready:
                        yield from self._receive(task, again)
                    yield from self._limit(task, again)
                    if not task.left:
                        tasks.remove(task)
        finally:
            for task in tasks:
                self._cancel(task)

    def _receive(self, task: _Task, again: deque[Chunk]) -> Iterator[Outcome]:
        """The next value of `task`, or what becomes of its jobs when there is none."""
        errors = self.ray.exceptions
        try:
            value = self.ray.get(next(task.values))
        except StopIteration:
            yield from self._settle(task, again, "its Ray task ended without a result")
        except (errors.NodeDiedError, errors.ObjectLostError, errors.LocalRayletDiedError):
            yield from self._settle(task, again, "its Ray node was lost", node=True)
        except errors.OutOfMemoryError:
            yield from self._settle(task, again, "its Ray worker was killed: its node ran out of memory")
        except errors.WorkerCrashedError:
            yield from self._settle(task, again, "its Ray worker process died (a crash, out of memory, or somebody's kill)")
        except errors.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            yield from self._settle(task, again, f"Ray could not run it: {lines[-1] if lines else type(error).__name__}")
        else:
            if value is None:
                task.began = time.monotonic()
            else:
                task.left.remove(value.record.job)
                yield value

    def _limit(self, task: _Task, again: deque[Chunk]) -> Iterator[Outcome]:
        if self.timeout is None or task.began is None or not task.left:
            return
        if time.monotonic() - task.began > self.timeout * len(task.chunk):
            self._cancel(task)
            yield from self._settle(task, again, f"it took longer than --timeout {self.timeout:g} s and was killed", final=True)

    def _settle(
        self, task: _Task, again: deque[Chunk], why: str, *, final: bool = False, node: bool = False
    ) -> Iterator[Outcome]:
        seconds = time.monotonic() - task.began if task.began is not None else 0.0
        chunks, failed = self.tries.settle(task.chunk, task.left, why, seconds, final=final, node=node)
        task.left = []
        again.extend(chunks)
        yield from failed

    def _cancel(self, task: _Task) -> None:
        if self.ray.is_initialized():
            with contextlib.suppress(self.ray.exceptions.RayError, ValueError):
                self.ray.cancel(task.values, force=True)

    def _places(self) -> int:
        """How many tasks the cluster can run at once, as it is now; at least one."""
        there: Mapping[str, float] = self.ray.cluster_resources()
        places = [there.get(name, 0.0) / share for name, share in (("CPU", self.cpus), ("GPU", self.gpus)) if share]
        return max(1, int(min(places, default=1.0)))

    def _fits(self) -> bool:
        alive = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus for node in alive)

    def _wish(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")
