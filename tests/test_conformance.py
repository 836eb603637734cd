"""The suite passes every built-in detector, and each way of breaking a detector is caught by the check made for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from faulty_detectors import (
    CountsEpochsFromZero,
    CrashesOnSingleRest,
    DividesByZero,
    DrawsFromTheClock,
    FitReturnsNothing,
    Float32Scores,
    ForgetsHparams,
    ForgetsOnEpoch,
    Frozen,
    GreyOnly,
    IgnoresSeed,
    LearnsWhileScoring,
    LosesWeights,
    ManyLines,
    MapOfChannels,
    MapThatCrashes,
    MedianOnly,
    MutatesInput,
    NanScores,
    Pickles,
    RescalesOverBatch,
    SeedsGlobalRng,
    SmallOnly,
    TakesPixelsAsTheyAre,
    Unchecked,
    UpsideDown,
    UsesGlobalRng,
    WantsFullBatch,
    WarmStart,
    WritesIntoInput,
    WritesTwoFiles,
    WrongError,
    WrongShape,
)

from ganomaly_plugin import load_detector, make_detector
from ganomaly_plugin.conformance import CHECKS, CheckResult, run_checks
from ganomaly_plugin.conformance.checks_results import seed_repeats
from ganomaly_plugin.conformance.subject import Exempt, Subject
from ganomaly_plugin.detectors.ae import AutoencoderRecipe
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.registry import DETECTORS
from ganomaly_plugin.seeding import global_states


def answers(name: str, hparams: dict[str, Any] | None = None) -> dict[str, CheckResult]:
    return {result.check: result for result in run_checks(name, hparams)}


def failed(results: dict[str, CheckResult]) -> dict[str, str]:
    return {name: result.detail for name, result in results.items() if result.status == "failed"}


# A family ("anomalib:") has no detector of its own to check; test_anomalib_models.py holds its members to the interface.
@pytest.mark.parametrize("name", [entry.name for entry in DETECTORS if not entry.name.endswith(":")])
def test_every_built_in_detector_conforms(name):
    results = answers(name)
    assert failed(results) == {}
    assert list(results) == list(CHECKS)
    assert all(result.detail and "\n" not in result.detail for result in results.values())


def test_batch_statistics_are_an_exemption_with_its_reason():
    results = answers("ganomaly", {"batchnorm": "batch"})
    assert failed(results) == {}
    assert results["score_ignores_batch"].status == "exempt" and "batchnorm='batch'" in results["score_ignores_batch"].detail


def test_a_sound_detector_of_another_module_passes_all():
    results = answers("faulty_detectors:Sound")
    assert failed(results) == {}
    assert {name for name, result in results.items() if result.status == "exempt"} - {"cuda"} == {"on_epoch"}


REFUSALS = {name for name in CHECKS if name.startswith("refuses_")}
BAD_IMAGES = REFUSALS - {"refuses_unfitted"}


#: Faults that spoil all scores, so that many checks stumble over them after the one that names them.
CASCADING = (WrongShape, Float32Scores, NanScores, LearnsWhileScoring)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (WrongShape, {"scores"}),
        (Float32Scores, {"scores"}),
        (NanScores, {"scores"}),
        (LearnsWhileScoring, {"score_repeats", "score_ignores_batch"}),
        (MutatesInput, {"keeps_input", "accepts_read_only"}),
        (WritesIntoInput, {"accepts_read_only"}),
        (RescalesOverBatch, {"score_ignores_batch"}),
        (IgnoresSeed, {"seed_matters"}),
        (UsesGlobalRng, {"seed_matters", "ignores_global_rng", "keeps_global_rng", "refit_forgets"}),
        (SeedsGlobalRng, {"keeps_global_rng"}),
        (DrawsFromTheClock, {"seed_repeats", "ignores_global_rng", "refit_forgets"}),
        (Pickles, {"save_load"}),
        (LosesWeights, {"save_load"}),
        (WritesTwoFiles, {"save_load"}),
        (WarmStart, {"refit_forgets"}),
        (FitReturnsNothing, {"fit_returns_self"}),
        (ForgetsHparams, {"hparams_round_trip", "save_load"}),
        (UpsideDown, {"beats_chance"}),
        (GreyOnly, {"channels"}),
        (SmallOnly, {"sizes"}),
        (MapOfChannels, {"anomaly_map"}),
        (MapThatCrashes, {"anomaly_map"}),
        (ForgetsOnEpoch, {"on_epoch"}),
        (CountsEpochsFromZero, {"on_epoch"}),
        (CrashesOnSingleRest, {"last_batch_of_one"}),
        (WantsFullBatch, {"small_training_set"}),
        (DividesByZero, {"one_training_image"}),
        (TakesPixelsAsTheyAre, {"uint8_equals_float"}),
        (Unchecked, REFUSALS),
        (ManyLines, BAD_IMAGES),
        (WrongError, {"refuses_int64"}),
    ],
)
def test_each_fault_is_caught_by_its_check(broken, expected):
    hparams = {"power": 1.5} if broken is ForgetsHparams else {}
    found = failed(answers(f"faulty_detectors:{broken.__name__}", hparams))
    assert expected <= set(found)
    assert expected == set(found) or broken in CASCADING
    assert all("\n" not in detail for detail in found.values())


def test_no_check_lets_every_fault_through():
    caught = {name for mark in test_each_fault_is_caught_by_its_check.pytestmark for _, names in mark.args[1] for name in names}
    assert set(CHECKS) - caught == {"cuda"}


def test_tensors_with_gradients_of_any_type_are_scores_and_maps():
    assert failed(answers("faulty_detectors:Differentiable")) == {}


def test_a_detector_that_exits_fails_its_checks():
    assert "SystemExit: 0" in failed(answers("faulty_detectors:Exits"))["scores"]


@pytest.mark.parametrize("hparams", [{}, {"net": {"width": 3}, "norm": "ROUND", "place": "b"}], ids=["default", "given"])
def test_hparams_may_be_dataclasses_members_of_an_enum_and_paths(hparams):
    assert failed(answers("odd_options:Nested", hparams)) == {}


@pytest.mark.parametrize(
    ("name", "said"),
    [("Method", "its hparams is a method"), ("Unsaid", "does not make it again"), ("Raises", "cannot be read")],
)
def test_hparams_that_no_record_can_be_made_of_are_said_at_once(name, said):
    with pytest.raises(InvalidInput, match=said):
        run_checks(f"odd_options:{name}")


@pytest.mark.parametrize("cls", [MedianOnly, Frozen])
def test_the_bare_protocol_is_enough(cls, tmp_path):
    name = f"faulty_detectors:{cls.__name__}"
    results = answers(name)
    assert failed(results) == {}
    reasons = {check: result.detail for check, result in results.items() if result.status == "exempt"}
    assert set(reasons) - {"cuda"} == {"hparams_round_trip", "seed_matters", "on_epoch", "save_load", "anomaly_map"}
    assert reasons["seed_matters"] == "a median draws nothing"
    assert "_load_state" in reasons["save_load"]


def test_a_file_of_a_detector_that_cannot_load_is_refused_clearly(tmp_path):
    make_detector("mean_intensity").fit(np.zeros((2, 1, 16, 16), np.uint8)).save(tmp_path / "detector.pt")
    content = torch.load(tmp_path / "detector.pt", weights_only=True)
    torch.save({**content, "hparams": {}}, tmp_path / "detector.pt")
    with pytest.raises(InvalidInput, match="cannot be loaded: it has no _load_state"):
        load_detector(tmp_path / "detector.pt", name="faulty_detectors:MedianOnly")


def test_a_declared_exemption_is_reported_with_its_reason():
    results = answers("faulty_detectors:Exempted")
    assert failed(results) == {}
    assert results["beats_chance"] == CheckResult("beats_chance", "exempt", "looks for what is ordinary", 0.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MisspelledExemption", "Unknown check in conformance_exemptions .* Did you mean 'beats_chance'"),
        ("WordlessExemption", "from sizes has no reason"),
        ("CannotBeMade", "Cannot make detector .*: RuntimeError: no licence found"),
        ("Missing", "Cannot import detector"),
    ],
)
def test_what_cannot_be_tested_is_refused_at_once(name, message):
    with pytest.raises(InvalidInput, match=message):
        run_checks(f"faulty_detectors:{name}")


def test_wrong_arguments_are_refused_at_once():
    with pytest.raises(InvalidInput, match="Did you mean 'ganomaly'"):
        run_checks("ganomoly")
    with pytest.raises(InvalidInput, match="features"):
        run_checks("ae", {"features": 0})
    with pytest.raises(InvalidInput, match="Unknown device"):
        run_checks("pca", device="gpu")


def test_what_the_user_sets_comes_before_the_cheap_settings():
    subject = Subject("ae", {"features": 6}, "cpu")
    assert subject.hparams["features"] == 6
    assert subject.hparams["latent_dim"] == AutoencoderRecipe.conformance_hparams["latent_dim"]
    assert subject.batch == AutoencoderRecipe.conformance_hparams["batch_size"]


@pytest.mark.parametrize("name", ["UsesGlobalRng", "SeedsGlobalRng"])
def test_the_suite_gives_the_callers_random_state_back(name):
    before = global_states()
    answers(f"faulty_detectors:{name}")
    assert global_states() == before


def test_seeds_are_not_held_to_the_cpus_promise_where_auto_is_cuda(monkeypatch):
    subject = Subject("mean_intensity", {}, "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Exempt, match="on the CPU only"):
        seed_repeats(subject)


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("OnAnyDevice", "passed", "fits, scores, and loads on the CPU"),
        ("MedianOnly", "passed", "not saved, for it lacks _load_state"),
        ("LosesWeightsOnTheWay", "failed", "loaded on the CPU: expected equal scores"),
    ],
)
def test_the_cuda_check_with_a_device_that_is_only_claimed(name, status, detail, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = answers(f"faulty_detectors:{name}")["cuda"]
    assert result.status == status and detail in result.detail
