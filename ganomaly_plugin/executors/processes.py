"""How worker processes begin, and end with all that they started, as far as each system can do that."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from ganomaly_plugin.claims import is_alive, started

_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """A process that is started within gets no Ctrl-C before it calls `let_interrupts_in`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else started with the first process, and what it does to start undoes the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_interrupts_in() -> None:
    """End what `interrupts_blocked` began, in the process that was started."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_with_parent(parent: int) -> None:
    """End this process when the thread of `parent` that started it ends, whatever this one is at; now, if `parent` has ended.

    Only Linux does that; elsewhere a thread that looks after `parent` has to wait for its turn.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def kill_with_descendants(process: Any) -> None:
    """Kill a process of `multiprocessing` and, on Linux, those that it started, and those that they started in turn.

    No process group: Ctrl-Z is to suspend workers with their runner.
    """
    if not process.is_alive():  # and its number may be another's
        return
    below = [(pid, started(pid)) for pid in descendants(process.pid)]
    process.kill()
    for pid, since in below:
        if since is not None and is_alive(pid, since):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started and that they started in turn, parents first; [] where there is no /proc."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
            children[int(path.read_bytes().rpartition(b")")[2].split()[1])].append(int(path.parent.name))
    found = list(children[pid])
    for each in found:  # which grows meanwhile
        found += children[each]
    return found
