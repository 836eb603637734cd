"""Precision is stated, in force only where it is asked for, and part of a job."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import blobs

from ganomaly_plugin import make_detector
from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.registry import list_detectors
from ganomaly_plugin.training.detector import RecipeDetector
from ganomaly_plugin.training.plain import PlainTrainer, build_networks
from ganomaly_plugin.training.precision import networks_in, precision

CPU = torch.device("cpu")
RECIPES = [name for name in list_detectors() if name[-1] != ":" and isinstance(make_detector(name), RecipeDetector)]


def switches() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


def test_switches_are_set_and_restored() -> None:
    before = switches()
    for name, wanted in (("float32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        with pytest.raises(KeyError), precision(name):
            assert switches() == (wanted, wanted)
            raise KeyError
        assert switches() == before


def test_the_older_switches_can_be_read_and_say_the_same() -> None:
    """As `torch.compile` does: torch refuses to tell those that contradict the newer ones."""

    def older() -> tuple[bool, bool, str]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = older()
    for name, wanted in (("float32", False), ("tf32", True)):
        with precision(name):
            assert older()[:2] == (wanted, wanted)
        assert older() == before


def test_older_switches_that_contradict_the_newer_ones_are_left_alone() -> None:
    torch.backends.cuda.matmul.fp32_precision, before = "tf32", torch.backends.cuda.matmul.fp32_precision
    try:
        with precision("float32"):
            assert switches() == ("ieee", "ieee")
        assert switches()[0] == "tf32" and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(("name", "wanted"), [("float32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_a_training_step_is_carried_out_in_its_precision(name: str, wanted: str) -> None:
    recipe = GanomalyRecipe(features=4, latent_dim=8, precision=name)  # type: ignore[arg-type]
    trainer = PlainTrainer(recipe, build_networks(recipe, (1, 16, 16), 0), seed=0, device=CPU)
    seen: list[str] = []
    trainer.networks["generator"].register_forward_pre_hook(lambda *_: seen.append(switches()[1]))
    before = switches()
    trainer.step(torch.from_numpy(blobs(8)))
    assert seen == [wanted] and switches() == before


def test_the_innermost_precision_is_in_force_and_the_outermost_restores() -> None:
    before = switches()
    with precision("tf32"):
        with precision("float32"):
            with precision("tf32"):
                assert switches() == ("tf32", "tf32")
            assert switches() == ("ieee", "ieee")
        assert switches() == ("tf32", "tf32")
    assert switches() == before


def test_bfloat16_networks_answer_in_float32_and_share_their_state() -> None:
    networks = build_networks(GanomalyRecipe(features=4, latent_dim=8), (1, 16, 16), 0)
    called = networks_in("bf16", networks)["generator"]
    seen = []
    networks["generator"].encoder2.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    x = torch.from_numpy(blobs(8))
    exact, rounded = networks["generator"](x), called(x)
    assert seen == [torch.float32, torch.bfloat16] and {t.dtype for t in rounded} == {torch.float32}
    for a, b in zip(exact, rounded, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)
    assert called.encoder1 is networks["generator"].encoder1
    assert {p.dtype for p in called.parameters()} == {torch.float32}
    assert networks_in("tf32", networks) is networks


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_in_bfloat16(name: str) -> None:
    cls = type(make_detector(name).recipe)
    recipe = cls(**{**cls.conformance_hparams, "precision": "bf16"})
    trainer = PlainTrainer(recipe, build_networks(recipe, (1, 16, 16), 0), seed=0, device=CPU)
    for stage in recipe.stages:
        trainer.begin(stage)
        losses = trainer.step(torch.from_numpy(blobs(recipe.batch_size)))
        assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())


def test_precision_is_part_of_a_job_and_float32_is_what_jobs_were_before() -> None:
    assert "precision" not in make_detector("ganomaly").hparams
    assert "precision" not in make_detector("ganomaly", precision="float32").hparams
    assert make_detector("ganomaly", precision="bf16").hparams["precision"] == "bf16"
    with pytest.raises(InvalidInput, match="float32, tf32, bf16"):
        GanomalyRecipe(precision="fp16")  # type: ignore[arg-type]


def test_bench_run_takes_it_as_an_option(bench, tmp_path: Path) -> None:
    words = ["run", "--models", "ganomaly,pca", "--classes", 0, "--out", tmp_path, "--dry-run"]
    plain = bench(*words)[1].splitlines()
    _, stated, _ = bench(*words, "--precision", "float32")
    assert stated.splitlines() == plain
    code, out, _ = bench(*words, "--precision", "bf16")
    lines = out.splitlines()
    assert code == 0 and "precision=bf16" in lines[0] and lines[0].split()[-1] != plain[0].split()[-1] and lines[1] == plain[1]
    code, _, err = bench(*words, "--precision", "fp16")
    assert code == 2 and "precision must be" in err
