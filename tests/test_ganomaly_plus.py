"""ganomaly_plus: what its calibration learns, and what it does with few, single and equal images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import blobs

from ganomaly_plugin.config import Experiment, expand
from ganomaly_plugin.detectors.ganomaly_plus import (
    DEFAULT_PARTS,
    PARTS,
    PLAIN,
    SHAPE,
    GanomalyPlusRecipe,
    turn_loss,
)
from ganomaly_plugin.detectors.image_views import histograms, levelled, oriented_gradients, turned
from ganomaly_plugin.detectors.normal_models import STATISTICS, Components, NormalVectors, Whitening
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.metrics import auroc
from ganomaly_plugin.networks import Standardiser
from ganomaly_plugin.recipe import StepInput
from ganomaly_plugin.registry import load_detector, make_detector
from ganomaly_plugin.selection import Selection
from ganomaly_plugin.training.plain import build_networks

SMALL = {"features": 4, "latent_dim": 8, "batch_size": 8, "lr": 2e-3}


@pytest.mark.parametrize("n", [8, 60])  # fewer vectors than dimensions, and more
def test_components_are_those_of_pca(n):
    from sklearn.decomposition import PCA

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(n, 20)) * np.arange(1, 21)).float()
    ours, theirs = Components(20, 5), PCA(5, svd_solver="full").fit(x.numpy())
    ours.fit(x)
    wanted = x.numpy() - theirs.inverse_transform(theirs.transform(x.numpy()))
    np.testing.assert_allclose(ours.residual(x).numpy(), wanted, atol=1e-3)
    assert (ours.coordinates(x) / ours.deviation).var(0).max() < 1.2


def test_equal_and_single_vectors_have_no_components():
    for x in (torch.ones(1, 6), torch.ones(5, 6)):
        model = Components(6, 3)
        model.fit(x)
        assert not model.axes.any()
        assert torch.allclose(model.residual(torch.zeros(2, 6)), -torch.ones(2, 6))


def test_the_statistics_of_normal_vectors_by_hand():
    x = torch.tensor(np.random.default_rng(0).normal(size=(30, 4))).float()
    model = NormalVectors(4, 2)
    model.fit(x)
    strange = x[:2] + 1
    found = {name: value.exp() - model.floor for name, value in model(strange).items()}
    assert tuple(found) == STATISTICS
    here, known = model.components.coordinates(strange), model.components.coordinates(x)
    squared = (here[:, None] - known[None]).square().sum(2).sort(1).values[:, :3].mean(1)
    assert torch.allclose(found["nearest"], squared / 4, atol=1e-3)
    assert torch.allclose(found["outside"], model.components.residual(strange).square().mean(1), atol=1e-3)
    inside = (here.square() / (model.components.variance * 1 + 0.1 * model.components.variance.mean())).mean(1)
    assert torch.allclose(found["inside"], inside * model.components.variance.sum() / 4, atol=1e-3)


def test_half_of_the_vectors_is_the_most_components():
    x = torch.tensor(np.random.default_rng(0).normal(size=(10, 40))).float()
    model = NormalVectors(40, 20)
    model.fit(x)
    assert int(model.components.axes.any(1).sum()) == 5


def test_the_peak_is_the_window_that_is_furthest_outside():
    x = torch.tensor(np.random.default_rng(0).normal(size=(40, 2 * 8 * 8))).float()
    model = NormalVectors(128, 3, image=(2, 8, 8))
    model.fit(x)
    strange = x[:3].clone().view(3, 2, 8, 8)
    strange[:, :, 4:6, 2:4] += 5
    strange = strange.flatten(1)
    outside = model.components.residual(strange).square().view(3, 2, 8, 8).mean(1)
    windows = torch.stack([outside[:, r : r + 2, c : c + 2].mean((1, 2)) for r in range(7) for c in range(7)], 1)
    assert torch.allclose(model(strange)["peak"].exp() - model.floor, windows.amax(1), atol=1e-3)
    assert (windows.argmax(1) == 4 * 7 + 2).all()


def test_whitened_scores_are_uncorrelated_in_each_subset_and_still_themselves():
    rng = torch.Generator().manual_seed(0)
    common = torch.randn(2000, 1, generator=rng)
    values = torch.cat([common + 0.5 * torch.randn(2000, 3, generator=rng), torch.randn(2000, 1, generator=rng)], 1)
    whitening = Whitening([(0, 1, 3), (2,)], 4)
    assert torch.equal(whitening(values, 0), values * torch.tensor([1.0, 1, 0, 1]))  # before it learns
    whitening.fit(values)
    white = whitening(values, 0)
    assert not white[:, 2].any()
    within = torch.cov(white[:, [0, 1, 3]].T)
    assert torch.allclose(within, torch.eye(3), atol=0.35) and abs(within[0, 1]) < 0.25 < torch.corrcoef(values.T)[0, 1]
    assert torch.corrcoef(torch.stack([white[:, 0], values[:, 0]]))[0, 1] > 0.8
    assert torch.allclose(whitening(values, 1)[:, 2], values[:, 2] / (1.1 * values[:, 2].var()).sqrt(), rtol=1e-2)
    whitening.fit(torch.ones(5, 4))
    assert torch.equal(whitening(values, 1)[:, 2], values[:, 2])  # equal scores teach nothing


def test_the_score_joins_the_whitened_parts_with_the_distance_of_the_shapes(tmp_path):
    detector = make_detector("ganomaly_plus", **SMALL).fit(blobs(200), steps=20, device="cpu")
    assert detector.describe()["calibrated_on"] == "held-out images"
    assert detector.describe()["images_seen"] == 160
    test = np.concatenate([blobs(20, seed=1), -blobs(20, seed=2)])
    named = detector.named_scores(test)
    model = detector.networks_["calibration"]
    mean, deviation = (dict(zip(PARTS, values.tolist())) for values in (model.scale.mean, model.scale.deviation))  # noqa: B905 - PLAIN follows
    parts = np.stack([(named[part] - mean[part]) / deviation[part] for part in DEFAULT_PARTS], 1)
    places = [PARTS.index(part) for part in DEFAULT_PARTS]
    white = parts @ model.whitening.matrices[0].numpy()[np.ix_(places, places)]

    def folded(values):
        return np.where(values > 0, values, -0.25 * values)

    def joined(name, *halves):
        scale = model.halves[name]
        return np.logaddexp.reduce((np.stack(halves, 1) - scale.mean.numpy()) / scale.deviation.numpy(), axis=1)

    shape = np.sqrt((parts[:, [DEFAULT_PARTS.index(part) for part in SHAPE]].clip(0) ** 2).mean(1))
    close = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(detector.score(test), joined("combined", np.sqrt((folded(white) ** 2).mean(1)), shape), **close)
    below = joined("without_below", np.sqrt((white.clip(0) ** 2).mean(1)), shape)
    np.testing.assert_allclose(named["without_below"], below, **close)
    np.testing.assert_allclose(named["mean_of_parts"], joined("mean_of_parts", folded(white).mean(1), shape), **close)
    alone = joined("without_whitening", np.sqrt((folded(parts) ** 2).mean(1)), shape)
    np.testing.assert_allclose(named["without_whitening"], alone, **close)
    only = joined("without_shape", np.sqrt((folded(white) ** 2).mean(1)))
    np.testing.assert_allclose(named["without_shape"], only, **close)
    np.testing.assert_array_equal(detector.score(test), named["combined"])
    assert auroc(np.arange(40) >= 20, detector.score(test)) > 0.95
    detector.save(tmp_path / "d.pt")
    np.testing.assert_array_equal(load_detector(tmp_path / "d.pt", device="cpu").score(test), detector.score(test))


def test_what_is_not_of_normal_vectors_is_ganomalys_own():
    detector = make_detector("ganomaly_plus", normalise=True, **SMALL).fit(blobs(40), steps=2, device="cpu")
    test = blobs(5, seed=1)
    named, networks, model = detector.named_scores(test), detector.networks_, detector.networks_["calibration"]
    with torch.no_grad():
        x = levelled(torch.from_numpy(test)).clamp(-1, 1)
        x_hat, z, z_hat = networks["generator"](x)
        features, features_hat = (networks["discriminator"](each)[1] for each in (x, x_hat))
    for name, difference in zip(PLAIN, (z - z_hat, x - x_hat, features - features_hat), strict=True):
        np.testing.assert_allclose(named[name], difference.square().flatten(1).mean(1), rtol=1e-4)
    places = [(PARTS + PLAIN).index(name) for name in PLAIN]
    mean, deviation = model.scale.mean[places].numpy(), model.scale.deviation[places].numpy()
    scaled = (np.stack([named[name] for name in PLAIN], 1) - mean) / deviation
    np.testing.assert_allclose(named["plain"], scaled.mean(1), rtol=1e-3, atol=1e-3)
    assert torch.equal(detector.recipe.reconstruct({"generator": lambda seen: (seen,)}, torch.from_numpy(test)), x)
    outside = np.exp(named["residual_outside"]) - float(model.views["residual"].floor)  # of which the map says where it lies
    np.testing.assert_allclose(detector.anomaly_map(test).mean((1, 2)), outside, rtol=1e-3)


def test_what_is_left_out_of_the_score_goes_by_view_or_by_statistic():
    means = GanomalyPlusRecipe(**SMALL)._means
    assert means["without_hog"] == tuple(part for part in DEFAULT_PARTS if not part.startswith("hog"))
    assert means["without_nearest"] == tuple(part for part in DEFAULT_PARTS if not part.endswith("nearest"))
    assert set(means["with_residual"]) - set(DEFAULT_PARTS) == {"residual_outside", "residual_nearest"}
    inside = set(means["with_inside"]) - set(DEFAULT_PARTS)
    assert len(inside) == 7 and all(part.endswith("_inside") for part in inside) and "residual_inside" not in inside


def test_few_held_out_images_count_in_the_scale_beside_the_folds_of_the_training_images():
    recipe = GanomalyPlusRecipe(**SMALL)
    networks = {name: network.eval() for name, network in build_networks(recipe, (1, 16, 16), 0).items()}
    train, held_out = (list(torch.from_numpy(blobs(20, seed=seed)).split(10)) for seed in (0, 1))
    scale = networks["calibration"].scale
    with torch.no_grad():
        recipe.calibrate(networks, train, train)
        folds = scale.mean.clone()
        recipe.calibrate(networks, train, held_out)
        own = recipe._parts(networks["calibration"], recipe._views(networks, torch.cat(held_out)))
    torch.testing.assert_close(scale.mean, (20 * own.mean(0) + 10 * folds) / 30, rtol=1e-3, atol=1e-3)


def test_few_held_out_images_share_the_scale_with_the_folds():
    values, prior = torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0], [7.0]])
    standardiser = Standardiser(1)
    standardiser.fit(values, prior, worth=6)  # 2 rows that count for 2, 3 that count for 6
    assert standardiser.mean.item() == pytest.approx((2 * 2 + 6 * 7) / 8)
    assert standardiser.deviation.item() == pytest.approx(((2 * 1 + 6 * 8 / 3) / 8) ** 0.5)


@pytest.mark.parametrize(("side", "cells"), [(16, 8), (16, 4), (48, 4)])
def test_gradients_are_told_by_where_they_are_and_which_way_they_point(side, cells):
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    ramps = torch.from_numpy(np.stack([columns, -columns, rows, (rows + columns) / 2])[:, None] / side)

    def hog(images):
        return histograms(oriented_gradients(images), cells)

    found = hog(ramps.expand(-1, 3, -1, -1)).view(4, 8, cells, cells)
    assert torch.allclose(found[0], hog(ramps[:1]).view(8, cells, cells), atol=1e-6)  # grey is a channel
    inside = found[..., 1:-1, 1:-1].mean((2, 3))
    assert inside.argmax(1).tolist() == [0, 4, 2, 1]
    assert ((inside > 1e-2).sum(1) == 1).all()  # no other direction is as near as an eighth of a turn
    assert not hog(torch.full((1, 1, side, side), 0.3)).any()
    edge = torch.zeros(1, 1, side, side)
    edge[..., side // 2 :] = 1.0  # a step in the middle, seen by the cells beside it alone
    seen = hog(edge).view(8, cells, cells)[0].amax(0)
    assert seen.nonzero().flatten().tolist() == [cells // 2 - 1, cells // 2]
    between = torch.from_numpy((columns + np.tan(np.pi / 8) * rows)[None, None] / side).float()
    shares = hog(between).view(8, -1).mean(1)
    assert torch.allclose(shares[0], shares[1], rtol=0.1) and not shares[2:7].any()


def test_images_are_turned_and_the_turns_are_told_apart():
    images = torch.from_numpy(blobs(3, channels=2))
    four = turned(images).view(4, 3, 2, 16, 16)
    assert torch.equal(four[0], images)
    assert torch.equal(four[1][:, :, 0], images[..., 15]) and torch.equal(four[2], images.flip(2, 3))
    truth = torch.arange(4).repeat_interleave(3)
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    assert turn_loss(logits).item() == pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item())
    assert turn_loss(50 * torch.nn.functional.one_hot(truth, 4).float()) < 1e-6


def test_d_learns_the_turns_unless_they_weigh_nothing():
    ramp = np.linspace(-1, 1, 16, dtype=np.float32) * np.ones((40, 1, 16, 1), np.float32)  # brighter to the right
    images = (0.8 * ramp + 0.1 * blobs(40)).astype(np.float32)
    learning = make_detector("ganomaly_plus", **SMALL).fit(images, epochs=8, device="cpu")
    assert learning.history_[-1]["turns"] < 0.2 < 0.5 < learning.history_[0]["turns"]
    without = make_detector("ganomaly_plus", w_turn=0.0, **SMALL).fit(images, epochs=1, device="cpu")
    assert "turns" not in without.networks_ and "turns" not in without.history_[0]


def test_d_has_its_own_rate_and_its_own_loss_beside_that_of_the_turns():
    recipe = GanomalyPlusRecipe(w_turn=3.0, lr_ratio=5.0, augment=True, redraw_below=0.1, **SMALL)
    generator, discriminator = recipe.stages[0].phases
    assert (generator.optimiser.lr, discriminator.optimiser.lr) == (2e-3, 5 * 2e-3)
    assert (generator.redraw_below, discriminator.redraw_below) == (None, 0.1)
    networks, images = build_networks(recipe, (1, 16, 16), 0), torch.from_numpy(blobs(8))
    step = StepInput(images, recipe.draw(8, torch.Generator().manual_seed(0)), {})
    _, earlier = generator.loss(networks, step)
    loss, computed = discriminator.loss(networks, StepInput(images, step.draws, earlier))
    assert loss.item() == pytest.approx((computed["discriminator"] + 3 * computed["turns"]).item())
    assert computed["turns"].item() > 0.1
    assert torch.equal(earlier["images"], recipe._moved(images, step.draws["shift"], step.draws["gain"]))
    x_hat = networks["generator"](earlier["images"])[0]  # what is moved is what the networks see
    assert earlier["contextual"].item() == pytest.approx((earlier["images"] - x_hat).abs().mean().item(), rel=1e-4)


def test_parts_are_those_named_scores():
    left = [part for part in DEFAULT_PARTS if not part.startswith("image")]
    fewer = make_detector("ganomaly_plus", parts=left, **SMALL).fit(blobs(30), steps=2, device="cpu")
    whole = make_detector("ganomaly_plus", **SMALL).fit(blobs(30), steps=2, device="cpu")
    shapeless = make_detector("ganomaly_plus", parts=["latent_nearest"], **SMALL).fit(blobs(30), steps=2, device="cpu")
    named = shapeless.named_scores(blobs(4, seed=1))
    np.testing.assert_array_equal(named["combined"], named["without_shape"])
    np.testing.assert_allclose(fewer.score(blobs(4, seed=1)), whole.named_scores(blobs(4, seed=1))["without_image"])


def test_images_simpler_than_normal_ones_are_anomalous_too():
    rng = np.random.default_rng(0)
    noisy = rng.normal(0, 0.3, (60, 1, 16, 16)).clip(-1, 1).astype(np.float32)
    test = np.concatenate([rng.normal(0, 0.3, (20, 1, 16, 16)).clip(-1, 1), np.full((20, 1, 16, 16), 0.01)]).astype(np.float32)
    found = {}
    for below in (0.0, 0.5):
        detector = make_detector("ganomaly_plus", below=below, parts=("image_outside", "image_nearest"), **SMALL)
        found[below] = auroc(np.arange(40) >= 20, detector.fit(noisy, steps=2, device="cpu").score(test))
    assert found[0.0] < 0.1 and found[0.5] > 0.95


def test_without_held_out_images_each_fold_is_scored_by_models_of_the_others():
    few = make_detector("ganomaly_plus", **SMALL).fit(blobs(40), steps=2, device="cpu")
    assert few.describe()["calibrated_on"] == "training images"
    fresh = few.score(blobs(200, seed=5))
    assert fresh.mean() < 1  # scaled by distances of images from themselves, every new one would look strange (2.8)


def test_augmented_images_are_moved_and_brightened():
    recipe = GanomalyPlusRecipe(augment=True, **SMALL)
    images = torch.from_numpy(blobs(6, channels=3, side=32))
    moved = recipe._moved(
        images, torch.tensor([[0.0, 0.0], [1 / 16, 0.0], [0.0, -1 / 16]]).repeat(2, 1), torch.ones(6, 1, 1, 1)
    )
    assert torch.allclose(moved[0], images[0], atol=1e-6)
    assert torch.allclose(moved[1, :, :-2], images[1, :, 2:], atol=1e-6)
    assert torch.allclose(moved[2, :, :, 2:], images[2, :, :, :-2], atol=1e-6)
    bright = recipe._moved(images, torch.zeros(6, 2), torch.full((6, 1, 1, 1), 1.1))
    assert torch.allclose(bright, ((images + 1) * 1.1 - 1).clamp(-1, 1), atol=1e-6)
    draws = recipe.draw(100, torch.Generator().manual_seed(0))
    assert draws["shift"].abs().max() <= 1 / 16 and 0.9 <= draws["gain"].min() < 0.95 < 1.05 < draws["gain"].max() <= 1.1


def test_normalised_images_have_one_brightness_and_contrast():
    images = torch.from_numpy(blobs(4))
    assert torch.allclose(levelled(images * 0.5 + 0.2), levelled(images), atol=4e-2)
    assert levelled(torch.full((2, 1, 16, 16), 0.7)).abs().max() < 1e-4  # a flat image has no contrast to bring up
    seen = {normalise: GanomalyPlusRecipe(normalise=normalise, **SMALL)._input(images) for normalise in (False, True)}
    assert torch.equal(seen[False], images) and torch.equal(seen[True], levelled(images).clamp(-1, 1))


def test_spectral_normalisation_survives_a_redraw():
    recipe = GanomalyPlusRecipe(spectral=True, **SMALL)
    torch.manual_seed(0)
    discriminator = recipe.build((1, 16, 16))["discriminator"]
    first = next(layer for layer in discriminator.modules() if isinstance(layer, torch.nn.Conv2d))
    before = first.weight.detach().clone()
    assert abs(float(torch.linalg.matrix_norm(before.flatten(1), 2)) - 1) < 0.1
    recipe.redraw(discriminator)
    for _ in range(20):  # the power iteration follows
        after = first.weight.detach()
    assert not torch.equal(before, after) and abs(float(torch.linalg.matrix_norm(after.flatten(1), 2)) - 1) < 0.1


@pytest.mark.parametrize("images", [blobs(1), np.repeat(blobs(1), 40, axis=0), blobs(3)], ids=["one", "equal", "three"])
@pytest.mark.parametrize("hparams", [{}, {"spectral": True, "augment": True, "normalise": True}, {"ema_decay": 0.9}], ids=str)
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
        ({"parts": ["latent_neerest"]}, "Did you mean 'latent_nearest'"),
        ({"score_by": "combned"}, "Did you mean 'combined'"),
        ({"lr_ratio": 0.0}, "lr_ratio must be positive"),
        ({"components": 0}, "components must be at least 1"),
        ({"below": -0.5}, "below must be at least 0"),
        ({"w_turn": -1.0}, "w_turn must be at least 0"),
    ],
)
def test_wrong_hyperparameters_are_refused(hparams, message):
    with pytest.raises(InvalidInput, match=message):
        make_detector("ganomaly_plus", **hparams)


def test_the_anomalib_module_calibrates_itself():
    from ganomaly_plugin.training.lightning_classes import module_class

    hparams = {name: value for name, value in SMALL.items() if name != "batch_size"}
    module = module_class(GanomalyPlusRecipe)(image_size=16, channels=1, **hparams)
    images = torch.from_numpy(blobs(24))
    before = module.model(images.expand(-1, 3, -1, -1)).pred_score
    module._seen = [images[:12], images[12:]]
    module.on_train_end()
    after = module.model(images.expand(-1, 3, -1, -1)).pred_score
    assert not torch.equal(before, after) and after.isfinite().all()
    fresh = torch.from_numpy(blobs(24, seed=1)).expand(-1, 3, -1, -1)
    assert float(module.model(fresh).pred_score.mean()) < 2  # standardised on images like these
    again = module_class(GanomalyPlusRecipe)(image_size=16, channels=1, **hparams)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.model(images.expand(-1, 3, -1, -1)).pred_score, after)


@pytest.mark.parametrize("when", [{"monitor": "generator_loss"}, {"every_n_train_steps": 1}], ids=["epoch", "step"])
def test_checkpoints_are_calibrated_without_a_validation_loop(when, tmp_path):
    from anomalib.data import ImageBatch
    from anomalib.engine import Engine
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ganomaly_plugin.training.lightning_classes import module_class

    def made():
        hparams = {name: value for name, value in SMALL.items() if name != "batch_size"}
        return module_class(GanomalyPlusRecipe)(image_size=16, channels=1, pre_processor=False, visualizer=False, **hparams)

    images = torch.from_numpy(blobs(24)).expand(-1, 3, -1, -1)
    batches = torch.utils.data.DataLoader([ImageBatch(image=part) for part in images.split(8)], None, collate_fn=lambda b: b)
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **when)
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    engine = Engine(callbacks=[saving], default_root_dir=tmp_path, max_epochs=2, **trainer)
    fitted = made()
    engine.fit(fitted, train_dataloaders=batches)
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    loaded = made()
    loaded.load_state_dict(torch.load(last, weights_only=True)["state_dict"])
    torch.testing.assert_close(loaded.model(images).pred_score, fitted.model(images).pred_score, rtol=1e-4, atol=1e-4)
