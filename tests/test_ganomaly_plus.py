"""ganomaly_plus: what its calibration learns, and what it does with few, single and equal images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import blobs

from ganomaly_plugin.config import Experiment, expand
from ganomaly_plugin.detectors.ganomaly_plus import PARTS, Components, Neighbours
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.metrics import auroc
from ganomaly_plugin.registry import load_detector, make_detector
from ganomaly_plugin.selection import Selection

SMALL = {"features": 4, "latent_dim": 8, "batch_size": 8, "lr": 2e-3}


@pytest.mark.parametrize("n", [8, 60])  # fewer vectors than dimensions, and more
def test_components_are_those_of_pca(n):
    from sklearn.decomposition import PCA

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(n, 20)) * np.arange(1, 21)).float()
    ours, theirs = Components(20, 5), PCA(5, svd_solver="full").fit(x.numpy())
    ours.fit(x)
    wanted = x.numpy() - theirs.inverse_transform(theirs.transform(x.numpy()))
    np.testing.assert_allclose(ours.residual(x).numpy(), wanted, atol=1e-3)
    assert ours.whitened(x).var(0).max() < 1.2


def test_equal_and_single_vectors_have_no_components():
    for x in (torch.ones(1, 6), torch.ones(5, 6)):
        model = Components(6, 3)
        model.fit(x)
        assert not model.axes.any()
        assert torch.allclose(model.residual(torch.zeros(2, 6)), -torch.ones(2, 6))


def test_neighbours_measure_the_distance_from_the_nearest():
    model = Neighbours(4, 2)
    x = torch.tensor(np.random.default_rng(0).normal(size=(30, 4))).float()
    model.fit(x)
    here = model.components.whitened(x[:2] + 1)
    squared = (here[:, None] - model.components.whitened(x)[None]).square().sum(2)
    wanted = squared.sort(1).values[:, :3].mean(1).sqrt()
    assert torch.allclose(model(x[:2] + 1), wanted, atol=1e-3)


def test_the_score_is_the_mean_of_its_standardised_parts(tmp_path):
    detector = make_detector("ganomaly_plus", **SMALL).fit(blobs(200), steps=20, device="cpu")
    assert detector.describe()["calibrated_on"] == "held-out images"
    assert detector.describe()["images_seen"] == 160
    test = np.concatenate([blobs(20, seed=1), -blobs(20, seed=2)])
    named = detector.named_scores(test)
    scale = detector.networks_["calibration"].scale
    parts = np.stack([named[name] for name in PARTS], 1)
    wanted = ((parts - scale.mean[:3].numpy()) / scale.deviation[:3].numpy()).mean(1)
    np.testing.assert_allclose(detector.score(test), wanted, rtol=1e-4)
    np.testing.assert_array_equal(detector.score(test), named["combined"])
    assert auroc(np.arange(40) >= 20, detector.score(test)) > 0.95
    detector.save(tmp_path / "d.pt")
    np.testing.assert_array_equal(load_detector(tmp_path / "d.pt", device="cpu").score(test), detector.score(test))


def test_parts_are_those_named_scores():
    pair = make_detector("ganomaly_plus", parts=["residual", "feature"], **SMALL).fit(blobs(30), steps=2, device="cpu")
    whole = make_detector("ganomaly_plus", **SMALL).fit(blobs(30), steps=2, device="cpu")
    np.testing.assert_allclose(pair.score(blobs(4, seed=1)), whole.named_scores(blobs(4, seed=1))["residual_and_feature"])


@pytest.mark.parametrize("images", [blobs(1), np.repeat(blobs(1), 40, axis=0), blobs(3)], ids=["one", "equal", "three"])
@pytest.mark.parametrize("hparams", [{}, {"components": 0}, {"ema_decay": 0.9}], ids=str)
def test_one_equal_and_few_images_are_taken(images, hparams):
    detector = make_detector("ganomaly_plus", **hparams, **SMALL).fit(images, steps=2, device="cpu")
    assert np.isfinite(detector.score(blobs(5, seed=1))).all()
    if len(images) < 40:
        assert detector.describe()["calibrated_on"] == "training images"
        assert "scores calibrated on the training images" in detector.describe()["fallbacks"][-1]


@pytest.mark.parametrize(
    ("share", "message"), [(0.999, "leaves none to train on"), (1.0, "val_share must lie"), (0, "val_share")]
)
def test_a_share_that_leaves_nothing_is_refused(share, message):
    with pytest.raises(InvalidInput, match=message):
        make_detector("ganomaly_plus", val_share=share, **SMALL).fit(blobs(40), steps=2, device="cpu")


def test_its_budget_is_in_steps_unless_epochs_are_given():
    def job(epochs=None, **options):
        selected = [Selection("ganomaly_plus", options)]
        (made,) = expand(
            Experiment(selected, [Selection("digits")], ["one-anomalous/strict-v1"], ["0"], epochs=epochs, image_size=16)
        )
        return made

    assert (job().steps, job().epochs, job().label) == (200, None, "ganomaly_plus")
    assert (job(epochs=3).steps, job(epochs=3).epochs) == (None, 3)
    assert job(steps=50).label == "ganomaly_plus[steps=50]"


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"parts": []}, "parts is empty"),
        ({"parts": ["latnt"]}, "Did you mean 'latent'"),
        ({"score_by": "combned"}, "Did you mean 'combined'"),
        ({"lr_ratio": 0.0}, "lr_ratio must be positive"),
        ({"components": -1}, "components must be at least 0"),
    ],
)
def test_wrong_hyperparameters_are_refused(hparams, message):
    with pytest.raises(InvalidInput, match=message):
        make_detector("ganomaly_plus", **hparams)


def test_the_anomalib_module_calibrates_itself():
    from ganomaly_plugin.detectors.ganomaly_plus import GanomalyPlusRecipe
    from ganomaly_plugin.training.lightning_classes import module_class

    hparams = {name: value for name, value in SMALL.items() if name != "batch_size"}
    module = module_class(GanomalyPlusRecipe)(image_size=16, channels=1, **hparams)
    images = torch.from_numpy(blobs(24))
    before = module.model(images.expand(-1, 3, -1, -1)).pred_score
    module._seen = [images[:12], images[12:]]
    module.on_train_end()
    after = module.model(images.expand(-1, 3, -1, -1)).pred_score
    assert not torch.equal(before, after) and after.isfinite().all()
    assert abs(float(after.mean())) < 0.1  # standardised on these images
    again = module_class(GanomalyPlusRecipe)(image_size=16, channels=1, **hparams)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.model(images.expand(-1, 3, -1, -1)).pred_score, after)
