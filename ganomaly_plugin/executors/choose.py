"""Which executor the options of `bench run` ask for."""

from __future__ import annotations

from dataclasses import dataclass

from ganomaly_plugin.core import Executor
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.executors.inline import InlineExecutor
from ganomaly_plugin.executors.local import LocalExecutor, Lost, local_slots


@dataclass(frozen=True)
class Where:
    """Where jobs run; None and 0 are "not asked for". Nothing here changes a job's key or result.

    Attributes:
        workers: Worker processes on a machine without a choice of devices.
        devices: GPUs by number, each with `jobs_per_device` worker processes.
        jobs_per_device: Worker processes for each device.
        timeout: Seconds a job may take.
        retries: Further tries for a job whose worker died.
    """

    workers: int | None = None
    devices: tuple[str, ...] | None = None
    jobs_per_device: int | None = None
    timeout: float | None = None
    retries: int | None = None

    def __post_init__(self) -> None:
        for name, smallest in (("workers", 1), ("jobs_per_device", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InvalidInput(f"{name} must be at least {smallest}, got {value}.")
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidInput(f"timeout must be more than 0 seconds, got {self.timeout}.")
        if self.workers is not None and (self.devices is not None or self.jobs_per_device is not None):
            raise InvalidInput("Give either --workers, or --devices and --jobs-per-device.")
        if self.devices is not None:
            _check_devices(self.devices)

    @property
    def isolated(self) -> bool:
        """Whether jobs run in processes of their own."""
        return any(
            value is not None for value in (self.workers, self.devices, self.jobs_per_device, self.timeout, self.retries)
        )


def _check_devices(devices: tuple[str, ...]) -> None:
    import torch

    there = [str(number) for number in range(torch.cuda.device_count())]
    for device in devices:
        if device not in there:
            allowed = f"here are {', '.join(there)}" if there else "here is none; leave --devices out, or give --workers"
            raise InvalidInput(f"--devices takes numbers of GPUs: {allowed}; got {device!r}.")


def make_executor(where: Where, lost: Lost) -> Executor:
    """The simplest executor that does what `where` asks for."""
    if not where.isolated:
        return InlineExecutor()
    slots = local_slots(where.devices, where.jobs_per_device or 1, where.workers)
    return LocalExecutor(slots, lost, timeout=where.timeout, retries=where.retries or 0)
