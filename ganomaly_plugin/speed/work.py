"""How much work a task is: operations, memory moved and held; and what the device can do at best."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ganomaly_plugin.speed.timing import Task
from ganomaly_plugin.training.captured import never_recorded

#: Side of the square matrices whose product is the ceiling: large enough that nothing but arithmetic takes time.
SIDES = {"cpu": 2048, "cuda": 8192}
#: Numbers whose copy is the memory's ceiling: too many for any cache.
COPIED = {"cpu": 2**26, "cuda": 2**29}


@dataclass(frozen=True)
class Work:
    """What a task does, whoever does it.

    Attributes:
        flops: Floating-point operations of convolutions and matrix products, backward passes included. A multiplication and an
            addition count as two. Element-wise work, under a hundredth here, is not counted.
        moved: Bytes that the operations read and write, each its own: what they move through a memory whose caches keep nothing
            from one operation to the next. What an operation keeps to itself, as patches within a convolution, is not seen.
    """

    flops: int
    moved: int


def count_work(task: Task) -> Work:
    """The work of one call of `task`. Nothing is replayed meanwhile, since the operations of a CUDA graph are not seen."""
    with never_recorded(), _Counter() as counter:
        task()
    return Work(counter.flops, counter.moved)


class _Counter(TorchDispatchMode):
    """Sums torch's own formulas. Its FlopCounterMode also tracks modules, which a gradient within a step breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))
        self.moved += _moved(func, args, kwargs, result)
        return result


def _moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operation reads and writes."""
    name = func._schema.name.partition("::")[2]
    if "empty" in name or name == "renew":  # writes nothing; or only what a model that collapsed needs
        return 0
    overwrites = name in ("copy_", "fill_", "zero_")  # in place, but what was there is not read
    only_shape = name.startswith("new_") or name.endswith("_like")
    changed: list[Tensor] = []
    read: list[Tensor] = []
    for k, argument in enumerate(func._schema.arguments):
        values = _tensors(args[k] if k < len(args) else kwargs.get(argument.name))
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        if is_changed:
            changed += values
        if not only_shape and not (is_changed and (overwrites or argument.is_out)):
            read += values
    given = {_place(value) for value in _tensors((args, kwargs))}
    made = [value for value in _tensors(result) if _place(value) not in given]
    if not changed and not made:  # a view of what it was given
        return 0
    return sum(value.numel() * value.element_size() for value in (*read, *changed, *made))


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def peak_memory(task: Task, device: torch.device) -> int:
    """The most bytes that torch's allocator held at once during one call of `task`, beyond those held before.

    On CUDA it is the caching allocator's own count. On a CPU it is the running sum of the allocations and releases that
    torch's profiler sees: the same definition, so not the process's size, and without what oneDNN keeps for itself.
    """
    gc.collect()  # else models that failed before go away in the middle of it
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


def copying(device: torch.device, count: int | None = None) -> tuple[Callable[[], Any], int]:
    """A copy of a large tensor, of `count` numbers, and the bytes that it moves: what the device's memory reaches at best."""
    source = torch.zeros(count or COPIED.get(device.type, COPIED["cpu"]), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes
