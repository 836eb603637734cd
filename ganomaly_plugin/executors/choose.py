"""Which executor the options of `bench run` ask for, and whether they go together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ganomaly_plugin.core import Executor
from ganomaly_plugin.errors import InvalidInput, nearest
from ganomaly_plugin.executors.inline import InlineExecutor
from ganomaly_plugin.executors.local import LocalExecutor, local_slots
from ganomaly_plugin.executors.tries import Lost
from ganomaly_plugin.selection import parse_texts
from ganomaly_plugin.store import Store

if TYPE_CHECKING:
    from ganomaly_plugin.executors.slurm import Resources

#: The options that each executor takes.
TAKES: dict[str, tuple[str, ...]] = {
    "inline": (),
    "local": ("workers", "devices", "jobs_per_device", "timeout", "retries"),
    "ray": ("timeout", "retries", "cpus_per_job", "gpus_per_job", "address"),
    "slurm": (
        *("timeout", "retries", "cpus_per_job", "gpus_per_job"),
        *("partition", "time", "memory", "max_parallel", "sbatch", "slurm_folder"),
    ),
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
        cpus_per_job: Processors that a cluster gives each job.
        gpus_per_job: GPUs that a cluster gives each job.
        address: Ray's head, host:port.
        partition: SLURM's partition.
        time: SLURM's time limit of a task, as SLURM writes it.
        memory: SLURM's memory of a task, such as "8G".
        max_parallel: Tasks that SLURM may run at once.
        sbatch: Further options of sbatch, as `name=value,...`; values are text, `true` for an option that takes none.
        slurm_folder: Where submitit's files go.
    """

    executor: str | None = None
    workers: int | None = None
    devices: tuple[str, ...] | None = None
    jobs_per_device: int | None = None
    timeout: float | None = None
    retries: int | None = None
    cpus_per_job: float | None = None
    gpus_per_job: float | None = None
    address: str | None = None
    partition: str | None = None
    time: str | None = None
    memory: str | None = None
    max_parallel: int | None = None
    sbatch: str | None = None
    slurm_folder: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in TAKES:
            raise InvalidInput(f"--executor must be {_either(TAKES)}, got {self.kind!r}.{nearest(self.kind, TAKES)}")
        for name in (each for each in WHERE_OPTIONS if each != "executor" and getattr(self, each) is not None):
            if name not in TAKES[self.kind]:
                takers = [kind for kind, options in TAKES.items() if name in options]
                raise InvalidInput(f"{_flag(name)} is for --executor {_either(takers)}, not {self.kind}. Leave one out.")
            check_line(_flag(name), getattr(self, name))
        smallest_of = {
            "workers": 1,
            "jobs_per_device": 1,
            "retries": 0,
            "cpus_per_job": 0,
            "gpus_per_job": 0,
            "max_parallel": 1,
        }
        for name, smallest in smallest_of.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InvalidInput(f"{_flag(name)} must be at least {smallest}, got {value:g}.")
        if self.kind == "slurm":
            self._check_slurm()
        if self.kind == "ray":
            self._check_ray()
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

    @property
    def on_this_machine(self) -> bool:
        """Whether jobs see the devices and folders that this process sees."""
        return self.kind in ("inline", "local")

    def _check_ray(self) -> None:
        for name in ("cpus_per_job", "gpus_per_job"):
            value = getattr(self, name)
            if value and value < 1e-4:
                raise InvalidInput(f"{_flag(name)} must be 0 or at least 0.0001 for Ray, got {value:g}.")
        if self.gpus_per_job and self.gpus_per_job > 1 and self.gpus_per_job != int(self.gpus_per_job):
            raise InvalidInput(f"--gpus-per-job must be a whole number above 1 for Ray, got {self.gpus_per_job:g}.")

    def _check_slurm(self) -> None:
        for name in ("cpus_per_job", "gpus_per_job"):
            value = getattr(self, name)
            if value is not None and value != int(value):
                raise InvalidInput(f"{_flag(name)} must be a whole number for SLURM, got {value:g}.")
        self.resources()

    def resources(self) -> Resources:
        """What each SLURM task asks for."""
        from ganomaly_plugin.executors.slurm import Resources, minutes_of

        more = parse_texts(self.sbatch, "--sbatch") if self.sbatch else {}
        for value in more.values():
            check_line("--sbatch", value)
        return Resources(
            partition=self.partition,
            minutes=None if self.time is None else minutes_of(str(self.time)),
            memory=self.memory,
            gpus=int(self.gpus_per_job) if self.gpus_per_job else None,
            cpus=int(self.cpus_per_job) if self.cpus_per_job else None,
            parallel=self.max_parallel,
            more=more,
        )

    @property
    def at_once(self) -> int:
        """How many chunks run at the same time on this machine; 1 for a cluster, whose size is its own affair."""
        if self.kind != "local":
            return 1
        return len(local_slots(self.devices, self.jobs_per_device or 1, self.workers))

    def check_device(self, device: str) -> None:
        """Raise InvalidInput when jobs cannot be on torch's `device` there."""
        if not self.on_this_machine and device not in ("auto", "cpu", "cuda"):
            raise InvalidInput(f"--device must be auto, cpu or cuda on a cluster, which numbers the GPUs, got {device!r}.")
        if not self.on_this_machine and device == "cuda" and not self.gpus_per_job:
            raise InvalidInput(
                f"--device cuda on a cluster needs --gpus-per-job, such as {'0.5' if self.kind == 'ray' else '1'}."
            )
        if self.devices is not None and device not in ("auto", "cuda"):
            raise InvalidInput(f"--devices chooses GPUs, --device says {device}. Leave one of them out.")


#: Options of `bench run` that say where jobs run, not what they are.
WHERE_OPTIONS = tuple(each.name for each in fields(Where))


def check_line(flag: str, value: object) -> None:
    """Raise InvalidInput for text with a control character: a line end would begin a line of its own in SLURM's script."""
    if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f]", value):
        raise InvalidInput(f"{flag} takes no line end or other control character, got {value!r}. Leave it out.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _either(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _check_devices(devices: tuple[str, ...]) -> None:
    import torch

    there = [str(number) for number in range(torch.cuda.device_count())]
    for device in devices or ("",):  # none at all would be nobody to do the work
        if device not in there:
            allowed = f"here are {', '.join(there)}" if there else "here is none; leave --devices out, or give --workers"
            raise InvalidInput(f"--devices takes numbers of GPUs: {allowed}; got {device!r}.")


def make_executor(where: Where, lost: Lost, store: Store) -> Executor:
    """The executor that `where` asks for.

    Args:
        where: The options.
        lost: Makes the record of a job whose worker was lost.
        store: The results folder.

    Raises:
        InvalidInput: What the executor needs is not installed, or does not answer.
    """
    if where.kind == "inline":
        return InlineExecutor()
    limits: dict[str, Any] = {"timeout": where.timeout, "retries": where.retries or 0}
    if where.kind == "slurm":
        from ganomaly_plugin.executors.slurm import SlurmExecutor, check_slurm, private_folder

        check_slurm()
        folder = private_folder(store.folder, where.slurm_folder)
        return SlurmExecutor(store, lost, folder, where.resources(), **limits)
    if where.kind == "ray":
        from ganomaly_plugin.executors.ray_cluster import RayExecutor

        cpus = 1.0 if where.cpus_per_job is None else where.cpus_per_job
        return RayExecutor(where.address, lost, cpus=cpus, gpus=where.gpus_per_job or 0.0, **limits)
    return LocalExecutor(local_slots(where.devices, where.jobs_per_device or 1, where.workers), lost, **limits)
