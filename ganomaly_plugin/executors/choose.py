"""Which executor the options of `bench run` ask for, and whether they go together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from ganomaly_plugin.core import Executor
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.executors.inline import InlineExecutor
from ganomaly_plugin.executors.local import LocalExecutor, local_slots
from ganomaly_plugin.executors.tries import Lost

#: The options that each executor takes.
TAKES: dict[str, tuple[str, ...]] = {
    "inline": (),
    "local": ("workers", "devices", "jobs_per_device", "timeout", "retries"),
}


@dataclass(frozen=True)
class Where:
    """Where jobs run; None is "not asked for". Nothing here changes a job's key or result.

    Attributes:
        executor: A name in `TAKES`; None: "local".
        workers: Worker processes on a machine without a choice of devices.
        devices: GPUs by number, each with `jobs_per_device` worker processes.
        jobs_per_device: Worker processes for each device.
        timeout: Seconds a job may take.
        retries: Further tries for a job whose worker died.
    """

    executor: str | None = None
    workers: int | None = None
    devices: tuple[str, ...] | None = None
    jobs_per_device: int | None = None
    timeout: float | None = None
    retries: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in TAKES:
            near = difflib.get_close_matches(self.kind, TAKES, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InvalidInput(f"--executor must be {_either(TAKES)}, got {self.kind!r}.{hint}")
        for name in self._given():
            if name not in TAKES[self.kind]:
                takers = [kind for kind, options in TAKES.items() if name in options]
                raise InvalidInput(f"{_flag(name)} is for --executor {_either(takers)}, not {self.kind}. Leave one out.")
        for name, smallest in (("workers", 1), ("jobs_per_device", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InvalidInput(f"{_flag(name)} must be at least {smallest}, got {value}.")
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidInput(f"--timeout must be more than 0 seconds, got {self.timeout:g}.")
        if self.workers is not None and (self.devices is not None or self.jobs_per_device is not None):
            raise InvalidInput("Give either --workers, or --devices and --jobs-per-device.")
        if self.devices is not None:
            _check_devices(self.devices)

    @property
    def kind(self) -> str:
        """The executor's name."""
        return self.executor or "local"

    def _given(self) -> Iterator[str]:
        return (each.name for each in fields(self) if each.name != "executor" and getattr(self, each.name) is not None)

    def check_device(self, device: str) -> None:
        """Raise InvalidInput when jobs cannot be on torch's `device` there."""
        if self.devices is not None and device not in ("auto", "cuda"):
            raise InvalidInput(f"--devices chooses GPUs, --device says {device}. Leave one of them out.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _either(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _check_devices(devices: tuple[str, ...]) -> None:
    import torch

    there = [str(number) for number in range(torch.cuda.device_count())]
    for device in devices:
        if device not in there:
            allowed = f"here are {', '.join(there)}" if there else "here is none; leave --devices out, or give --workers"
            raise InvalidInput(f"--devices takes numbers of GPUs: {allowed}; got {device!r}.")


def make_executor(where: Where, lost: Lost) -> Executor:
    """The executor that `where` asks for; `lost` makes the record of a job whose worker was lost."""
    if where.kind == "inline":
        return InlineExecutor()
    slots = local_slots(where.devices, where.jobs_per_device or 1, where.workers)
    return LocalExecutor(slots, lost, timeout=where.timeout, retries=where.retries or 0)
