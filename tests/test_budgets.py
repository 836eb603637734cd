"""Budgets in steps, and the epoch chosen on held-out normal images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import blobs

from ganomaly_plugin.core import Job
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.recipe import CALIBRATION_LIMIT, recipe_hparams
from ganomaly_plugin.registry import load_detector, make_detector
from ganomaly_plugin.training import fitting
from ganomaly_plugin.training.plain import build_networks, epochs_of, train
from ganomaly_plugin.training.validation import NormalValidation, calibrate, hold_out

SMALL = {"features": 4, "latent_dim": 8, "batch_size": 8, "lr": 2e-3}


def job(**more) -> Job:
    return Job("ganomaly", {"features": 4}, "digits", {}, "one-anomalous/strict-v1", "0", 0, more.pop("epochs", None), **more)


def test_a_job_without_steps_keeps_the_key_that_it_had():
    assert job(epochs=15).key == "7610d341940113d3"  # taken before jobs had steps
    assert job(steps=100).key != job(steps=101).key != job().key
    assert Job.from_dict(json.loads(json.dumps(job(steps=7).to_dict()))) == job(steps=7)


@pytest.mark.parametrize(
    ("steps", "n", "batch", "epochs"), [(1, 24, 8, 1), (3, 24, 8, 1), (4, 24, 8, 2), (5, 3, 8, 5), (7, 31, 8, 3)]
)
def test_steps_in_epochs(steps, n, batch, epochs):
    assert epochs_of(steps, n, batch) == epochs


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_training_ends_after_exactly_the_steps_given(steps):
    detector = make_detector("ganomaly", **SMALL).fit(blobs(24), steps=steps, device="cpu")
    assert detector.describe()["steps"] == steps
    assert detector.describe()["images_seen"] == 8 * steps
    assert len(detector.history_) == epochs_of(steps, 24, 8)


def test_whole_epochs_in_steps_are_those_epochs():
    by_steps = make_detector("ganomaly", **SMALL).fit(blobs(24), steps=6, device="cpu").score(blobs(5, seed=1))
    by_epochs = make_detector("ganomaly", **SMALL).fit(blobs(24), epochs=2, device="cpu").score(blobs(5, seed=1))
    np.testing.assert_array_equal(by_steps, by_epochs)


def test_each_stage_has_the_steps():
    detector = make_detector("f_anogan", features=4, latent_dim=4, batch_size=8).fit(blobs(16), steps=3, device="cpu")
    assert detector.describe()["steps"] == 6


def test_budgets_that_make_no_sense_are_refused():
    with pytest.raises(InvalidInput, match="not both"):
        make_detector("ganomaly", **SMALL).fit(blobs(8), steps=3, epochs=1)
    with pytest.raises(InvalidInput, match="steps must be a whole number"):
        make_detector("ganomaly", **SMALL).fit(blobs(8), steps=0)
    with pytest.raises(InvalidInput, match="has no budget in steps"):
        make_detector("pca").fit(blobs(8), steps=3)


@pytest.mark.parametrize("value", [True, 1.0, 0, -1, "3"])
@pytest.mark.parametrize("budget", ["epochs", "steps"])
def test_a_budget_is_a_whole_number(budget, value):
    with pytest.raises(InvalidInput, match=f"{budget} must be a whole number of at least 1"):
        make_detector("ae", features=2, latent_dim=2).fit(blobs(8), **{budget: value})


def test_bench_run_takes_steps_and_tables_show_them(bench, tmp_path):
    words = ("run", "--datasets", "digits", "--image_size", "16", "--classes", "0", "--hparams", "features=4")
    out = tmp_path / "out"
    code, table, _ = bench(
        *words, "--models", "ganomaly,ganomaly[epochs=1],pca,ganomaly[steps=2]", "--steps", "3", "--out", out
    )
    assert code == 0
    assert "ganomaly[features=4,steps=3]" in table and "ganomaly[epochs=1,features=4]" in table and "steps=2" in table
    costs = (out / "cost.md").read_text()
    assert "images_seen" in costs and "| 3 | 192 |" in costs
    code, _, err = bench(*words, "--models", "ganomaly", "--steps", "3", "--epochs", "2", "--out", out)
    assert code == 2 and "Give one of them" in err


def test_late_hyperparameters_are_named_only_when_they_are_set():
    plain = make_detector("ganomaly").hparams
    assert not {"select", "val_share", "criterion", "patience", "score_by"} & set(plain)
    chosen = make_detector("ganomaly", select="normal-val", patience=3)
    assert recipe_hparams(chosen.recipe)["select"] == "normal-val" and chosen.hparams["patience"] == 3


@pytest.mark.parametrize("criterion", ["generator", "encoder", "contextual", "stability"])
def test_the_best_epoch_on_held_out_normals_is_kept(criterion, tmp_path):
    images, test = blobs(40), blobs(5, seed=1)
    detector = make_detector("ganomaly", select="normal-val", val_share=0.25, criterion=criterion, patience=2, **SMALL)
    during: list[np.ndarray] = []
    detector.fit(images, epochs=12, device="cpu", on_epoch=lambda _, d: during.append(d.score(test)))
    values = [epoch["validation"] for epoch in detector.history_]
    best = int(np.argmin(values))
    assert detector.describe()["selected_epoch"] == best + 1
    assert detector.describe()["validation_images"] == 10
    assert len(values) == min(12, best + 3)
    np.testing.assert_allclose(detector.score(test), during[best], rtol=1e-6)
    detector.save(tmp_path / "d.pt")
    np.testing.assert_array_equal(load_detector(tmp_path / "d.pt", device="cpu").score(test), detector.score(test))


def test_held_out_images_are_a_seeded_share_and_never_trained_on():
    train, held = hold_out(20, 0.2, seed=3)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(20)) and len(held) == 4
    assert torch.equal(hold_out(20, 0.2, seed=3)[1], held) and not torch.equal(hold_out(20, 0.2, seed=4)[1], held)


def validation(name: str, criterion: str, images: np.ndarray, seed: int = 0) -> tuple[NormalValidation, dict]:
    recipe = make_detector(name, select="normal-val", criterion=criterion, **SMALL).recipe
    networks = {name: network.eval() for name, network in build_networks(recipe, (1, 16, 16), 0).items()}
    return NormalValidation(
        recipe, torch.from_numpy(images), seed=seed, networks=networks, device=torch.device("cpu")
    ), networks


def test_a_criterion_is_the_mean_over_all_held_out_images():
    images = np.concatenate([blobs(8), -blobs(2)])  # a batch, and a short one unlike it
    judge, networks = validation("ganomaly", "contextual", images)
    with torch.no_grad():
        x_hat = networks["generator"](torch.from_numpy(images))[0]
    assert judge._loss(networks) == pytest.approx(float((torch.from_numpy(images) - x_hat).abs().mean()), rel=1e-4)


def test_the_noise_of_a_criterion_is_the_same_for_every_epoch():
    judge, networks = validation("vae", "negative_elbo", blobs(10))
    assert judge._loss(networks) == judge._loss(networks)
    assert validation("vae", "negative_elbo", blobs(10), seed=1)[0]._loss(networks) != judge._loss(networks)


def test_a_ranking_is_held_against_that_of_the_epoch_before(monkeypatch):
    judge, networks = validation("ganomaly", "stability", blobs(4))
    rankings = iter([[1, 2, 3, 4], [2, 4, 6, 8], [8, 6, 4, 2], [4, 3, 2, 1], [5, 5, 5, 5], [1, 2, 3, 4]])
    monkeypatch.setattr(type(judge.recipe), "score", lambda *_: torch.tensor(next(rankings), dtype=torch.float32))
    for epoch in range(1, 7):
        judge.after_epoch(epoch, networks)
    assert judge.values == pytest.approx([2, 0, 2, 0, 2, 2])  # nothing to compare with, or to rank, is as bad as can be
    assert judge.best_epoch == 2


def test_calibration_sees_a_seeded_sample_of_many_images(monkeypatch):
    recipe = make_detector("ganomaly", score_by="combined", **SMALL).recipe
    networks = build_networks(recipe, (1, 16, 16), 0)
    images, seen = torch.arange(1100.0).view(-1, 1, 1, 1).expand(-1, 1, 16, 16) / 1100, []
    monkeypatch.setattr(
        type(recipe), "calibrate", lambda _, networks, train, held_out: seen.append(torch.cat(train)[:, 0, 0, 0])
    )
    for seed in (0, 0, 1):
        facts = calibrate(recipe, networks, images, None, seed=seed, device=torch.device("cpu"))
    assert facts == {"calibrated_on": "training images", "calibration_images": CALIBRATION_LIMIT}
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2]) and seen[0].max() > 1090 / 1100
    asked: list[int] = []
    monkeypatch.setattr(fitting, "calibrate", lambda *_, seed, **__: asked.append(seed) or {"calibrated_on": "held-out images"})
    make_detector("ganomaly", score_by="combined", **SMALL).fit(blobs(9), seed=5, steps=1, device="cpu")
    assert asked == [5]


def test_few_images_held_out_to_choose_the_epoch_are_too_few_to_calibrate_on():
    detector = make_detector("ganomaly", score_by="combined", select="normal-val", **SMALL).fit(
        blobs(40), epochs=1, device="cpu"
    )
    assert detector.describe()["validation_images"] == 4
    assert detector.describe()["calibrated_on"] == "training images"


def test_a_stage_that_ends_early_leaves_the_next_its_epochs():
    recipe = make_detector("f_anogan", features=2, latent_dim=2, batch_size=8).recipe
    seen: list[int] = []
    trainer = train(
        recipe,
        torch.from_numpy(blobs(16)),
        seed=0,
        epochs=3,
        device=torch.device("cpu"),
        after_epoch=lambda epoch, *_: seen.append(epoch) or epoch == 1,
    )
    assert seen == [1, 2, 3, 4] and trainer.steps == 4 * 2


@pytest.mark.parametrize(
    ("n", "more", "message"),
    [
        (4, {}, "leaves none to hold out"),
        (2, {"val_share": 0.9}, "leaves none to train on"),
        (1, {}, "cannot split a single training image"),
        (10, {"criterion": "stability"}, "ranks at least 3 held-out images, got 1"),
        (40, {"criterion": "generater"}, "Did you mean 'generator'"),
    ],
)
def test_a_validation_that_cannot_be_is_refused_before_training(n, more, message):
    detector = make_detector("ganomaly", select="normal-val", **more, **SMALL)
    with pytest.raises(InvalidInput, match=message):
        detector.fit(blobs(n), epochs=1, device="cpu")


@pytest.mark.parametrize(
    ("name", "criterion", "said"), [("ganomaly", "generater", "generator"), ("f_anogan", "encoder", "one stage")]
)
def test_a_choice_that_cannot_be_is_refused_with_the_shape(name, criterion, said):
    detector = make_detector(name, features=4, latent_dim=4, select="normal-val", criterion=criterion)
    with pytest.raises(InvalidInput, match=said):
        detector.check_shape((1, 16, 16))


def test_selection_needs_one_stage():
    with pytest.raises(InvalidInput, match="one stage"):
        make_detector("f_anogan", features=4, latent_dim=4, select="normal-val").fit(blobs(30), epochs=1, device="cpu")


@pytest.mark.parametrize(("hparams", "message"), [({"val_share": 1.0}, "val_share must lie"), ({"patience": 0}, "patience")])
def test_shares_and_patience_are_checked(hparams, message):
    with pytest.raises(InvalidInput, match=message):
        make_detector("ganomaly", **hparams)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (blobs(3), ["3 training images, fewer than batch_size=8, form each batch"]),
        (np.repeat(blobs(1), 9, axis=0), ["all training images are equal"]),
        (blobs(1), ["1 training images", "all training images are equal"]),
        (blobs(8), []),
    ],
    ids=["few", "equal", "one", "enough"],
)
def test_few_and_equal_images_train_and_the_record_says_so(images, said):
    detector = make_detector("ganomaly", **SMALL).fit(images, steps=2, device="cpu")
    assert np.isfinite(detector.score(blobs(3))).all()
    assert detector.describe()["images_seen"] == 2 * min(8, len(images))
    found = detector.describe().get("fallbacks", [])
    assert len(found) == len(said) and all(text in line for text, line in zip(said, found, strict=True))


def write_folder(root, n):
    from PIL import Image

    for name, count in (("train/0.normal", n), ("test/0.normal", 2), ("test/1.abnormal", 2)):
        (root / name).mkdir(parents=True)
        for k, image in enumerate(blobs(count, seed=len(name))[:, 0]):
            Image.fromarray(((image + 1) * 127).astype(np.uint8)).save(root / name / f"{k}.png")
    return f"folder:{root}"


def test_bench_run_states_its_fallbacks_and_refuses_a_share_that_leaves_nothing(bench, tmp_path):
    models = "ganomaly_plus,ganomaly[select=normal-val]"
    words = ("run", "--models", models, "--hparams", "features=4", "--steps", "2", "--image_size", "16")
    code, _, err = bench(*words, "--datasets", write_folder(tmp_path / "few", 5), "--out", tmp_path / "out")
    assert code == 1
    assert "5 training images, fewer than batch_size=32, form each batch; scores calibrated on the training images" in err
    assert "FAILED: val_share=0.1 of 5 training images leaves none to hold out. Give more images, a val_share of 0.2" in err
    code, _, err = bench(*words, "--datasets", write_folder(tmp_path / "one", 1), "--out", tmp_path / "out1")
    assert code == 2 and "has 1 normal image to train on; at least 2 are needed" in err


def test_a_detector_without_epochs_takes_none(bench):
    words = ("run", "--datasets", "digits", "--classes", "0", "--dry-run")
    code, _, err = bench(*words, "--models", "pca[epochs=7]")
    assert code == 2 and "pca does not train in epochs, got epochs=7. Leave epochs out." in err
    assert bench(*words, "--models", "pca", "--epochs", "7")[0] == 0  # of those that train


def test_none_where_a_number_is_wanted_is_named():
    with pytest.raises(InvalidInput, match="ganomaly: features must be int, got None"):
        make_detector("ganomaly", features=None)
    with pytest.raises(InvalidInput, match=r"ganomaly: select must be .*, got None"):
        make_detector("ganomaly", select=None)
    assert make_detector("ganomaly_plus", ema_decay=None).hparams["ema_decay"] is None
