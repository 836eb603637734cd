"""Jobs in worker processes of this machine: a crash, a kill or a hang costs one job, not the sweep."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from typing import Any

from ganomaly_plugin.core import Chunk, Job, Outcome

#: `lost(job, why, seconds)` makes the outcome of a job that a worker took with it.
Lost = Callable[[Job, str, float], Outcome]

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_GRACE = 2.0  # seconds that a worker has to end by itself
_LOOK = 0.5  # seconds between looks at the clock


def local_slots(devices: Iterable[str] | None, per_device: int, workers: int | None) -> list[str | None]:
    """One entry a worker: the GPU it sees, by CUDA's numbering, or None for whatever the machine has."""
    if devices is None:
        return [None] * (workers or per_device)
    return [device for device in devices for _ in range(per_device)]


class LocalExecutor:
    """Runs each chunk in one of several worker processes.

    Args:
        slots: As `local_slots` gives them, one a worker.
        lost: Makes the outcome of a job whose worker died or hung.
        timeout: Seconds that a job may take, the start of its worker included, before the worker is killed; None: as
            long as it needs.
        retries: How many times a job is tried again after its worker died. A job that fails by itself, or takes too
            long, is never tried again.
    """

    def __init__(self, slots: list[str | None], lost: Lost, *, timeout: float | None = None, retries: int = 0) -> None:
        self.slots, self.lost, self.timeout, self.retries = slots, lost, timeout, retries
        self._deaths: dict[str, int] = {}  # by job key

    def map(self, run: Callable[[Chunk], Iterable[Outcome]], chunks: Iterable[Chunk]) -> Iterator[Outcome]:
        """Yield outcomes as they come; chunks are taken one by one, when a worker is free for them."""
        source, again = iter(chunks), deque[Chunk]()
        workers = [_Worker(slot, run, self._threads()) for slot in self.slots]
        try:
            while True:
                for worker in workers:
                    if not worker.left:
                        chunk = again.popleft() if again else next(source, None)
                        if chunk is None:
                            break
                        worker.start(chunk)
                busy = [worker for worker in workers if worker.left]
                if not busy:
                    return
                connection.wait([item for worker in busy for item in worker.signs()], timeout=_LOOK)
                for worker in busy:
                    yield from worker.receive()
                    yield from self._look_after(worker, again)
        finally:
            for worker in workers:
                worker.stop()

    def _threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // len(self.slots))

    def _look_after(self, worker: _Worker, again: deque[Chunk]) -> Iterator[Outcome]:
        """The outcome of the job that a dead or hanging worker was at; the jobs behind it go to another one."""
        if not worker.left:
            return
        job, seconds = worker.left[0], time.monotonic() - worker.since
        late = self.timeout is not None and seconds > self.timeout
        if not late and worker.is_alive():
            return
        if late:
            worker.kill()
            why = f"it took longer than --timeout {self.timeout:g} s and was killed"
        else:
            yield from worker.receive()  # what it sent with its last breath
            if not worker.left:
                return
            job, why = worker.left[0], worker.death()
        rest = tuple(worker.left)[1:]
        worker.forget()
        deaths = self._deaths[job.key] = self._deaths.get(job.key, 0) + 1
        if not late and deaths <= self.retries:
            rest = (job, *rest)
        else:
            tries = f" (try {deaths})" if deaths > 1 else ""
            yield self.lost(job, why + tries, seconds)
        if rest:
            again.append(rest)


@dataclass
class _Worker:
    """One worker process, started with its first chunk and again after it died; it keeps what it imported."""

    slot: str | None
    run: Callable[[Chunk], Iterable[Outcome]]
    threads: int
    left: deque[Job] = field(default_factory=deque)  # of the chunk at hand, in order
    since: float = 0.0  # when the job at hand began
    process: Any = None
    pipe: Any = None

    def start(self, chunk: Chunk) -> None:
        if self.process is None or not self.process.is_alive():
            self._spawn()
        self.left, self.since = deque(chunk), time.monotonic()
        with contextlib.suppress(OSError):  # it died just now: the executor will see
            self.pipe.send(chunk)

    def _spawn(self) -> None:
        if self.pipe is not None:
            self.pipe.close()
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        changed = dict.fromkeys(_THREAD_VARIABLES, str(self.threads))
        if self.slot is not None:
            changed["CUDA_VISIBLE_DEVICES"] = self.slot
        self.process = context.Process(target=serve, args=(theirs, self.run, self.threads, os.getpid()), daemon=True)
        with _environment(changed):  # set before the worker imports anything
            self.process.start()
        theirs.close()

    def signs(self) -> list[Any]:
        """What to wait for: a message or the end of the process."""
        return [self.pipe, self.process.sentinel]

    def receive(self) -> Iterator[Outcome]:
        """Outcomes that have come so far."""
        while self.left and self._has_message():
            try:
                message = self.pipe.recv()
            except (EOFError, OSError):
                return
            self.left.remove(message.record.job)
            self.since = time.monotonic()
            yield message

    def _has_message(self) -> bool:
        try:
            return bool(self.pipe.poll())
        except (EOFError, OSError):
            return False

    def is_alive(self) -> bool:
        return bool(self.process.is_alive())

    def death(self) -> str:
        """Why the process ended, for people."""
        self.process.join(_GRACE)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            cause = " (out of memory, or somebody's kill)" if -code == signal.SIGKILL else ""
            return f"its worker process was ended by {name}{cause}"
        return f"its worker process ended with exit code {code}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join(_GRACE)

    def forget(self) -> None:
        """Drop the chunk at hand, and the process with it."""
        self.left.clear()
        self.process = None

    def stop(self) -> None:
        if self.process is None:
            return
        if self.left:
            self.process.kill()
        self.pipe.close()
        self.process.join(_GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(_GRACE)


def serve(pipe: Any, run: Callable[[Chunk], Iterable[Outcome]], threads: int, parent: int) -> None:
    """A worker's life: take a chunk, send its outcomes, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the runner, which decides about its workers
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    try:
        while True:
            for outcome in run(pipe.recv()):
                pipe.send(outcome)
    except (EOFError, OSError):
        return


def _follow(parent: int) -> None:
    """End this process when the runner is gone, also in the middle of a job."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextlib.contextmanager
def _environment(changed: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
