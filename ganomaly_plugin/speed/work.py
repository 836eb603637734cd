"""How much work a task is: floating-point operations, the most memory it holds, and what the device can do at best."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ganomaly_plugin.speed.timing import Task
from ganomaly_plugin.training.captured import never_recorded

#: Side of the square matrices whose product is the ceiling: large enough that nothing but arithmetic takes time.
SIDES = {"cpu": 2048, "cuda": 8192}


def count_flops(task: Task) -> int:
    """Floating-point operations of the convolutions and matrix products of one call, backward passes included.

    A multiplication and an addition count as two. Element-wise work, under a hundredth here, is not counted. Nothing is
    replayed meanwhile, since the operations of a CUDA graph are not seen.
    """
    with never_recorded(), _Counter() as counter:
        task()
    return counter.total


class _Counter(TorchDispatchMode):
    """Sums torch's own formulas. Its FlopCounterMode also tracks modules, which a gradient within a step breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def peak_memory(task: Task, device: torch.device) -> int:
    """The most bytes that torch's allocator held at once during one call of `task`, beyond those held before.

    On CUDA it is the caching allocator's own count. On a CPU it is the running sum of the allocations and releases that
    torch's profiler sees: the same definition, so not the process's size, and without what oneDNN keeps for itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        task()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    profiler: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _without_remarks():
        profiler.start()
    try:
        kept = task()
    finally:
        with _without_remarks():
            profiler.stop()
    held = peak = 0
    recorded = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Keeps what the profiler's library itself writes to standard error, when it starts and stops, off the terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a descriptor, not a path
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def matmul(device: torch.device, dtype: torch.dtype, side: int | None = None) -> tuple[Callable[[], Any], int]:
    """A product of two large square matrices and its floating-point operations: what the device reaches at best."""
    side = side or SIDES.get(device.type, SIDES["cpu"])
    a, b = (torch.randn(side, side, generator=torch.Generator().manual_seed(k)).to(device, dtype) for k in (0, 1))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * side**3
