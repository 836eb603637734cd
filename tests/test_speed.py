"""`bench speed` runs, says what it measured on, and writes it down. No test asserts a time."""

from __future__ import annotations

import functools
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ganomaly_plugin.detectors.classical import Pca
from ganomaly_plugin.detectors.f_anogan import FAnoganRecipe
from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.selection import Selection
from ganomaly_plugin.speed import command, measure, timing, trainers, work
from ganomaly_plugin.speed.measure import time_scoring
from ganomaly_plugin.speed.peers import AnomalibEngine
from ganomaly_plugin.speed.timing import time_in_turns
from ganomaly_plugin.speed.trainers import TRAINERS, Setting, plain, steps_in_cycle
from ganomaly_plugin.speed.work import copying, count_work, matmul, peak_memory
from ganomaly_plugin.training.plain import PlainTrainer, build_networks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    monkeypatch.setitem(work.SIDES, "cpu", 64)
    monkeypatch.setitem(work.COPIED, "cpu", 64)


def test_trainers_beside_the_peers(bench, tmp_path: Path) -> None:
    words = ["--models", "ganomaly,ae,f_anogan,pca", "--peers", "authors,anomalib", "--measure", "training"]
    words += ["--image-size", 32, "--features", 2, "--batch-size", 4, "--images", 16, "--repeats", 5]
    code, out, _ = bench("speed", *words, "--out", tmp_path / "speed.csv")
    assert code == 0 and "plain: time per image" in out and "pca has no training steps" in out
    rows = pd.read_csv(tmp_path / "speed.csv")
    assert list(rows["trainer"]) == ["authors' form", "anomalib Engine", *["plain"] * 4]
    assert rows["detector"].str.extract(r"(, \w+)$")[0].dropna().tolist() == [", wgan", ", encoder"]
    assert (rows["images_per_second"] > 0).all() and (rows["turns"] == 5).all() and (rows["peak_memory_mib"] > 0).all()
    assert rows["time_ratio_to_first"][0] == 1 and rows["hardware"].str.contains("threads").all()
    assert rows["mflop_per_image"][0] > rows["mflop_per_image"][2] and (rows["share_of_ceiling"] > 0).all()
    moved = rows["mb_moved_per_image"]  # of the Engine it is not seen what a step moves
    assert moved[0] > moved[2] > 0 and list(rows["share_of_bandwidth"].isna()) == [False, True, *[False] * 4]


@pytest.mark.parametrize(("faster", "said"), [(0.8, "1.25"), (1.0, "1.00"), (4.0, "0.25"), (35.8, "0.028 (1/36)")])
def test_a_ratio_keeps_two_figures(faster: float, said: str) -> None:
    row, other = (types.SimpleNamespace(images_per_second=7 * each) for each in (faster, 1))
    assert command._ratio(row, other) == said


class Clock:
    """Goes on by a millisecond at each look, however busy the machine is, and when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now


CLOCK = Clock()


class Sleepy(Pca):
    """Takes its time to score."""

    def score(self, images: np.ndarray) -> np.ndarray:
        CLOCK.now += 0.02 if len(images) > 1 else 0
        return super().score(images)


def test_figures_are_those_that_are_printed(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small they are; and a row of fewer turns than were asked for says so."""
    monkeypatch.setattr(measure, "PATIENCE", 0.03)
    monkeypatch.setattr(timing, "time", CLOCK)
    words = ["--models", f"{__name__}:Sleepy,mean_intensity,ae", "--image-size", 16, "--features", 2, "--batch-size", 4]
    code, out, _ = bench("speed", *words, "--images", 70, "--repeats", 5, "--out", tmp_path / "speed.csv")
    assert code == 0 and ":Sleepy: a median of 2 turns only, since they take so long\n" in out and out.count("turns only") == 1
    rows = pd.read_csv(tmp_path / "speed.csv")
    assert list(rows["what"]) == ["training"] + 3 * ["scoring"] and list(rows["turns"]) == [5, 2, 5, 5]
    scoring = rows[rows["what"] == "scoring"]
    ratio = scoring["images_per_second"].iloc[0] / scoring["images_per_second"]
    np.testing.assert_allclose(scoring["time_ratio_to_first"], ratio, rtol=1e-5)
    np.testing.assert_allclose(rows["median_ms"], 1e3 * rows["images_per_call"] / rows["images_per_second"], rtol=1e-5)
    for row in (rows.iloc[0], rows.iloc[3]):
        assert row["gflop_per_second"] == pytest.approx(row["mflop_per_image"] * row["images_per_second"] / 1e3, rel=1e-5)
        assert row["share_of_ceiling"] == pytest.approx(row["gflop_per_second"] / row["ceiling_gflop_per_second"], rel=1e-5)


