"""Records → training curves in TensorBoard, MLflow, Weights & Biases or CSV files, through Lightning's loggers.

A run is written when its record arrives, from the record alone: so every executor feeds every logger, what was done before
is caught up with, and a run that is there is not written again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ganomaly_plugin.core import Job, RunRecord
from ganomaly_plugin.errors import InvalidInput, check_known, one_line

KEY = "ganomaly_plugin.key"  # the tag that says which job an MLflow run is of

#: Names of per-epoch values that are no training losses.
_CURVES = {"validation": "validation/criterion", "oracle_auroc": "test/oracle_auroc"}


def parameters(job: Job) -> dict[str, Any]:
    """Everything that determines a job, flat."""
    budget = {"epochs": job.epochs} if job.steps is None else {"steps": job.steps}
    found = {"detector": job.detector, "dataset": job.dataset, **{f"data.{key}": value for key, value in job.data.items()}}
    found |= {"protocol": job.protocol, "class": job.category, "seed": job.seed, **budget, **job.sampling}
    return found | {f"hparams.{key}": value for key, value in job.hparams.items()}


def run_name(job: Job) -> str:
    """How a logger calls the run of a job."""
    return f"{job.detector_label} · {job.dataset} · {job.category} · s{job.seed}"


def curves(record: RunRecord) -> list[dict[str, float]]:
    """The values of each epoch, by the names they get in a logger."""
    return [{_CURVES.get(name, f"train/{name}"): value for name, value in epoch.items()} for epoch in record.history]


def finals(record: RunRecord) -> dict[str, float]:
    """The results, by the names they get in a logger."""
    measured = {f"test/{name}": float(value) for name, value in record.metrics.items()}
    return measured | {f"seconds/{name}": float(value) for name, value in record.seconds.items()}


class Sink(ABC):
    """Where finished jobs become runs.

    Args:
        folder: The logger's own folder below the results.
        experiment: What groups the runs; the name of the results folder.
    """

    package: ClassVar[str]  # what must be installed

    def __init__(self, folder: Path, experiment: str) -> None:
        self.folder, self.experiment = folder, experiment

    @abstractmethod
    def has(self, job: Job) -> bool:
        """Whether `job` has its run, complete."""

    @abstractmethod
    def write(self, record: RunRecord) -> None:
        """Write the run of a finished job."""

    def _fill(self, logger: Any, record: RunRecord) -> None:
        """Give Lightning's `logger` all of `record`, epochs counted from 1."""
        logger.log_hyperparams(parameters(record.job))
        for epoch, values in enumerate(curves(record), 1):
            logger.log_metrics(values, step=epoch)
        logger.log_metrics(finals(record), step=len(record.history))
        logger.finalize("success")


class _FolderSink(Sink):
    """A folder a job, which gets its name when it is complete."""

    def has(self, job: Job) -> bool:
        return (self.folder / job.slug).is_dir()

    def write(self, record: RunRecord) -> None:
        partial = self.folder / f".{record.job.slug}.{os.getpid()}.tmp"
        try:
            self._fill(self._logger(partial), record)
            with contextlib.suppress(OSError):  # another sweep on this folder has written it meanwhile
                partial.rename(self.folder / record.job.slug)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @abstractmethod
    def _logger(self, folder: Path) -> Any:
        """Lightning's logger that writes into `folder`."""


class CsvSink(_FolderSink):
    """`metrics.csv` and `hparams.yaml` a job."""

    package = "lightning"

    def _logger(self, folder: Path) -> Any:
        from lightning.pytorch.loggers import CSVLogger

        return CSVLogger(folder.parent, name="", version=folder.name)


class TensorBoardSink(_FolderSink):
    """One event file a job, with its hyperparameters for the HPARAMS tab."""

    package = "tensorboard"

    def _logger(self, folder: Path) -> Any:
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False)

    def _fill(self, logger: Any, record: RunRecord) -> None:
        for epoch, values in enumerate(curves(record), 1):
            logger.log_metrics(values, step=epoch)
        logger.log_hyperparams(parameters(record.job), metrics=finals(record), step=len(record.history))
        logger.finalize("success")


