"""A step recorded once and replayed: a CUDA graph launches all kernels of a step at once, without Python between them.

What a graph holds is the work on the device alone. It reads its inputs where they lay when it was recorded, writes its
outputs over those of the step before, and knows nothing of a number that Python has changed since.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ganomaly_plugin.errors import one_line

#: Work on the device: from tensors in dicts and lists, and tensors that it changes in place, to tensors.
Work: TypeAlias = Callable[[Any], dict[str, Tensor]]
#: Records work on these inputs without its being done: `(its outputs, what to call to do it)`.
Record: TypeAlias = Callable[[Work, Any], tuple[dict[str, Tensor], Callable[[], None]]]

WARM_UP = 3  # steps launched one kernel at a time first, in which libraries choose their kernels and allocate what they need
_TURNS = threading.Lock()  # one recording at a time: of two, either would break the other off
_AGREE = 0.5  # of a step's change: a replayed step that differs by more from the step itself does other work


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where work on `device` is recorded; torch's own stream for it is of the device that recorded first."""
    return torch.cuda.Stream(device)


def cuda_graph(work: Work, inputs: Any) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Record `work` as a CUDA graph.

    When the device breaks a recording off, torch leaves its stream current, its allocator recording (so that it never again
    frees memory to make room), and its random numbers as if a recording went on. All three are put right here. The error raised
    is then that of the work, which says what was refused. Other threads may use the device meanwhile.
    """
    device = tree_leaves(inputs)[0].device
    refused: Exception | None = None
    with _TURNS, torch.cuda.device(device):
        gc.collect()  # graphs and memory of former recordings, of which none may go away during this one
        record: Any = functools.partial(torch.cuda.graph, stream=_stream(device), capture_error_mode="thread_local")
        here, graph, pool = torch.cuda.current_stream(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with record(graph, pool=pool):
                try:
                    outputs = work(inputs)
                except Exception as error:
                    refused = error
                    raise
        except Exception as error:
            torch.cuda.set_stream(here)
            with contextlib.suppress(RuntimeError):  # raised where the recording did come to its end
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
            with contextlib.suppress(RuntimeError), record(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=device)  # a recording that comes to its end
            raise refused or error from None
    return outputs, graph.replay


_never_records = False


@contextlib.contextmanager
def never_recorded() -> Iterator[None]:
    """Within it no work is recorded or replayed, for who has to see every operation of it."""
    global _never_records
    before, _never_records = _never_records, True
    try:
        yield
    finally:
        _never_records = before


def record_on(device: torch.device) -> Record | None:
    """How work on `device` is recorded; None where it cannot be."""
    return cuda_graph if device.type == "cuda" and not _never_records else None


class Replayed:
    """Does some work again and again on new inputs of the same form and shapes: at first as it is, then as it was recorded.

    Before a recording is trusted it is held to the work itself, once, from the same state. One that cannot be made, or does
    something else, is a warning, and the work goes on as it is.

    Args:
        work: What to do.
        state: All tensors that the work changes in place, asked for when it is recorded.
        record: How to record; None never does.
    """

    def __init__(self, work: Work, state: Callable[[], Sequence[Tensor]], record: Record | None) -> None:
        self._work, self._state, self._record = work, state, record
        self._calls = 0
        self._stream: Any = None  # where the work is done before it is recorded: one, since memory belongs to a stream
        self._inputs: Any = None
        self._outputs: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether calls are replayed by now."""
        return self._replay is not None

    def __call__(self, inputs: Any) -> dict[str, Tensor]:
        """The outputs of the work on `inputs`."""
        if self._record is None or _never_records:
            return self._work(inputs)
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._aside(inputs)
        if self._replay is None:
            return self._first(inputs, self._record)
        for mine, theirs in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            mine.copy_(theirs, non_blocking=True)
        self._replay()
        return {name: value.clone() for name, value in self._outputs.items()}

    def _aside(self, inputs: Any) -> dict[str, Tensor]:
        """The work itself, on a CUDA stream of its own, as libraries need it before a graph is recorded."""
        given = tree_leaves(inputs)
        device = given[0].device
        if device.type != "cuda":
            return self._work(inputs)
        self._stream = self._stream or torch.cuda.Stream(device)
        here, aside = torch.cuda.current_stream(device), self._stream
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            outputs = self._work(inputs)
        here.wait_stream(aside)
        for value in (*given, *outputs.values()):
            value.record_stream(aside)
            value.record_stream(here)
        return outputs

    def _first(self, inputs: Any, record: Record) -> dict[str, Tensor]:
        """Do the work, then record it, and do it once more as recorded, from the same state."""
        state = self._state()
        before = [tensor.detach().clone() for tensor in state]
        outputs = {name: value.clone() for name, value in self._aside(inputs).items()}
        after = [tensor.detach().clone() for tensor in state]
        self._inputs = tree_map(torch.clone, inputs)
        try:
            self._outputs, replay = record(self._work, self._inputs)
            _restore(state, before)
            replay()
            if _agree(state, after, before):
                self._replay = replay
                return {name: value.clone() for name, value in self._outputs.items()}
            problem = "replayed, it does something else"
        except Exception as error:  # the device refuses something in it, or has no memory for a second copy
            problem = one_line(error)
            traceback.clear_frames(error.__traceback__)  # they hold what was computed so far
        _restore(state, after)
        self._record, self._inputs, self._outputs = None, None, {}
        warnings.warn(f"a step cannot be replayed as one ({problem}); its kernels are launched one by one", stacklevel=2)
        return outputs


def _restore(state: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(state, values, strict=True):
            tensor.copy_(value)


def _agree(state: Sequence[Tensor], expected: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Whether `state` came about from `before` as `expected` did, but for rounding and what Adam makes of it."""
    sums = []  # kept on the device, which is asked once
    for mine, theirs, old in zip(state, expected, before, strict=True):
        moved = theirs.double() - old.double()
        scale = moved.abs().max().clamp(min=1e-30) if moved.numel() else moved.new_ones(())
        apart = (mine.detach().double() - theirs.double()) / scale
        sums.append(torch.stack([each.nan_to_num(0.0, 0.0, 0.0).square().sum() for each in (apart, moved / scale)]))
    wrong, change = torch.stack(sums).sum(0).tolist() if sums else (0.0, 0.0)
    return wrong <= _AGREE**2 * max(change, 1.0)
