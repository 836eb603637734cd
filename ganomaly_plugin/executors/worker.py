"""What a worker process of the local executor does: take chunks through a pipe, and send back the outcomes of their jobs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ganomaly_plugin.core import Chunk, Outcome
from ganomaly_plugin.errors import one_line
from ganomaly_plugin.executors.processes import end_with_parent, let_interrupts_in
from ganomaly_plugin.streams import mend_streams

READY = "ready"  # a worker's first message
BROKEN = "broken"  # and one before its last outcome, when its GPU refuses to go on


@dataclass(frozen=True)
class Raised:
    """A worker's last message, where a chunk ended with what no job's record could be made of: a KeyboardInterrupt, say."""

    text: str


def serve(pipe: Any, run: Callable[[Chunk], Iterable[Outcome]], threads: int | None, parent: int, bound: bool) -> None:
    """A worker's life: take a chunk, send its outcomes, until the pipe closes.

    Args:
        pipe: To the runner.
        run: What to do with a chunk.
        threads: For torch; None: as many as it chooses.
        parent: The runner's process.
        bound: The thread that started this process lives as long as the runner does.
    """
    code, worker = 1, os.getpid()
    try:
        _begin(pipe, threads, parent, bound)
        pipe.send(READY)
        while True:
            try:
                chunk = pipe.recv()
            except (EOFError, OSError):  # the runner needs no more of it
                code = 0
                return
            _work(pipe, run, chunk)
    except BaseException as error:
        with contextlib.suppress(Exception):  # the runner has gone
            pipe.send(Raised(one_line(error)))
    finally:
        _leave(code, worker)


def _begin(pipe: Any, threads: int | None, parent: int, bound: bool) -> None:
    # Ctrl-C and the end are for the runner, which decides about its workers. Not SIG_IGN: what a job starts would inherit it.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    let_interrupts_in()
    if bound:
        end_with_parent(parent)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    if hasattr(os, "register_at_fork"):
        _look_after_forks(pipe)
    mend_streams()
    sys.stdout = sys.stderr  # stdout is for the runner's tables
    with contextlib.suppress(OSError):  # one of them is closed
        os.dup2(2, 1)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _work(pipe: Any, run: Callable[[Chunk], Iterable[Outcome]], chunk: Chunk) -> None:
    """Run a chunk and send its outcomes."""
    for outcome in run(chunk):
        record = outcome.record
        doubtful = record.status == "failed" or "samples" in record.notes
        broken = doubtful and _device_is_broken(str(record.environment["device"]))
        if broken:
            pipe.send(BROKEN)
        if not broken or record.status == "done" or len(chunk) == 1:
            pipe.send(outcome)  # of several jobs, whose fault a failure was shows when each runs alone
        if broken:
            os._exit(1)


def _leave(code: int, worker: int) -> None:
    """End this process now, without waiting for threads and processes that jobs left behind."""
    if os.getpid() == worker:  # a fork has inherited the list of processes, which are not its own
        for child in multiprocessing.active_children():
            child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _look_after_forks(pipe: Any) -> None:
    """What a job forks shall have no part in the worker's work, and end when the job tells it to.

    SIGTERM means there what it means to any process.
    """

    def block(how: int = signal.SIG_BLOCK) -> None:  # one that comes before the child has its own handler waits
        signal.pthread_sigmask(how, {signal.SIGTERM})

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        block(signal.SIG_UNBLOCK)
        pipe.close()

    os.register_at_fork(before=block, after_in_parent=lambda: block(signal.SIG_UNBLOCK), after_in_child=in_child)


def _device_is_broken(device: str) -> bool:
    """Whether CUDA refuses everything in this process from now on, as it does after an illegal access or a failed assertion.

    `device` is that of the job; of one on the CPU the GPU is asked that its detector may have used all the same.
    """
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize(device if device.startswith("cuda") else None)
    except RuntimeError:
        return True
    return False


def _follow(parent: int) -> None:
    """End this process when the runner is gone, also in the middle of a job that lets other threads have a turn."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