def test_the_authors_form_is_of_what_it_trains_only(bench, tmp_path: Path) -> None:
    models = ["ganomaly_plus", "ganomaly[adversarial=bce]", "ganomaly"]
    words = ["--measure", "training", "--image-size", 16, "--features", 2, "--batch-size", 4, "--images", 16, "--repeats", 5]
    assert bench("speed", "--models", ",".join(models), *words, "--out", tmp_path / "all.csv")[0] == 0
    rows = pd.read_csv(tmp_path / "all.csv")
    assert list(rows["trainer"]) == ["authors' form", *["plain"] * 3]
    assert rows["detector"][0] == rows["detector"][3] == "ganomaly[batch_size=4,features=2]"
    assert bench("speed", "--models", ",".join(models[:2]), *words, "--out", tmp_path / "two.csv")[0] == 0
    assert list(pd.read_csv(tmp_path / "two.csv")["trainer"]) == ["plain"] * 2


def test_models_trained_together_count_their_images_together(bench, tmp_path: Path) -> None:
    trainers = "plain,stacked-grouped,stacked-matmul,stacked-streams,stacked"
    words = ["--models", "ae", "--trainers", trainers, "--jobs", 3, "--peers", "none", "--measure", "training"]
    words += ["--image-size", 16, "--features", 2, "--batch-size", 4, "--images", 16, "--repeats", 5]
    assert bench("speed", *words, "--out", tmp_path / "speed.csv")[0] == 0
    rows = pd.read_csv(tmp_path / "speed.csv")
    assert list(rows["models"]) == [1, 3, 3, 3, 3] and list(rows["images_per_call"]) == [4, 12, 12, 12, 12]
    assert rows["mflop_per_image"].round(6).nunique() == 1
    plain, grouped, products, *_ = rows["mb_moved_per_image"]
    assert 0 < grouped < 1.1 * plain < products
    code, _, said = bench("speed", "--models", "f_anogan", "--trainers", "stacked", "--peers", "none", "--image-size", 16)
    assert code == 2 and "cannot be stacked: it trains in 2 stages" in said


def test_a_detector_that_fails_is_a_line_and_the_others_are_timed(bench, tmp_path: Path, monkeypatch) -> None:
    words = ["--models", "ae,crashing_detectors:Exits,mean_intensity", "--peers", "none", "--image-size", 16, "--features", 2]
    words += ["--batch-size", 4, "--images", 16, "--repeats", 5, "--out", tmp_path / "speed.csv"]
    code, out, _ = bench("speed", *words)
    assert code == 0 and "the scoring of crashing_detectors:Exits is not timed: SystemExit: 0" in out
    rows = pd.read_csv(tmp_path / "speed.csv")
    assert list(rows["what"]) == ["training", "scoring", "scoring"]
    code, out, _ = bench("speed", "--models", "crashing_detectors:Exits", *words[2:])
    assert code == 1 and "is not timed" in out


