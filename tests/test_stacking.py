"""Sweeps whose seeds and classes are trained together: chunks, records, failures, resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from sweeps import jobs

from ganomaly_plugin.combine import compare
from ganomaly_plugin.core import Job, RunRecord
from ganomaly_plugin.detectors.ae import AutoencoderRecipe
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.runner import Settings, run_chunk
from ganomaly_plugin.stacking import Stacking, stack_key, why_alone
from ganomaly_plugin.store import Store
from ganomaly_plugin.training.memory import bytes_of_model, models_that_fit
from ganomaly_plugin.training.together import Member

SWEEP = ["--datasets", "digits", "--image-size", 16, "--classes", "0,1", "--seeds", "0-1"]
SWEEP += ["--train-fraction", 0.25, "--executor", "inline", "--epochs", 1]
TINY = "[features=2,latent_dim=2]"


def job(detector: str = "ae", category: str = "0", seed: int = 0, **more: object) -> Job:
    fields = {"hparams": {}, "dataset": "digits", "data": {}, "protocol": "p", "epochs": 1, **more}
    return Job(detector=detector, category=category, seed=seed, **fields)  # type: ignore[arg-type]


class Spoiled(AutoencoderRecipe):
    """An autoencoder one of whose trainings is spoiled: the one with these first weights."""

    broken: ClassVar[list[float]] = []

    def build(self, chw: tuple[int, int, int]) -> dict[str, torch.nn.Module]:
        networks = super().build(chw)
        weights = next(networks["encoder"].parameters())
        if round(float(weights.detach().flatten()[0]), 6) in self.broken:
            with torch.no_grad():
                weights.fill_(torch.nan)
        return networks


def test_every_job_is_in_one_chunk_and_stacks_differ_in_class_and_seed_only() -> None:
    jobs = [job(name, c, seed) for c in "01" for seed in range(3) for name in ("ae", "f_anogan")] + [job(epochs=2)]
    chunks = list(Stacking("stacked", most=4).chunks(jobs))
    assert sorted(one.key for chunk in chunks for one in chunk) == sorted(one.key for one in jobs)
    assert sorted(map(len, chunks)) == [1] * 7 + [3, 3]
    assert all(len({stack_key(one) for one in chunk}) == 1 for chunk in chunks)
    assert all(len(chunk) == 1 for chunk in Stacking("plain", on_gpu=True).chunks(jobs))
    assert all(len(chunk) == 1 for chunk in Stacking("auto").chunks(jobs))
    assert max(map(len, Stacking("auto", on_gpu=True).chunks(jobs))) == 6
    assert max(map(len, Stacking("auto", on_gpu=True, workers=2).chunks(jobs))) == 3


def test_what_cannot_be_stacked_is_told() -> None:
    assert why_alone(job("pca")) == "it is not made of a recipe" and why_alone(job("ae")) is None
    assert Stacking("stacked").remarks([job("ae"), job("ae", seed=1), job("f_anogan")]) == [
        "f_anogan is trained by the plain trainer: it trains in 2 stages"
    ]
    four = [job("ae"), job("ae", seed=1), job("ae", epochs=2), job("vae")]
    none = "since no other of the same data and settings is to be trained with it"
    assert Stacking("stacked").remarks(four) == [
        f"{name}: the plain trainer for 1 of its jobs, {none}" for name in ("ae", "vae")
    ]
    for apart in (Stacking("stacked", most=1), Stacking("stacked", workers=2)):
        (said,) = apart.remarks([job("ae"), job("ae", seed=1)])
        assert said.startswith("ae: the plain trainer for 2 of its jobs, since --stack, or the number of workers, leaves")
    assert not Stacking("stacked-matmul").remarks(four) and not Stacking("auto", on_gpu=True).remarks(four)
    assert Stacking("stacked-matmul").stacks and Stacking("stacked-matmul").how == "matmul" and Stacking("stacked").how is None
    with pytest.raises(InvalidInput, match="Did you mean 'stacked'"):
        Stacking("staked")
    with pytest.raises(InvalidInput, match="at least 1 model"):
        Stacking(most=0)


def test_a_stacked_sweep_has_the_records_of_a_plain_one(bench, tmp_path: Path) -> None:
    words = ["--models", f"ganomaly{TINY},pca", *SWEEP]
    code, _, said = bench("run", *words, "--trainer", "stacked", "--out", tmp_path / "stacked")
    assert code == 0 and "pca is trained by the plain trainer: it is not made of a recipe" in said
    assert bench("run", *words, "--trainer", "plain", "--out", tmp_path / "plain")[0] == 0
    assert bench("run", *words, "--trainer", "stacked-grouped", "--out", tmp_path / "mapped")[0] == 0
    mapped = [r for r in Store(tmp_path / "mapped").records() if r.job.detector == "ganomaly"]
    assert all(r.notes["describe"]["stacked_by"] == "grouped" and r.notes["describe"]["stacked_models"] == 4 for r in mapped)
    assert compare(tmp_path / "stacked", tmp_path / "plain").same
    for name, trainer in (("stacked", "stacked"), ("plain", "plain")):
        records = [r for r in Store(tmp_path / name).records() if r.job.detector == "ganomaly"]
        assert len(records) == 4 and all(r.notes["describe"]["trainer"] == trainer for r in records)
    assert (tmp_path / "stacked" / "auc.csv").read_bytes() == (tmp_path / "plain" / "auc.csv").read_bytes()
    code, _, said = bench("run", *words, "--trainer", "stacked", "--out", tmp_path / "plain")
    assert code == 0 and "8 done before, 0 failed before, 0 to run" in said


def test_a_compiled_sweep_compiles_what_can_be(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []

    def uncompiled(network: torch.nn.Module) -> torch.nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", uncompiled)
    words = ["--models", f"ae{TINY},f_anogan{TINY},pca", "--trainer", "compiled", "--out", tmp_path / "out"]
    code, _, said = bench("run", *words, *SWEEP[:4], "--classes", 0, "--epochs", 1, "--executor", "inline")
    assert code == 0 and "] is trained by the plain trainer: torch.compile has no gradients of gradients" in said
    trainers = {r.job.detector: r.notes["describe"].get("trainer") for r in Store(tmp_path / "out").records()}
    assert trainers == {"ae": "compiled", "f_anogan": "plain", "pca": None} and len(compiled) == 2  # encoder and decoder


def test_the_oracle_of_the_papers_protocol_is_each_models_own(bench, tmp_path: Path) -> None:
    words = ["--models", f"ganomaly{TINY}", *SWEEP[:-1], 2, "--protocols"]
    for trainer in ("stacked", "plain"):
        assert bench("run", *words, "one-anomalous/paper-v1", "--trainer", trainer, "--out", tmp_path / trainer)[0] == 0
    plain, stacked = (Store(tmp_path / name).records() for name in ("plain", "stacked"))
    assert [r.metrics for r in plain] == [r.metrics for r in stacked] and all("auroc_oracle" in r.metrics for r in plain)
    assert [r.history for r in plain] == [r.history for r in stacked]


def test_a_model_that_diverges_is_one_failed_record(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # the weights that seed 1 starts from
        first = next(AutoencoderRecipe(features=2, latent_dim=2).build((1, 16, 16))["encoder"].parameters())
    monkeypatch.setattr(Spoiled, "broken", [round(float(first.detach().flatten()[0]), 6)])
    words = ["--models", f"{__name__}:Spoiled{TINY}", *SWEEP, "--trainer", "stacked", "--out", tmp_path / "out"]
    code, _, _ = bench("run", *words)
    records = Store(tmp_path / "out").records()
    assert code == 1 and len(records) == 4
    assert {(r.job.seed, r.status) for r in records} == {(0, "done"), (1, "failed")}
    assert all("Training diverged" in (r.error or "") for r in records if r.job.seed == 1)


@pytest.mark.parametrize(
    ("name", "trainer", "why"),
    [
        ("Dropped", "stacked", "draws random numbers of its own"),
        ("Dropped", "stacked-streams", "draws random numbers of its own"),
        ("Dropped", "stacked-matmul", "randomness"),
        ("Spectral", "stacked", "deepcopy"),
        ("Late", "stacked", "draws random numbers of its own"),
        ("Tied", "stacked-grouped", "share weights"),
        ("Hidden", "stacked-matmul", "Hiding.before differs from model to model, and is not kept as a parameter"),
    ],
)
def test_what_turns_out_not_to_stack_runs_one_by_one(bench, tmp_path: Path, name: str, trainer: str, why: str) -> None:
    words = ["--models", f"unusual_recipes:{name}{TINY}", *SWEEP]
    code, _, said = bench("run", *words, "--trainer", trainer, "--out", tmp_path / "stacked")
    assert code == 0 and "4 jobs do not train together, and run one by one" in said and why in said
    assert bench("run", *words, "--trainer", "plain", "--out", tmp_path / "plain")[0] == 0
    assert bench("diff", tmp_path / "stacked", tmp_path / "plain")[0] == 0


@pytest.mark.parametrize("name", ["Drawing", "Silent", "Scattered", "Named"])
def test_a_stack_scores_and_logs_as_the_plain_trainer(bench, tmp_path: Path, name: str) -> None:
    words = ["--models", f"unusual_recipes:{name}{TINY}", *SWEEP, "--protocols", "one-anomalous/paper-v1"]
    for trainer in ("stacked", "plain"):
        code, _, said = bench("run", *words, "--trainer", trainer, "--out", tmp_path / trainer)
        assert code == 0 and "one by one" not in said
    assert bench("diff", tmp_path / "stacked", tmp_path / "plain")[0] == 0
    stacked, plain = (Store(tmp_path / trainer).records() for trainer in ("stacked", "plain"))
    assert [r.metrics for r in stacked] == [r.metrics for r in plain]
    assert {r.notes["describe"]["trainer"] for r in stacked} == {"stacked"}


def test_a_model_that_is_too_large_for_a_stack_is_trained_as_by_the_plain_trainer(bench, tmp_path: Path) -> None:
    words = ["--models", f"unusual_recipes:Large{TINY}", *SWEEP, "--trainer", "stacked-matmul", "--limit", 2]
    code, _, said = bench("run", *words, "--out", tmp_path / "out")
    assert code == 0 and said.count("2 models do not fit into the memory of cpu; going on in halves") == 1
    assert said.count("a stack of one does not fit into the memory of cpu; going on as the plain trainer") == 2
    assert {r.notes["describe"]["stacked_by"] for r in Store(tmp_path / "out").records()} == {"turns"}


def test_a_detector_that_cannot_be_made_fails_its_own_job_in_a_named_way_too() -> None:
    missing = dataclasses.replace(jobs("pca")[0], detector="nowhere:Boom")
    (outcome,) = run_chunk((missing,), Settings(device="cpu", how="matmul"))
    assert outcome.record.status == "failed" and "Cannot import detector 'nowhere:Boom'" in str(outcome.record.error)


def test_a_way_that_is_named_is_that_of_a_job_alone_too(bench, tmp_path: Path) -> None:
    words = ["--models", f"ae{TINY},pca", *SWEEP[:4], "--classes", 0, "--seeds", 0, "--epochs", 1, "--executor", "inline"]
    code, _, said = bench("run", *words, "--trainer", "stacked-matmul", "--out", tmp_path / "out")
    described = {r.job.detector: r.notes["describe"] for r in Store(tmp_path / "out").records()}
    assert code == 0 and described["ae"]["stacked_by"] == "matmul" and described["ae"]["stacked_models"] == 1
    assert "stacked_by" not in described["pca"]
    words[1] = f"unusual_recipes:Dropped{TINY}"
    code, _, said = bench("run", *words, "--trainer", "stacked-matmul", "--out", tmp_path / "out")
    assert code == 0 and "1 job does not train in a stack, and runs by itself" in said


def test_failures_of_a_stack_come_after_what_it_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(members: list[Member], *_: object, **__: object) -> None:
        for member in members:
            member.detector.fit(np.zeros((8, 1, 16, 16), np.uint8), seed=0, epochs=1, device="cpu")
        members[0].error = ValueError("spoiled")

    monkeypatch.setattr("ganomaly_plugin.runner.fit_together", spoil)
    todo = jobs("ae[features=2,latent_dim=2]", classes="0,1,2")
    outcomes = list(run_chunk(tuple(todo), Settings(device="cpu")))
    assert [outcome.record.status for outcome in outcomes] == ["done", "done", "failed"]
    assert outcomes[-1].record.job == todo[0]


def test_a_record_of_a_stack_that_nobody_could_read_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    todo = jobs("ae[features=2,latent_dim=2]", classes="0,1,2")

    def check(record: RunRecord) -> None:
        if record.job == todo[1]:
            raise InvalidInput("no number")

    monkeypatch.setattr("ganomaly_plugin.runner.check_storable", check)
    outcomes = list(run_chunk(tuple(todo), Settings(device="cpu")))
    assert [(each.record.job, each.record.status) for each in outcomes] == [
        (todo[0], "done"),
        (todo[2], "done"),
        (todo[1], "failed"),
    ]


def test_a_device_that_refuses_everything_fails_jobs_and_not_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("ganomaly_plugin.runner.fit_together", "torch.cuda.empty_cache", "ganomaly_plugin.training.detector.train"):
        monkeypatch.setattr(name, refuse)
    todo = jobs("ae[features=2,latent_dim=2]", classes="0,1")
    outcomes = list(run_chunk(tuple(todo), Settings(device="cpu")))
    assert [outcome.record.job for outcome in outcomes] == todo
    assert all("illegal memory access" in str(outcome.record.error) for outcome in outcomes)


def test_a_score_that_fails_comes_after_what_else_was_trained(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = AutoencoderRecipe.score, []

    def fail_at_first(self, networks, images):
        calls.append(len(images))
        if len(calls) == 1:
            raise ValueError("spoiled")
        return score(self, networks, images)

    monkeypatch.setattr(AutoencoderRecipe, "score", fail_at_first)
    words = ["--models", f"ae{TINY}", *SWEEP, "--trainer", "stacked", "--fail-fast", "--out", tmp_path / "out"]
    assert bench("run", *words)[0] == 1
    assert sorted(r.status for r in Store(tmp_path / "out").records()) == ["done", "done", "done", "failed"]


def test_diff_names_the_trainer_where_scores_differ(bench, tmp_path: Path) -> None:
    words = ["--models", "ganomaly[features=4,latent_dim=4]", *SWEEP, "--trainer"]
    for name, trainer in (("plain", "plain"), ("mapped", "stacked-matmul")):
        assert bench("run", *words, trainer, "--out", tmp_path / name)[0] == 0
    code, out, _ = bench("diff", tmp_path / "plain", tmp_path / "mapped")
    assert code == 1 and "trainer plain against stacked-matmul of 4 models" in out


def test_memory_of_a_model_grows_with_what_it_holds() -> None:
    small, wide = AutoencoderRecipe(features=4, batch_size=8), AutoencoderRecipe(features=8, batch_size=8)
    deep = AutoencoderRecipe(features=4, batch_size=16)
    sizes = [bytes_of_model(recipe, (1, 16, 16)) for recipe in (small, wide, deep)]
    assert sizes[0] < sizes[1] and sizes[0] < sizes[2] < 2 * sizes[0]
    assert sizes[0] < bytes_of_model(small, (1, 16, 16), "matmul") < 4 * sizes[0]  # which keeps patches, not images
    assert models_that_fit(small, (1, 16, 16), 10 * sizes[0]) == 8 and models_that_fit(small, (1, 16, 16), 1) == 1
