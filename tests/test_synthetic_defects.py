"""The data set of synthetic defects."""

from __future__ import annotations

import numpy as np
import pytest

from ganomaly_plugin.datasets import synthetic_defects
from ganomaly_plugin.datasets.base import ImageDataset, load_dataset
from ganomaly_plugin.datasets.splits import make_split
from ganomaly_plugin.datasets.synthetic_defects import DEFECTS, add_defect, textures
from ganomaly_plugin.errors import InvalidInput


@pytest.mark.parametrize(("options", "tested", "trained"), [({}, 180, 420), ({"base": "digits"}, 389, 907)])
def test_every_test_image_has_a_defective_copy(options, tested, trained):
    dataset = load_dataset("synthetic_defects", image_size=32, **options)
    split = make_split(dataset, "one-anomalous/strict-v1", "defective", 0)
    normal, defective = dataset.images[split.test[~split.is_anomaly]], dataset.images[split.test[split.is_anomaly]]
    assert len(normal) == len(defective) == tested and len(split.train) + len(split.reference) == trained
    changed = (normal != defective).mean((1, 2, 3))
    assert (changed > 0).all() and changed.mean() < 0.3


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_that_cannot_show_is_an_error(kind):
    with pytest.raises(InvalidInput, match=f"No defect of kind {kind} shows on an image with grey levels 0 to 0 only"):
        add_defect(np.zeros((1, 16, 16), np.uint8), kind, np.random.default_rng(0))


def test_a_seed_repeats_and_another_differs():
    one, two = load_dataset("synthetic_defects", image_size=32, seed=1), load_dataset("synthetic_defects", image_size=32)
    assert one.digest != two.digest
    np.testing.assert_array_equal(textures(2, 32, np.random.default_rng(0)), textures(2, 32, np.random.default_rng(0)))


def test_only_training_normals_of_a_real_set_are_used():
    digits = load_dataset("digits", image_size=16)
    split = make_split(digits, "one-anomalous/strict-v1", "0", 0)
    tested = {image.tobytes() for image in digits.images[split.test]}
    made = load_dataset("synthetic_defects", base="digits", image_size=16)
    good = made.images[made.labels == 0]
    allowed = {digits.images[k].tobytes() for k in np.concatenate([split.train, split.reference])}
    assert {image.tobytes() for image in good} <= allowed
    assert not tested & {image.tobytes() for image in good} - allowed


def test_a_large_set_gives_as_many_images_as_a_small_factory_has(tmp_path, monkeypatch):
    rng, asked = np.random.default_rng(0), {}
    images, labels = rng.integers(0, 256, (2600, 1, 16, 16), dtype=np.uint8), np.repeat([0, 1], [2550, 50])

    def load(name, **options):
        asked.update(options, name=name)
        return ImageDataset(name, images, labels, ("functional", "defective"), anomaly_classes=("defective",))

    monkeypatch.setattr(synthetic_defects, "load_dataset", load)
    made = synthetic_defects.load(root=tmp_path, image_size=16, base="elpv", subset="poly", seed=7)
    assert asked == {"name": "elpv", "root": tmp_path, "image_size": 16, "subset": "poly"}
    assert np.bincount(made.labels).tolist() == [2000, 600] and made.source["seed"] == 7


def test_global_defects_by_hand():
    rng = np.random.default_rng(0)
    image = rng.integers(60, 200, (3, 32, 32), dtype=np.uint8)
    for _ in range(5):
        faded = add_defect(image, "faded", rng)
        assert faded.std() < 0.75 * image.std() and abs(faded.mean() - image.mean()) < 1
    flat = np.zeros((3, 32, 32), np.uint8)
    flat[1] = image[1]
    assert not add_defect(flat, "blurred", rng)[[0, 2]].any()  # no channel runs into another
    upright = []
    for _ in range(20):
        changed = (add_defect(image, "band", rng) != image).any(0)
        rows, columns = changed.any(1), changed.any(0)
        assert (changed == np.outer(rows, columns)).mean() > 0.99 and max(rows.mean(), columns.mean()) == 1
        assert min(rows.mean(), columns.mean()) <= 0.3
        upright.append(bool(rows.mean() > columns.mean()))
    assert 0 < sum(upright) < 20


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_leaves_the_original_alone(kind):
    rng = np.random.default_rng(0)
    image = textures(1, 64, rng)[0]
    before = image.copy()
    made = add_defect(image, kind, rng)
    np.testing.assert_array_equal(image, before)
    assert made.shape == image.shape and made.dtype == np.uint8 and (made != image).any()


@pytest.mark.parametrize(("kinds", "count"), [("local", 3), ("global", 4), ("all", 7)])
def test_kinds_choose_the_defects(kinds, count):
    dataset = load_dataset("synthetic_defects", image_size=16, kinds=kinds)
    assert len(dataset.source["defects"].split(", ")) == count
    assert (dataset.labels == 1).sum() == 180


def test_the_default_defects_are_what_they_were():
    dataset = load_dataset("synthetic_defects", image_size=16)
    assert dataset.digest == "ebdc94612bd8346d29564d4a13b2f919d4f8765ae71880c58b326a89d1b22dc2"


def test_an_unknown_base_is_refused():
    with pytest.raises(InvalidInput, match="base must be one of"):
        load_dataset("synthetic_defects", base="moon")
    with pytest.raises(InvalidInput, match="kinds must be one of local, global, all"):
        load_dataset("synthetic_defects", kinds="moon")
