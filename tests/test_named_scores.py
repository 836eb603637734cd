"""Several scores of one trained model: what they are, what is stored, and tables of them without training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import blobs
from test_measures import fill, outcome

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.metrics import auroc, named_arrays
from ganomaly_plugin.registry import load_detector, make_detector
from ganomaly_plugin.store import Store
from ganomaly_plugin.training.plain import build_networks

SMALL = {"features": 4, "latent_dim": 8, "batch_size": 8, "lr": 2e-3}
NAMES = ["latent", "latent_l1", "residual", "residual_l2", "feature"]


def test_ganomalys_scores_by_hand():
    detector = make_detector("ganomaly", **SMALL).fit(blobs(16), steps=2, device="cpu")
    images = blobs(4, seed=1)
    with torch.no_grad():
        x = torch.from_numpy(images)
        nets = {name: net.eval() for name, net in detector.networks_.items()}
        x_hat, z, z_hat = nets["generator"](x)
        f, f_hat = nets["discriminator"](x)[1], nets["discriminator"](x_hat)[1]
    wanted = {
        "latent": ((z - z_hat) ** 2).flatten(1).mean(1),
        "latent_l1": (z - z_hat).abs().flatten(1).mean(1),
        "residual": (x - x_hat).abs().flatten(1).mean(1),
        "residual_l2": ((x - x_hat) ** 2).flatten(1).mean(1),
        "feature": ((f - f_hat) ** 2).flatten(1).mean(1),
    }
    found = detector.named_scores(images)
    assert list(found) == NAMES
    for name, score in wanted.items():
        np.testing.assert_allclose(found[name], score.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(found["latent"], detector.score(images))


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_score_can_be_the_detectors_own(name):
    plain = make_detector("ganomaly", **SMALL).fit(blobs(16), steps=2, device="cpu")
    chosen = make_detector("ganomaly", score_by=name, **SMALL).fit(blobs(16), steps=2, device="cpu")
    np.testing.assert_array_equal(chosen.score(blobs(3, seed=1)), plain.named_scores(blobs(3, seed=1))[name])


@pytest.mark.parametrize(
    ("n", "origin", "count"),
    [(120, "held-out images", 12), (100, "held-out images", 10), (20, "training images", 20), (1, "training images", 1)],
)
def test_the_combined_score_is_calibrated_on_held_out_normals_where_there_are_enough(n, origin, count, tmp_path):
    detector = make_detector("ganomaly", score_by="combined", **SMALL).fit(blobs(n), steps=2, device="cpu")
    facts = detector.describe()
    assert (facts["calibrated_on"], facts["calibration_images"]) == (origin, count)
    test = blobs(6, seed=1)
    scores = np.stack(list(detector.named_scores(test).values()), 1)
    model = detector.networks_["calibration"]
    np.testing.assert_allclose(
        detector.score(test), ((scores - model.mean.numpy()) / model.deviation.numpy()).mean(1), rtol=1e-3
    )
    detector.save(tmp_path / "d.pt")
    np.testing.assert_array_equal(load_detector(tmp_path / "d.pt", device="cpu").score(test), detector.score(test))


def test_the_combined_score_is_scaled_by_the_held_out_images_and_no_others():
    recipe = GanomalyRecipe(score_by="combined", **SMALL)
    networks = {name: network.eval() for name, network in build_networks(recipe, (1, 16, 16), 0).items()}
    train, held_out = (list(torch.from_numpy(blobs(12, seed=seed)).split(6)) for seed in (0, 1))
    with torch.no_grad():
        recipe.calibrate(networks, train, held_out)
        scores = torch.stack(list(recipe.scores(networks, torch.cat(held_out)).values()), 1)
    torch.testing.assert_close(networks["calibration"].mean, scores.mean(0))
    torch.testing.assert_close(networks["calibration"].deviation, scores.std(0, correction=0))


def test_combined_by_hand():
    reference = {"a": np.array([0.0, 2.0]), "b": np.array([5.0, 5.0])}
    found = named_arrays({"a": np.array([3.0]), "b": np.array([6.0])}, reference)
    assert found["score.combined"] == pytest.approx([(2.0 + 1.0) / 2])  # (3 - 1) / 1 and (6 - 5) / 1: b has no spread
    assert set(found) == {f"{kind}score.{name}" for kind in ("", "reference_") for name in ("a", "b", "combined")}
    assert named_arrays({}, {}) == {}
    own = {name: np.array([3.0]) for name in ("a", "combined")}  # a method that has its own keeps it
    assert named_arrays(own, own)["score.combined"] == pytest.approx([3.0])


def test_rounding_is_no_spread():
    reference = {"a": np.array([0.1] * 3)}  # their deviation is 1.4e-17
    assert reference["a"].std() > 0
    assert named_arrays({"a": np.array([0.6])}, reference)["score.combined"] == pytest.approx([0.5])
    assert named_arrays({"a": np.array([3e-20])}, {"a": np.array([0, 2e-20])})["score.combined"] == pytest.approx([2.0])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from ganomaly_plugin.cli import main

    out = tmp_path_factory.mktemp("named") / "out"
    words = [
        "run",
        "--models",
        "ganomaly,pca",
        "--datasets",
        "digits",
        "--image_size",
        "16",
        "--classes",
        "0,1",
        "--steps",
        "3",
        "--executor",
        "inline",
    ]
    assert (
        main(
            [
                *words,
                "--hparams",
                "features=4",
                "--protocols",
                "one-anomalous/strict-v1,one-anomalous/paper-v1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


def test_tables_show_all_scores_side_by_side(bench, results):
    code, table, err = bench("tables", results, "--scores", "all", "--format", "json")
    assert code == 0 and "standardised on training images" in err
    for name in [*NAMES, "combined"]:
        assert f"score_by={name}" in table
    store = Store(results)
    record = next(
        r for r in store.records() if r.job.detector == "ganomaly" and "strict" in r.job.protocol and r.job.category == "0"
    )
    arrays = store.scores(record.job)
    wanted = auroc(arrays["is_anomaly"], arrays["score.residual"])
    code, table, err = bench("tables", results, "--score", "residual", "--format", "csv")
    assert code == 0 and not err
    assert "pca" in table and "score_by=residual" in table and "score_by=feature" not in table
    assert f"{wanted:.3f}" in table or f"{wanted:.6f}" in table or str(wanted)[:8] in table
    np.testing.assert_array_equal(arrays["score.latent"], arrays["score"])
    assert json.loads(bench("tables", results, "--format", "json")[1])  # the plain tables are as they were


def test_models_that_score_otherwise_share_no_row(bench, tmp_path):
    names = ["ganomaly", "ganomaly[score_by=combined]"]  # the second one holds images out of its training
    made = [outcome(name, shift=shift) for name, shift in zip(names, (0.0, 3.0), strict=True)]
    for each in made:
        each.arrays.update({f"{kind}score.latent": each.arrays[f"{kind}score"] for kind in ("", "reference_")})
    code, table, err = bench("tables", fill(tmp_path / "out", made).folder, "--scores", "all", "--format", "json")
    assert code == 0, err
    rows = {row["detector"]: row["cells"]["mean"]["mean"] for row in json.loads(table)[0]["rows"]}
    truth = made[0].arrays["is_anomaly"]
    shown = ["ganomaly[score_by=latent]", '"ganomaly[score_by=combined]"[score_by=latent]']
    assert rows == {name: pytest.approx(auroc(truth, each.arrays["score"])) for name, each in zip(shown, made, strict=True)}


def test_a_label_that_cannot_be_read_has_scores_too(bench, tmp_path):
    names = ["mod:Cls[mode=*.png]", "mod:Cls[mode=a, b]", "x[y]"]
    made = [outcome(name) for name in names]
    for each in made:
        each.arrays.update({f"{kind}score.latent": each.arrays[f"{kind}score"] for kind in ("", "reference_")})
    code, table, err = bench("tables", fill(tmp_path / "out", made).folder, "--scores", "all", "--format", "json")
    assert code == 0, err
    assert {row["detector"] for row in json.loads(table)[0]["rows"]} == {f'"{name}"[score_by=latent]' for name in names}


@pytest.mark.parametrize(
    ("words", "message"), [(["--scores", "latnet"], "Did you mean 'latent'"), (["--scores", "all", "--report"], "own score")]
)
def test_wrong_scores_are_refused(bench, results, words, message):
    code, _, err = bench("tables", results, *words)
    assert code == 2 and message in err


def test_a_folder_without_named_scores_is_refused(bench, tmp_path):
    bench("run", "--models", "pca", "--datasets", "digits", "--image_size", "16", "--classes", "0", "--out", tmp_path / "out")
    code, _, err = bench("tables", tmp_path / "out", "--scores", "residual")
    assert code == 2 and "has named scores" in err


def test_an_unknown_score_is_refused():
    with pytest.raises(InvalidInput, match="score_by"):
        make_detector("ganomaly", score_by="latnet")