class MlflowSink(Sink):
    """Runs of one MLflow experiment, in a SQLite file of the results folder unless $MLFLOW_TRACKING_URI says otherwise."""

    package = "mlflow"

    def __init__(self, folder: Path, experiment: str) -> None:
        super().__init__(folder, experiment)
        for talker in ("alembic", "mlflow.store.db", "lightning.pytorch.loggers.mlflow"):
            logging.getLogger(talker).setLevel(logging.ERROR)  # they tell of each table that they make
        here = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or here
        self.artifacts = (folder.resolve() / "artifacts").as_uri() if self.uri == here else None
        if self.artifacts:
            folder.mkdir(parents=True, exist_ok=True)
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(self.uri)
        known = self.client.get_experiment_by_name(experiment)
        self.experiment_id = known.experiment_id if known else self.client.create_experiment(experiment, self.artifacts)

    def has(self, job: Job) -> bool:
        """Whether there is a run with the job's key that came to its end."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{job.key}'")
        return any(run.info.status == "FINISHED" for run in found)

    def write(self, record: RunRecord) -> None:
        """Write the run, instead of a part of it that may be there."""
        from lightning.pytorch.loggers import MLFlowLogger

        for run in self.client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{record.job.key}'"):
            self.client.delete_run(run.info.run_id)  # cut short by the end of its sweep
        job = record.job
        tags = {KEY: job.key, "slug": job.slug, "mlflow.source.name": "bench run"}
        logger = MLFlowLogger(experiment_name=self.experiment, tracking_uri=self.uri, tags=tags, run_name=run_name(job))
        self._fill(logger, record)


class WandbSink(Sink):
    """Runs of one project at Weights & Biases; $WANDB_MODE=offline keeps them in the results folder."""

    package = "wandb"

    def has(self, job: Job) -> bool:
        """Whether this folder remembers the job's run; the server is not asked."""
        return self._mark(job).is_file()

    def write(self, record: RunRecord) -> None:
        """Write the run under the job's key, which W&B knows it by."""
        from lightning.pytorch.loggers import WandbLogger

        job = record.job
        self.folder.mkdir(parents=True, exist_ok=True)
        project = os.environ.get("WANDB_PROJECT") or re.sub(r"[/\\#?%:]", "_", self.experiment)  # which W&B takes in no name
        options: dict[str, Any] = {"project": project, "save_dir": self.folder}
        logger = WandbLogger(name=run_name(job), id=job.key, group=job.dataset, **options)
        self._fill(logger, record)
        logger.experiment.finish()
        self._mark(job).touch()

    def _mark(self, job: Job) -> Path:
        return self.folder / f"{job.slug}.done"


SINKS: dict[str, type[Sink]] = {"csv": CsvSink, "tensorboard": TensorBoardSink, "mlflow": MlflowSink, "wandb": WandbSink}


def check_loggers(names: Iterable[str]) -> None:
    """Raise InvalidInput for a logger that is unknown or whose package is not installed."""
    for name in names:
        check_known("logger", name, SINKS)
        if importlib.util.find_spec(SINKS[name].package) is None:
            package = SINKS[name].package
            raise InvalidInput(
                f"--logger {name} needs the package {package}, which is not installed. Run pip install {package}."
            )


class Loggers:
    """The loggers of a sweep, below `logs/` of its results folder.

    A logger that fails costs no result: it says so in one line, and the same `bench run` command catches up.

    Args:
        names: Keys of SINKS.
        out: The results folder.

    Raises:
        InvalidInput: A logger is unknown, not installed, or cannot be opened.
    """

    def __init__(self, names: Sequence[str], out: Path) -> None:
        check_loggers(names)
        self.sinks: dict[str, Sink] = {}
        self._complained: set[str] = set()
        for name in dict.fromkeys(names):
            try:
                self.sinks[name] = SINKS[name](out / "logs" / name, out.resolve().name)
            except Exception as error:  # a tracking server or database may raise anything
                raise InvalidInput(f"--logger {name} cannot be opened: {one_line(error)}") from error

    def log(self, record: RunRecord) -> None:
        """Write the run of `record` where it is missing; a failed job has no curves."""
        if record.status != "done":
            return
        for name, sink in self.sinks.items():
            try:
                if not sink.has(record.job):
                    sink.write(record)
            except Exception as error:  # as above
                if name not in self._complained:
                    print(f"--logger {name} failed: {one_line(error)}; run again to catch up", file=sys.stderr)
                self._complained.add(name)
