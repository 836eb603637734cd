"""Training curves in loggers: what arrives there, once a job, also after an interruption. The heavy packages: -m loggers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_executors import wait_for
from test_measures import outcome

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report.loggers import KEY, SINKS, Loggers, check_loggers
from ganomaly_plugin.store import Store

RUN = ["run", "--models", "ae,pca", "--classes", "0", "--seeds", "0-1", "--hparams", "features=2,latent_dim=4", "--epochs", 2]


@pytest.mark.slow
def test_csv_once_a_job_with_any_executor(bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bench(*RUN, "--limit", 2, "--out", out)[0] == 0  # without a logger: the next run catches up
    code, _, stderr = bench(*RUN, "--logger", "csv", "--workers", 1, "--out", out)
    assert code == 0 and "2 done before" in stderr, stderr
    records = {record.job.slug: record for record in Store(out).records()}
    folders = {path.name: path for path in (out / "logs" / "csv").iterdir()}
    assert set(folders) == set(records) and len(records) == 4
    for slug, record in records.items():
        frame = pd.read_csv(folders[slug] / "metrics.csv")
        assert frame["test/auroc"].dropna().tolist() == [pytest.approx(record.metrics["auroc"])]
        if record.job.detector == "ae":
            curve = frame.dropna(subset="train/reconstruction")
            assert curve["step"].tolist() == [1, 2]
            wanted = [epoch["reconstruction"] for epoch in record.history]
            assert curve["train/reconstruction"].tolist() == pytest.approx(wanted)
            params = yaml.safe_load((folders[slug] / "hparams.yaml").read_text())
            assert params["hparams.features"] == 2 and params["class"] == "0" and params["epochs"] == 2
    before = {path: path.read_bytes() for path in (out / "logs").rglob("*") if path.is_file()}
    assert bench(*RUN, "--logger", "csv,csv", "--out", out)[0] == 0
    assert before == {path: path.read_bytes() for path in (out / "logs").rglob("*") if path.is_file()}


def test_bad_loggers_stop_before_any_work(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, stderr = bench(*RUN, "--logger", "tensorbord", "--out", tmp_path / "out")
    assert code == 2 and "Did you mean 'tensorboard'?" in stderr and not (tmp_path / "out").exists()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    code, _, stderr = bench(*RUN, "--logger", "csv,mlflow", "--out", tmp_path / "out")
    assert code == 2 and "needs the package mlflow" in stderr and "pip install mlflow" in stderr
    assert stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_logger_that_fails_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [outcome("a", str(c)).record for c in range(3)]
    loggers = Loggers(["csv"], tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr("lightning.pytorch.loggers.CSVLogger.finalize", lambda *_: 1 / 0)
        for record in made[:2]:
            loggers.log(record)
    assert capsys.readouterr().err == "--logger csv failed: ZeroDivisionError: division by zero; run again to catch up\n"
    assert list((tmp_path / "logs" / "csv").iterdir()) == []  # no part of a run
    for record in made:
        loggers.log(record)
    assert len(list((tmp_path / "logs" / "csv").iterdir())) == 3


@pytest.mark.loggers
def test_tensorboard_events_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    record = outcome("a").record
    for _ in range(2):
        Loggers(["tensorboard"], tmp_path).log(record)
    (folder,) = (tmp_path / "logs" / "tensorboard").iterdir()
    assert folder.name == record.job.slug and len(list(folder.glob("events*"))) == 1
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (k + 1, pytest.approx(epoch["loss"])) for k, epoch in enumerate(record.history)
    ]
    assert [e.value for e in events.Scalars("test/auroc")] == [pytest.approx(record.metrics["auroc"])]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["detector"].string_value == "a" and start.hparams["data.image_size"].number_value == 32


@pytest.mark.loggers
def test_mlflow_sqlite_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    records = [outcome(d).record for d in ("a", "b[x=1]")]
    out = tmp_path / "sweep"
    loggers = Loggers(["mlflow"], out)
    client = MlflowClient(f"sqlite:///{out / 'logs' / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sweep")
    client.create_run(experiment.experiment_id, tags={KEY: records[0].job.key})  # cut short by a kill
    for record in (*records, *records):
        loggers.log(record)
    Loggers(["mlflow"], out).log(records[0])  # the next day
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert set(runs) == {"a · cifar10 · 0 · s0", "b[x=1] · cifar10 · 0 · s0"}
    run = runs["b[x=1] · cifar10 · 0 · s0"]
    assert run.info.status == "FINISHED" and run.data.tags[KEY] == records[1].job.key
    assert run.data.params["protocol"] == "one-anomalous/paper-v1" and run.data.params["data.image_size"] == "32"
    assert run.data.metrics["test/auroc"] == pytest.approx(records[1].metrics["auroc"])
    curve = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss"))
    assert curve == [(k + 1, pytest.approx(epoch["loss"])) for k, epoch in enumerate(records[1].history)]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]  # nothing beside the results folder
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    with pytest.raises(InvalidInput, match="--logger mlflow cannot be opened"):
        Loggers(["mlflow"], out)


@pytest.mark.loggers
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    record, out = outcome("a").record, tmp_path / "50% #1"  # no name for a project of W&B's
    for _ in range(2):
        Loggers(["wandb"], out).log(record)
    (file,) = (out / "logs" / "wandb").rglob("*.wandb")
    wait_for(lambda: file.stat().st_size > 500)  # its service writes in a process of its own
    assert record.job.key in file.name and b"train/loss" in file.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.loggers
def test_every_logger_is_here() -> None:
    check_loggers(SINKS)