def test_a_stage_that_fails_is_a_line(bench, tmp_path: Path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("no step")

    monkeypatch.setattr("ganomaly_plugin.speed.measure.plain", refused)
    words = ["--models", "ae,mean_intensity", "--peers", "none", "--image-size", 16, "--features", 2, "--batch-size", 4]
    code, out, _ = bench("speed", *words, "--images", 16, "--repeats", 5, "--out", tmp_path / "speed.csv")
    assert code == 0 and "ae[batch_size=4,features=2] is not timed: RuntimeError: no step" in out
    assert list(pd.read_csv(tmp_path / "speed.csv")["what"]) == ["scoring", "scoring"]


def test_a_trainer_that_fails_is_a_line_and_the_others_are_timed(bench, tmp_path: Path, monkeypatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 90 GiB\nand more")

    monkeypatch.setitem(trainers.TRAINERS, "stacked-matmul", too_large)
    words = ["--models", "ae", "--trainers", "stacked-matmul,plain", "--peers", "none", "--measure", "training"]
    words += ["--image-size", 16, "--features", 2, "--batch-size", 4, "--images", 16, "--repeats", 5]
    code, out, _ = bench("speed", *words, "--out", tmp_path / "speed.csv")
    assert code == 0 and "stacked-matmul is not timed: OutOfMemoryError: Tried" in out
    assert list(pd.read_csv(tmp_path / "speed.csv")["trainer"]) == ["plain"]
    words[3] = "captured-streams,plain"
    code, out, _ = bench("speed", *words)
    assert code == 0 and "captured-streams is not timed: CUDA graphs need a GPU" in out


def test_a_trainer_that_fails_in_its_turn_is_a_line_and_the_others_are_timed(bench, tmp_path: Path, monkeypatch) -> None:
    calls: list[None] = []

    def late() -> None:
        calls.append(None)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("Tried to allocate 90 GiB")

    monkeypatch.setitem(trainers.TRAINERS, "stacked", lambda *_: trainers.Prepared(late, images=4))
    words = ["--models", "ae", "--trainers", "stacked,plain", "--peers", "none", "--measure", "training"]
    words += ["--image-size", 16, "--features", 2, "--batch-size", 4, "--images", 16, "--repeats", 5]
    code, out, _ = bench("speed", *words, "--out", tmp_path / "speed.csv")
    assert code == 0 and "ae[batch_size=4,features=2], stacked is not timed: OutOfMemoryError: Tried" in out
    rows = pd.read_csv(tmp_path / "speed.csv")
    assert list(rows["trainer"]) == ["plain"] and list(rows["time_ratio_to_first"]) == [1]


def test_without_a_ceiling_the_rest_is_timed(bench, tmp_path: Path, monkeypatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    monkeypatch.setattr("ganomaly_plugin.speed.measure.copying", too_large)
    monkeypatch.setattr("ganomaly_plugin.speed.measure.matmul", too_large)
    words = ["--models", "ae", "--peers", "none", "--measure", "training", "--image-size", 16, "--features", 2]
    code, out, _ = bench("speed", *words, "--batch-size", 4, "--images", 16, "--repeats", 5, "--out", tmp_path / "speed.csv")
    assert code == 0 and "the ceiling in float32 is not timed: OutOfMemoryError" in out and "a copy is not timed" in out
    (row,) = pd.read_csv(tmp_path / "speed.csv").to_dict("records")
    assert row["median_ms"] > 0 and pd.isna(row["share_of_ceiling"]) and pd.isna(row["share_of_bandwidth"])


def test_a_peer_that_fails_is_a_line_and_the_others_are_timed(bench, tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise InvalidInput("anomalib:Ganomaly failed in anomalib: RuntimeError: sizes")

    monkeypatch.setattr("ganomaly_plugin.speed.measure._anomalib", fails)
    words = ["--models", "ganomaly", "--peers", "anomalib,authors", "--measure", "training", "--image-size", 16]
    words += ["--features", 2, "--batch-size", 4, "--images", 16, "--repeats", 5, "--out", tmp_path / "speed.csv"]
    code, out, _ = bench("speed", *words)
    assert code == 0 and "anomalib Engine is not timed: anomalib:Ganomaly failed in anomalib" in out
    assert list(pd.read_csv(tmp_path / "speed.csv")["trainer"]) == ["authors' form", "plain"]


def test_a_step_that_is_not_replayed_is_not_timed_as_a_replayed_one(monkeypatch) -> None:
    def refused(work, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(trainers, "record_on", lambda device: refused)
    setting = Setting(torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8), CPU)
    recipe = GanomalyRecipe(features=2, latent_dim=4, batch_size=4)
    made = functools.partial(trainers.stacked, setting=setting)
    monkeypatch.setattr(trainers, "stacked", lambda recipe, stage, _, how, **more: made(recipe, stage, how=how, **more))
    with pytest.raises(UserWarning, match="operation not permitted"):
        trainers.captured(recipe, recipe.stages[0], types.SimpleNamespace(device=torch.device("cuda")))


@pytest.mark.parametrize(("precision", "inside"), [("float32", "ieee"), ("tf32", "tf32")])
def test_the_engine_trains_in_the_precision_of_its_row(precision: str, inside: str) -> None:
    from lightning.pytorch.callbacks import LambdaCallback

    seen = []

    def now() -> str:
        return torch.backends.cuda.matmul.fp32_precision

    before = now()
    look = LambdaCallback(
        setup=lambda trainer, module, stage: seen.append(now()), on_train_batch_end=lambda *_: seen.append(now())
    )
    setting = Setting(torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8), CPU)
    recipe = GanomalyRecipe(features=2, latent_dim=4, batch_size=4, precision=precision)
    AnomalibEngine(recipe, setting).fit(look, limit_train_batches=1, max_epochs=1)
    assert seen == [before, inside] and now() == before


def test_scoring_of_named_detectors(bench, tmp_path: Path) -> None:
    words = ["--models", "ganomaly,anogan[search_steps=3],mean_intensity", "--measure", "scoring", "--features", 2]
    words += ["--images", 20, "--dataset", "digits", "--image-size", 16, "--repeats", 5, "--out", tmp_path / "score.csv"]
    code, out, _ = bench("speed", *words)
    assert code == 0 and "anogan[features=2,search_steps=3]" in out
    rows = pd.read_csv(tmp_path / "score.csv")
    assert len(rows) == 3 and (rows["latency_ms"] > 0).all() and rows["time_ratio_to_first"][0] == 1
    assert rows["mflop_per_image"][1] > rows["mflop_per_image"][0] and rows["mflop_per_image"].isna()[2]


def test_flops_by_hand() -> None:
    product, flops = matmul(CPU, torch.float32, side=8)
    assert count_work(product).flops == flops == 2 * 8**3
    x, weight = torch.ones(3, 2, 8, 8), torch.ones(5, 2, 4, 4, requires_grad=True)
    convolution = 2 * 3 * 5 * 4 * 4 * 2 * 4 * 4  # images × outputs × map × inputs × kernel, twice

    def forward_and_backward() -> None:
        torch.nn.functional.conv2d(x, weight, stride=2, padding=1).sum().backward()

    assert count_work(forward_and_backward).flops == 2 * convolution  # x needs no gradient


def test_bytes_moved_by_hand() -> None:
    product, _ = matmul(CPU, torch.float32, side=8)
    assert count_work(product).moved == 4 * 3 * 8**2  # two factors and the answer, which lies there already
    copy, moved = copying(CPU, count=10)
    assert count_work(copy).moved == moved == 80
    x, y = torch.ones(10, 10), torch.ones(10, 10, dtype=torch.bfloat16)
    for task, numbers in (
        (lambda: x + y, 400 + 200 + 400),
        (lambda: x.add_(1), 400 + 400),
        (lambda: x.t()[2:], 0),
        (lambda: x[2:5].clone(), 120 + 120),
        (lambda: torch.empty_like(x), 0),
        (lambda: x.new_zeros(5), 20),
        (lambda: torch.cat([x, x]), 400 + 400 + 800),
        (lambda: torch._foreach_add_([x, x], 1.0), 4 * 400),
    ):
        assert count_work(task).moved == numbers


def test_peak_memory_by_hand() -> None:
    def task() -> torch.Tensor:
        a = torch.zeros(250_000)
        b = a + 1
        del a
        return b * 2

    assert peak_memory(task, CPU) == pytest.approx(2e6, rel=1e-3)


def test_peak_memory_of_scoring_is_that_of_the_call_that_is_timed() -> None:
    images = np.zeros((300, 1, 16, 16), np.uint8)
    (row,) = time_scoring([Selection("ae", {"features": 2})], images, CPU, repeats=5)
    detector = make_detector("ae", features=2).fit(images[:64], epochs=1, device="cpu")
    weights = sum(t.nbytes for net in detector.networks_.values() for t in [*net.parameters(), *net.buffers()])
    assert row.peak_memory == pytest.approx(weights + peak_memory(lambda: detector.score(images), CPU), rel=1e-2)


def test_what_is_no_network_is_timed_too_with_its_own_parameters_and_the_memory_of_all_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (600, 1, 16, 16), dtype=np.uint8)
    rows = time_scoring([Selection("knn", {}), Selection("iforest", {}), Selection("pca", {})], images, CPU, repeats=5)
    for row in rows:
        detector = make_detector(row.detector).fit(images[: measure.FITTED], device="cpu")
        assert row.parameters == detector.describe()["parameters"] > 0
        assert row.peak_memory == pytest.approx(peak_memory(lambda d=detector: d.score(images), CPU), rel=0.05)


def test_a_turn_has_as_many_calls_as_warm_ones_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST", 0.05)
    samples = timing.Samples()
    for seconds in (3.0, 0.5, 0.001, 0.1, 0.2):  # the first calls compile and allocate
        samples.add(seconds)
    assert samples.timing() == timing.Timing(0.003, 0.002, 0.004, 2, 50)


def test_turns_are_fair() -> None:
    calls: list[str] = []
    tasks = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = time_in_turns(tasks, CPU, repeats=6)
    after = "".join(calls)[2 * timing.WARM_UP :]
    a, b = (timings[name].burst for name in "ab")
    assert after == ("a" * a + "b" * b) * 6 and timings["a"].repeats == 6
    assert timings["a"].fastest <= timings["a"].median <= timings["a"].slowest


def test_a_cycle_ends_when_every_phase_has_had_its_turn() -> None:
    (stage,) = GanomalyRecipe().stages
    phases = tuple(replace(phase, every=every) for phase, every in zip(stage.phases, (4, 6), strict=True))
    assert steps_in_cycle(stage) == 1 and steps_in_cycle(replace(stage, phases=phases)) == 12


@pytest.mark.parametrize(("side", "said"), [(32, None), (48, "at 48 pixels the network of 64"), (80, "of 128")])
def test_what_anomalibs_network_is_larger_than_is_said(side: int, said: str | None) -> None:
    engine = AnomalibEngine(GanomalyRecipe(), Setting(torch.zeros(2, 1, side, side, dtype=torch.uint8), CPU))
    assert engine.remark is None if said is None else said in str(engine.remark)


def test_the_plain_step_is_a_training_step() -> None:
    recipe = GanomalyRecipe(features=2, latent_dim=4, batch_size=4)
    images = torch.randint(0, 256, (10, 1, 16, 16), dtype=torch.uint8)
    prepared = plain(recipe, recipe.stages[0], Setting(images, CPU))
    assert prepared.by_torch
    assert prepared.images == 4 * steps_in_cycle(recipe.stages[0]) == 4 and prepared.models == 1
    assert count_work(prepared.step).flops > 0


def test_a_compiled_step_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated ahead of time, but run by eager kernels: a C++ compiler would take half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    recipe = GanomalyRecipe(features=2, latent_dim=4, batch_size=4)
    images = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8)
    trainers = [
        PlainTrainer(recipe, build_networks(recipe, (1, 16, 16), 0), seed=0, device=CPU, compiled=compiled)
        for compiled in (False, True)
    ]
    for batch in images.split(4):
        eager, compiled = (trainer.step(batch) for trainer in trainers)
        assert eager.keys() == compiled.keys()
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)
    for name, network in trainers[0].networks.items():
        torch.testing.assert_close(trainers[1].networks[name].state_dict(), network.state_dict(), rtol=1e-5, atol=1e-7)
    assert not TRAINERS["compiled"](recipe, recipe.stages[0], Setting(images, CPU)).by_torch
    critic = FAnoganRecipe(features=2, latent_dim=2, batch_size=4)
    with pytest.raises(InvalidInput, match=r"cannot be trained compiled: .*double backward"):
        TRAINERS["compiled"](critic, critic.stages[0], Setting(images, CPU))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainers", "plane"], "Did you mean 'plain'"),
        (["--peers", "anomaly"], "Did you mean 'anomalib'"),
        (["--peers", "none,authors"], "none stands alone"),
        (["--models", "ae", "--peers", "authors"], "no GANomaly is timed"),
        (["--models", "ganomaly_plus", "--peers", "authors"], "no GANomaly is timed that trains so"),
        (["--models", "pca,knn", "--measure", "training"], "None of --models has training steps"),
        (["--dataset", "digits", "--channels", 1], "images of a --dataset have their own"),
        (["--measure", "train"], "Did you mean 'training'"),
        (["--precision", "fp16"], "precision must be"),
        (["--jobs", 0], "jobs must be at least 1"),
        (["--image-size", -16], "image_size must be at least 1, got -16"),
        (["--image-size", 100_000], "image_size must be at most 2048, got 100000"),
        (["--models", ""], "models is empty"),
        (["--trainers", ""], "trainers is empty"),
        (["--measure", ""], "measure is empty"),
        (["--peers", "none", "--trainers", "captured-streams"], "CUDA graphs need a GPU"),
        (["--out", "nowhere/speed.csv"], "There is no folder nowhere"),
        (["--out", "."], "it is not a file"),
        (["--out", "/proc/speed.csv"], "Cannot write /proc/speed.csv"),
        (["--channels", 2], "channels must be 1 or 3"),
    ],
)
def test_what_cannot_be_timed_is_an_error(bench, words: list[object], message: str) -> None:
    code, _, err = bench("speed", *words)
    assert code == 2 and message in err
