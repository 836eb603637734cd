"""The classical baselines: against the definitions computed by hand, at their edges, and through a file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble import IsolationForest
from sklearn.svm import OneClassSVM

from ganomaly_plugin import load_detector, make_detector
from ganomaly_plugin.detectors import classical
from ganomaly_plugin.detectors.pixels import Scaler, sklearn_seed
from ganomaly_plugin.errors import CorruptFile, InvalidInput

NAMES = ("pca", "knn", "iforest", "ocsvm")


def noise(n: int, chw: tuple[int, int, int] = (1, 16, 16), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *chw), dtype=np.uint8)


def standardised(train: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The definition, in float64: pixels in [-1, 1], less the training mean, over the training deviation."""
    a, b = (x.reshape(len(x), -1) / 127.5 - 1 for x in (train, images))
    deviation = a.std(0)
    return (b - a.mean(0)) / np.where(deviation > 0, deviation, 1.0)


def test_pca_is_the_residual_of_the_leading_singular_vectors():
    train, test = noise(40), noise(7, seed=1)
    x, y = standardised(train, train), standardised(train, test)
    basis = np.linalg.svd(x, full_matrices=False)[2][:5]
    residual = (y - y @ basis.T @ basis) ** 2
    detector = make_detector("pca", n_components=5).fit(train)
    np.testing.assert_allclose(detector.score(test), residual.mean(1), rtol=1e-4)
    np.testing.assert_allclose(detector.anomaly_map(test), residual.reshape(7, 16, 16), rtol=1e-2, atol=1e-3)


def test_pca_map_is_the_mean_over_channels_and_averages_to_the_score():
    detector = make_detector("pca", n_components=4).fit(noise(20, (3, 16, 16)))
    test = noise(5, (3, 16, 16), seed=1)
    maps = detector.anomaly_map(test)
    assert maps.shape == (5, 16, 16) and maps.dtype == np.float32
    np.testing.assert_allclose(maps.mean((1, 2)), detector.score(test), rtol=1e-5)


@pytest.mark.parametrize(("n", "d", "solver"), [(300, 200, "covariance_eigh"), (200, 300, "full"), (1100, 5000, "randomized")])
def test_pca_solvers_find_the_same_components(n, d, solver):
    assert classical._pca_solver(n, d, 3) == solver
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (n, 3)) @ rng.uniform(-1, 1, (3, d)) / 3 + rng.uniform(-1e-3, 1e-3, (n, d))
    images = images.reshape(n, 1, 1, d).clip(-1, 1).astype(np.float32)
    detector = make_detector("pca", n_components=3, standardise=False).fit(images)
    x = images.reshape(n, d).astype(np.float64)
    x -= x.mean(0)
    _, vectors = np.linalg.eigh(x @ x.T)
    residual = x - vectors[:, -3:] @ (vectors[:, -3:].T @ x)
    np.testing.assert_allclose(detector.score(images), (residual**2).mean(1), rtol=2e-2)


def test_pca_keeps_no_more_components_than_the_images_have():
    train = noise(8)
    detector = make_detector("pca").fit(train)
    assert detector.describe()["components"] == 7
    assert detector.score(train).max() < 1e-6 < detector.score(noise(4, seed=1)).min()
    assert make_detector("pca").fit(np.concatenate([train[:3]] * 5)).describe()["components"] == 2


def test_pca_refuses_to_keep_every_direction():
    with pytest.raises(InvalidInput, match=r"n_components must be smaller than the number of pixels, 64 .*, got 100"):
        make_detector("pca").fit(noise(20, (1, 8, 8)))
    assert np.isfinite(make_detector("pca", n_components=63).fit(noise(20, (1, 8, 8))).score(noise(2, (1, 8, 8)))).all()


@pytest.mark.parametrize("distance", ["mean", "kth"])
def test_knn_is_the_distance_from_the_nearest_vectors(distance):
    train, test = noise(30), noise(6, seed=1)
    gaps = np.linalg.norm(standardised(train, test)[:, None] - standardised(train, train)[None], axis=2)
    nearest = np.sort(gaps, axis=1)[:, :3]
    expected = nearest.mean(1) if distance == "mean" else nearest[:, 2]
    detector = make_detector("knn", k=3, distance=distance).fit(train)
    np.testing.assert_allclose(detector.score(test), expected, rtol=1e-5)


def test_forest_and_svm_are_scikit_learns_with_its_defaults():
    train, test = noise(50), noise(6, seed=1)
    scaler = Scaler.of(torch.from_numpy(train), True)
    x, y = scaler.vectors(torch.from_numpy(train)), scaler.vectors(torch.from_numpy(test))
    np.testing.assert_allclose(y, standardised(train, test), rtol=1e-4, atol=1e-5)
    forest = IsolationForest(random_state=sklearn_seed(3)).fit(x)
    np.testing.assert_array_equal(make_detector("iforest").fit(train, seed=3).score(test), -forest.score_samples(y))
    svm = OneClassSVM().fit(x)
    np.testing.assert_array_equal(make_detector("ocsvm").fit(train, seed=3).score(test), -svm.score_samples(y))


def test_without_standardising_distances_are_those_of_the_pixels():
    train, test = noise(10), noise(3, seed=1)
    a, b = (x.reshape(len(x), -1) / 127.5 - 1 for x in (train, test))
    expected = np.linalg.norm(b[:, None] - a[None], axis=2).min(1)
    score = make_detector("knn", k=1, standardise=False).fit(train).score(test)
    np.testing.assert_allclose(score, expected, rtol=1e-5)


