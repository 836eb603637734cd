"""Jobs in worker processes of this machine: a crash, a kill or a hang costs one job, not the sweep."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from typing import Any

from ganomaly_plugin.core import Chunk, Job, Outcome
from ganomaly_plugin.errors import one_line
from ganomaly_plugin.executors.processes import interrupts_blocked, kill_with_descendants
from ganomaly_plugin.executors.tries import Lost, Tries
from ganomaly_plugin.executors.worker import BROKEN, READY, Raised, serve
from ganomaly_plugin.provenance import available_cpus

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_GRACE = 2.0  # seconds that a worker has to end by itself
_LOOK = 0.5  # seconds between looks at the clock
_START = 600.0  # seconds in which a worker must have imported what it needs


def local_slots(devices: Iterable[str] | None, per_device: int, workers: int | None) -> list[str | None]:
    """One entry a worker: what it has for CUDA_VISIBLE_DEVICES, or None for whatever there is.

    `devices` are numbers among the GPUs that this process sees, which may be some of the machine's.
    """
    if devices is None:
        return [None] * (workers or per_device)
    seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [seen[int(device)] if seen else device for device in devices for _ in range(per_device)]


def worker_threads(workers: int) -> int | None:
    """Threads for each of several workers, so that together they have as many as there are processors; None: as it comes.

    One worker keeps what torch chooses, as a job in the runner's own process does: results depend on it in the last digits.
    """
    if workers == 1:
        return None
    asked = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, available_cpus() // workers)
    return min(share, int(asked)) if asked.isdigit() and int(asked) else share


class LocalExecutor:
    """Runs each chunk in one of several worker processes.

    Args:
        slots: As `local_slots` gives them, one a worker.
        lost: Makes the outcome of a job whose worker died or hung.
        timeout: Seconds that a job may take before its worker is killed, and a chunk for each of its jobs; the start of
            a worker does not count. None: as long as it needs.
        retries: How many times a job is tried again after its worker died. A job that fails by itself, or takes too
            long, is never tried again.
    """

    parting = ""

    def __init__(self, slots: list[str | None], lost: Lost, *, timeout: float | None = None, retries: int = 0) -> None:
        self.slots, self.timeout, self.tries = slots, timeout, Tries(lost, retries)

    def map(self, run: Callable[[Chunk], Iterable[Outcome]], chunks: Iterable[Chunk]) -> Iterator[Outcome]:
        """Yield outcomes as they come; chunks are taken one by one, when a worker is free for them.

        After Ctrl-C come those of the stacks that are trained and being recorded; a second one stops that too.
        """
        source, again = iter(chunks), deque[Chunk]()
        workers = [_Worker(slot, run, worker_threads(len(self.slots))) for slot in self.slots]
        with _held_interrupts() as interrupt_if_asked:
            try:
                while True:
                    interrupt_if_asked()
                    for worker in workers:
                        if not worker.left:
                            chunk = again.popleft() if again else next(source, None)
                            if chunk is None:
                                break
                            worker.start(chunk)
                    busy = [worker for worker in workers if worker.left]
                    if not busy:
                        return
                    _await_sign(busy)
                    interrupt_if_asked()
                    for worker in busy:
                        yield from worker.receive()
                        yield from self._look_after(worker, again)
            except KeyboardInterrupt:
                yield from _being_recorded(workers)
                raise
            finally:
                for worker in workers:
                    worker.stop()

    def _look_after(self, worker: _Worker, again: deque[Chunk]) -> Iterator[Outcome]:
        """What becomes of the jobs of a dead or hanging worker."""
        if not worker.left:
            return
        seconds = time.monotonic() - worker.since
        late = worker.ready and self.timeout is not None and seconds > self.timeout * len(worker.chunk)
        if late:
            worker.kill()
            why = f"it took longer than --timeout {self.timeout:g} s and was killed"
        elif worker.raised is not None:
            worker.kill()
            why = worker.raised
        elif not worker.is_alive():
            why = worker.death()
        elif not worker.ready and seconds > _START:
            worker.kill()
            why = f"its worker process had not started after {_START:g} s"
        else:
            return
        yield from worker.receive()  # what it sent with its last breath
        chunks, failed = self.tries.settle(worker.chunk, worker.left, why, seconds, final=late or worker.raised is not None)
        worker.forget()
        again.extend(chunks)
        yield from failed


@contextlib.contextmanager
def _held_interrupts() -> Iterator[Callable[[], None]]:
    """Within it Ctrl-C is raised by the function that is yielded, so that outcomes are stored whenever it comes.

    A second one is raised at once. In other threads, and where somebody else looks after Ctrl-C, all stays as it is.
    """
    usual, asked = signal.getsignal(signal.SIGINT), threading.Event()

    def hold(number: int, frame: Any) -> None:
        if asked.is_set():
            signal.default_int_handler(number, frame)
        asked.set()

    def interrupt_if_asked() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield interrupt_if_asked
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield interrupt_if_asked
    finally:
        signal.signal(signal.SIGINT, usual)


@dataclass
class _Worker:
    """One worker process, started with its first chunk and again after it died; it keeps what it imported."""

    slot: str | None
    run: Callable[[Chunk], Iterable[Outcome]]
    threads: int | None
    chunk: Chunk = ()
    left: list[Job] = field(default_factory=list)  # of the chunk at hand
    since: float = 0.0  # when the chunk at hand began, or the process that is to run it
    ready: bool = False  # it has imported what it needs
    broken: bool = False  # it ends, since its GPU refuses to go on
    raised: str | None = None  # what the chunk at hand ended with that is no outcome
    garbled: str | None = None  # what was wrong with what came through the pipe
    recording: bool = False  # the chunk at hand is a stack, trained as a whole, of which the first outcomes have come
    process: Any = None
    pipe: Any = None

    def start(self, chunk: Chunk) -> None:
        if self.process is None or self.broken or not self.process.is_alive():
            self._spawn()
        self.chunk, self.left, self.since, self.recording = chunk, list(chunk), time.monotonic(), False
        with contextlib.suppress(OSError):  # it died just now: the executor will see
            self.pipe.send(chunk)

    def _spawn(self) -> None:
        if self.pipe is not None:
            self.pipe.close()
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.ready, self.broken, self.raised, self.garbled = False, False, None, None
        changed = {} if self.threads is None else dict.fromkeys(_THREAD_VARIABLES, str(self.threads))
        if self.slot is not None:
            changed["CUDA_VISIBLE_DEVICES"] = self.slot
        in_main = threading.current_thread() is threading.main_thread()  # which lives as long as this process
        # Not a daemon: a job may start processes of its own.
        process = context.Process(target=serve, args=(theirs, self.run, self.threads, os.getpid(), in_main))
        with _environment(changed), interrupts_blocked():  # set before the worker imports anything
            process.start()
        self.process = process
        _started[process] = os.getpid()
        theirs.close()

    def signs(self) -> list[Any]:
        """What to wait for: a message or the end of the process."""
        return [self.pipe, self.process.sentinel]

    def receive(self) -> Iterator[Outcome]:
        """Outcomes that have come so far."""
        while self.left and self._has_message():
            recording, self.recording = self.recording, False  # in case Ctrl-C comes in the middle of a message
            try:
                message = self.pipe.recv()
                if message not in (READY, BROKEN) and not isinstance(message, Raised):
                    self.left.remove(message.record.job)
            except Exception as error:  # it died, a job closed the pipe, or another process that has it wrote into it
                self._give_up(one_line(error))
                return
            if message == READY:
                self.ready, self.since = True, time.monotonic()
            elif message == BROKEN:
                self.broken = True
            elif isinstance(message, Raised):
                self.raised = message.text
            else:
                self.recording = recording or message.record.notes.get("describe", {}).get("trainer") == "stacked"
                yield message

    def _has_message(self) -> bool:
        try:
            return bool(self.pipe.poll())
        except (EOFError, OSError):
            return False

    def _give_up(self, why: str) -> None:
        """End a worker that can no longer be understood, unless it is about to end by itself."""
        self.process.join(_GRACE)
        if self.process.is_alive():
            self.garbled = why
            self.kill()

    def is_alive(self) -> bool:
        return bool(self.process.is_alive())

    def death(self) -> str:
        """Why the process ended, for people."""
        if self.garbled is not None:
            return f"its worker process was killed: it could no longer be understood ({self.garbled})"
        self.process.join(_GRACE)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")  # a real-time one
            cause = " (out of memory, or somebody's kill)" if -code == signal.SIGKILL else ""
            return f"its worker process was ended by {name}{cause}"
        return f"its worker process ended with exit code {code}"

    def kill(self) -> None:
        kill_with_descendants(self.process)
        self.process.join(_GRACE)

    def forget(self) -> None:
        """Drop the chunk at hand, and the process with it."""
        self.left.clear()
        self.process = None

    def stop(self) -> None:
        if self.process is None:
            return
        if self.left:
            kill_with_descendants(self.process)
        self.pipe.close()
        self.process.join(_GRACE)
        if self.process.is_alive():
            self.kill()


#: Worker processes, and the process that started each.
_started: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@atexit.register  # later than multiprocessing did, and so called before its own, which waits for every process to end
def _kill_left() -> None:
    """Kill the workers of a runner that ends otherwise than by `map`: nobody has told them to end."""
    for process, runner in list(_started.items()):
        if runner == os.getpid():
            kill_with_descendants(process)


def _being_recorded(workers: Iterable[_Worker]) -> Iterator[Outcome]:
    """The outcomes still to come of stacks whose training is over, which it would be a pity to lose."""
    told = False
    while at_it := [worker for worker in workers if worker.left and worker.recording and worker.is_alive()]:
        if not told:
            count = sum(len(worker.left) for worker in at_it)
            print(f"interrupted: recording {count} trained models first; interrupt again to stop at once", file=sys.stderr)
            told = True
        _await_sign(at_it)
        for worker in at_it:
            yield from worker.receive()


def _await_sign(workers: list[_Worker]) -> None:
    """Wait a little for one of `workers`. While this process is stopped (Ctrl-Z, a suspended SLURM job) so are they."""
    began = time.monotonic()
    connection.wait([item for worker in workers for item in worker.signs()], timeout=_LOOK)
    stopped = time.monotonic() - began - _LOOK
    if stopped > _GRACE:
        for worker in workers:
            worker.since += stopped


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
