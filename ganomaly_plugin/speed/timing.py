"""Times of tasks taken in turns, so that a busy machine slows all alike; warm-up apart, medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ganomaly_plugin.errors import FAULTS

WARM_UP = 3  # calls of each task before any counts
LONG_WARM_UP = 10.0  # seconds after which no further call is made to warm up
SHORTEST = 0.05  # seconds: a task that is quicker is called several times in a turn, back to back

Task = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and extremes over the turns."""

    median: float
    fastest: float
    slowest: float
    repeats: int  # turns that count
    burst: int  # calls in a turn


class Stopwatch:
    """Seconds between `start` and `stop`, on `device`: by CUDA events there, by the performance counter on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._began: Any = None

    def start(self) -> None:
        """Begin, once the device has finished what it was given before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._began = torch.cuda.Event(enable_timing=True)
            self._began.record(torch.cuda.current_stream(self.device))
        else:
            self._began = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`, when the device has finished what it was given since."""
        if self.device.type == "cuda":
            ended = torch.cuda.Event(enable_timing=True)
            ended.record(torch.cuda.current_stream(self.device))
            torch.cuda.synchronize(self.device)
            return float(self._began.elapsed_time(ended)) / 1000
        return time.perf_counter() - float(self._began)


class Samples:
    """The times of one task: the first calls warm it up and say how many calls a turn has, the turns after that count."""

    def __init__(self) -> None:
        self.burst = 1
        self.seconds: list[float] = []
        self._warm_up: list[float] = []

    @property
    def warm(self) -> bool:
        """Whether the warm-up is over."""
        return len(self._warm_up) >= WARM_UP or sum(self._warm_up) > LONG_WARM_UP

    def add(self, seconds: float) -> None:
        """Note one turn of `burst` calls."""
        if self.warm:
            self.seconds.append(seconds / self.burst)
            return
        self._warm_up.append(seconds)
        if self.warm:
            self.burst = max(1, math.ceil(SHORTEST / max(self._warm_up[-1], 1e-6)))

    def timing(self) -> Timing:
        """Median and extremes."""
        return Timing(statistics.median(self.seconds), min(self.seconds), max(self.seconds), len(self.seconds), self.burst)


class Host(Protocol):
    """A task that cannot be called: a loop of somebody else's, which calls us between its steps."""

    def run(self, repeats: int, turn: Task) -> Timing:
        """Time `repeats` turns of the loop's own steps, and call `turn` between them."""
        ...


def time_in_turns(
    tasks: Mapping[str, Task],
    device: torch.device,
    repeats: int,
    *,
    host: tuple[str, Host] | None = None,
    patience: float = math.inf,
    failed: Callable[[str, BaseException], None] | None = None,
) -> dict[str, Timing]:
    """The timing of each task, and of the host's loop, by name; of one that fails there is none.

    Args:
        tasks: What to call.
        device: Where the tasks run.
        repeats: How many turns count.
        host: The name of a further row, and the loop between whose steps the turns are taken.
        patience: A task that has taken so many seconds in turns that count is left out of the rest.
        failed: Called with the name and the error of a task that fails; None raises it.
    """
    watch = Stopwatch(device)
    samples = {name: Samples() for name in tasks}

    def call(name: str) -> None:
        try:
            watch.start()
            for _ in range(samples[name].burst):
                tasks[name]()
            samples[name].add(watch.stop())
        except FAULTS as error:
            if failed is None:
                raise
            del samples[name]
            failed(name, error)

    for name in tasks:
        while name in samples and not samples[name].warm:
            call(name)

    def turn() -> None:
        for name, its in list(samples.items()):
            if sum(its.seconds) * its.burst <= patience:
                call(name)

    if host is None:
        for _ in range(repeats):
            turn()
        return {name: its.timing() for name, its in samples.items()}
    hosted = host[1].run(repeats, turn)
    return {host[0]: hosted, **{name: its.timing() for name, its in samples.items()}}