def test_a_pixel_that_never_varies_is_divided_by_one():
    train = noise(20)
    train[:, 0, :2] = 77
    scaler = Scaler.of(torch.from_numpy(train), True)
    assert (scaler.divisor[:32] == 1).all() and (scaler.divisor[32:] < 1).all()
    as_float = Scaler.of(torch.from_numpy((train / 127.5 - 1).astype(np.float32)), True)
    np.testing.assert_allclose(as_float.divisor, scaler.divisor, rtol=1e-5)
    rounded = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    rounded[:, :, 0] = 0.1
    rounded[0, :, 0] = float(np.nextafter(np.float32(0.1), np.float32(1)))  # nothing but rounding is between them
    assert (Scaler.of(rounded, True).divisor[:4] == 1).all()


def test_what_a_model_holds_is_counted():
    train = noise(20)
    d = train[0].size
    assert make_detector("pca", n_components=3).fit(train).describe()["parameters"] == (3 + 2) * d  # mean and divisor
    assert make_detector("knn").fit(train).describe()["parameters"] == 20 * d
    found = make_detector("ocsvm").fit(train).describe()
    assert found["parameters"] == found["support_vectors"] * (d + 1) + 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_saved_detector_scores_exactly_as_before(name, dtype, tmp_path):
    train, test = noise(60, (3, 16, 16)), noise(9, (3, 16, 16), seed=1)
    if dtype is np.float32:
        train, test = ((x / 127.5 - 1).astype(np.float32) for x in (train, test))
    hparams = {} if name == "pca" else {"max_train": 40}
    detector = make_detector(name, **hparams).fit(train, seed=5)
    detector.save(tmp_path / "detector.pt")
    loaded = load_detector(tmp_path / "detector.pt")
    np.testing.assert_array_equal(loaded.score(test), detector.score(test))
    assert loaded.describe() == detector.describe() and loaded.hparams == detector.hparams
    assert detector.describe()["train_used"] == (60 if name == "pca" else 40)


def test_a_saved_model_that_refits_to_other_scores_is_refused(tmp_path):
    detector = make_detector("iforest").fit(noise(20))
    detector.save(tmp_path / "detector.pt")
    content = torch.load(tmp_path / "detector.pt", weights_only=True)
    content["state"]["seed"] += 1
    torch.save(content, tmp_path / "detector.pt")
    with pytest.raises(CorruptFile, match="iforest does not reproduce its scores"):
        load_detector(tmp_path / "detector.pt")


@pytest.mark.parametrize("name", NAMES)
def test_one_image_or_equal_images_are_enough(name):
    one, other = noise(1), noise(1, seed=1)
    for train in (one, np.repeat(one, 12, axis=0)):
        same, different = make_detector(name).fit(train).score(np.concatenate([one, other]))
        assert np.isfinite([same, different]).all()
        assert same < different or name == "iforest"  # equal images cannot be split: every score is the same


@pytest.mark.parametrize("name", ["knn", "iforest", "ocsvm"])
def test_the_seed_chooses_which_images_are_used(name):
    train, test = noise(40), noise(10, seed=1)
    first, again, second = (make_detector(name, max_train=10).fit(train, seed=seed).score(test) for seed in (0, 0, 2**32 - 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)


def test_the_training_array_may_change_after_fit(tmp_path):
    train, test = noise(20), noise(4, seed=1)
    detector = make_detector("knn").fit(train)
    before = detector.score(test)
    train[:] = 0
    detector.save(tmp_path / "detector.pt")
    np.testing.assert_array_equal(load_detector(tmp_path / "detector.pt").score(test), before)


def test_chunks_do_not_change_scores(monkeypatch):
    train, test = noise(40), noise(11, seed=1)
    detectors = [make_detector(name).fit(train) for name in NAMES]
    whole = [d.score(test) for d in detectors]
    monkeypatch.setattr(classical, "CHUNK", 3)
    monkeypatch.setattr("ganomaly_plugin.detectors.pixels.CHUNK", 3)
    for detector, expected in zip(detectors, whole, strict=True):
        np.testing.assert_allclose(detector.score(test), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "hparams", "message"),
    [
        ("pca", {"n_components": 0}, "n_components must be at least 1, got 0"),
        ("pca", {"n_components": "many"}, "pca: n_components must be int, got 'many'"),
        ("knn", {"k": 0}, "k must be at least 1"),
        ("knn", {"distance": "median"}, "knn: distance must be one of 'mean', 'kth', got 'median'"),
        ("knn", {"max_train": 0}, "max_train must be at least 1"),
        ("iforest", {"n_estimators": -1}, "n_estimators must be at least 1"),
        ("iforest", {"trees": 9}, "Unknown hyperparameter of iforest 'trees'"),
        ("ocsvm", {"nu": 0.0}, r"nu must lie between 0 and 1, got 0.0"),
        ("ocsvm", {"nu": 1}, "nu must lie between"),
        ("ocsvm", {"nu": float("nan")}, "nu must lie between"),
        ("ocsvm", {"max_train": 1.5}, r"ocsvm: max_train must be int \| None, got 1.5"),
    ],
)
def test_wrong_hyperparameters_are_one_line(name, hparams, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        make_detector(name, **hparams)
    assert "\n" not in str(caught.value)
