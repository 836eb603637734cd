"""The protocols, by hand-counted sizes and by what must never happen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ganomaly_plugin.datasets.base import ImageDataset, resize
from ganomaly_plugin.datasets.splits import PROTOCOLS, Split, leaked, make_split
from ganomaly_plugin.errors import InvalidInput

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
PAPER, STRICT, NORMAL = "one-anomalous/paper-v1", "one-anomalous/strict-v1", "one-normal/strict-v1"


def labelled(train: list[int], test: list[int] | None = None, **options: Any) -> ImageDataset:
    """A data set of 1×1 images with the given number of images of each class."""
    labels = np.repeat(np.arange(len(train)), train)
    is_test = None
    if test is not None:
        is_test = np.repeat([False, True], [sum(train), sum(test)])
        labels = np.concatenate([labels, np.repeat(np.arange(len(test)), test)])
    images = (np.arange(len(labels)) % 256).astype(np.uint8).reshape(-1, 1, 1, 1)
    classes = options.pop("classes", tuple(str(k) for k in range(len(train))))
    return ImageDataset("made", images, labels, classes, is_test, **options)


MNIST = labelled(MNIST_TRAIN, MNIST_TEST)
CIFAR = labelled([5000] * 10, [1000] * 10)
PLAIN = labelled([50, 40, 30])


def sizes(split: Any) -> tuple[int, int, int, int]:
    anomalous = int(split.is_anomaly.sum())
    return len(split.train), len(split.reference), len(split.test) - anomalous, anomalous


@pytest.mark.parametrize(
    ("dataset", "protocol", "category", "want"),
    [
        (MNIST, PAPER, "0", (50_477, 0, 12_620, 6_903)),
        (CIFAR, PAPER, "3", (43_200, 0, 10_800, 6_000)),
        (MNIST, STRICT, "0", (48_670, 5_407, 9_020, 980)),  # 54,077 training normals less a tenth
        (CIFAR, STRICT, "3", (40_500, 4_500, 9_000, 1_000)),
        (CIFAR, NORMAL, "3", (4_500, 500, 1_000, 9_000)),
        (PLAIN, PAPER, "2", (72, 0, 18, 30)),
        (PLAIN, STRICT, "2", (65, 7, 18, 6)),  # a fifth of each class is the test part
        (PLAIN, NORMAL, "2", (22, 2, 6, 18)),
    ],
)
def test_sizes(dataset: ImageDataset, protocol: str, category: str, want: tuple[int, int, int, int]) -> None:
    assert sizes(make_split(dataset, protocol, category, 0)) == want


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dataset", [PLAIN, labelled([20, 20, 20], [9, 9, 9])], ids=["plain", "official"])
@pytest.mark.parametrize("options", [{}, {"train_fraction": 0.5}, {"contamination": 0.05}])
def test_nothing_is_in_two_parts(dataset: ImageDataset, protocol: str, options: dict[str, float]) -> None:
    for seed in range(3):
        split = make_split(dataset, protocol, "1", seed, **options)
        parts = np.concatenate([split.train, split.reference, split.test])
        assert len(np.unique(parts)) == len(parts)
        is_one = dataset.labels[split.test] == 1
        anomalous = is_one if PROTOCOLS[protocol].category_is == "anomalous" else ~is_one
        assert np.array_equal(split.is_anomaly, anomalous)
        trained = dataset.labels[split.train] == 1
        wrong = trained if PROTOCOLS[protocol].category_is == "anomalous" else ~trained
        assert wrong.sum() == split.contaminating
        assert (split.contaminating > 0) == ("contamination" in options)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_official_test_part_is_not_trained_on(protocol: str) -> None:
    if "strict" in protocol:
        split = make_split(MNIST, protocol, "4", 0, contamination=0.1)
        assert not MNIST.is_test[np.concatenate([split.train, split.reference])].any()
        assert len(split.test) == 10_000


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_digest_is_stable_and_sensitive(protocol: str) -> None:
    def digest(dataset: ImageDataset = PLAIN, category: str = "1", seed: int = 0, **options: float) -> str:
        return make_split(dataset, protocol, category, seed, **options).digest

    pixels = PLAIN.images.copy()
    pixels[7] ^= 1
    changed = ImageDataset("made", pixels, PLAIN.labels, PLAIN.classes)
    different = [
        digest(),
        digest(seed=1),
        digest(category="0"),
        digest(changed),
        digest(train_fraction=0.5),
        digest(train_fraction=0.4999),
        digest(contamination=0.1),
        digest(contamination=0.2),
    ]
    assert len(set(different)) == len(different)
    assert digest() == digest(train_fraction=1.0, contamination=0.0) == different[0]


def test_default_digests_are_those_of_the_first_release() -> None:
    """Recorded from commit fd4ea3d, before there were shares: old records stay comparable."""
    recorded = {PAPER: "550077405cfe6299", STRICT: "de58a26271fe1416", NORMAL: "3fabb47c2b81628d"}
    assert {protocol: make_split(PLAIN, protocol, "1", 3).digest for protocol in PROTOCOLS} == recorded


def test_a_smaller_fraction_is_a_subset() -> None:
    whole = make_split(CIFAR, STRICT, "0", 5)
    half = make_split(CIFAR, STRICT, "0", 5, train_fraction=0.5)
    tenth = make_split(CIFAR, STRICT, "0", 5, train_fraction=0.1)
    assert (len(half.train), len(tenth.train)) == (20_250, 4_050)
    assert set(tenth.train) < set(half.train) < set(whole.train)
    assert np.array_equal(half.test, whole.test)
    assert np.array_equal(half.reference, whole.reference)
    assert set(tenth.train) != set(make_split(CIFAR, STRICT, "0", 6, train_fraction=0.1).train)
    assert len(make_split(PLAIN, STRICT, "0", 0, train_fraction=1e-9).train) == 1


def test_contamination_comes_from_the_training_part_when_it_can() -> None:
    split = make_split(CIFAR, STRICT, "0", 0, contamination=0.1)
    assert sizes(split) == (45_000, 4_500, 9_000, 1_000)  # 4,500 anomalies are a tenth of 45,000
    assert split.contaminating == 4_500
    assert (CIFAR.labels[split.train] == 0).sum() == 4_500


def test_contamination_leaves_the_test_part_otherwise() -> None:
    clean = make_split(MNIST, PAPER, "0", 0)
    split = make_split(MNIST, PAPER, "0", 0, contamination=0.05)
    moved = 2_657  # 50,477 · 0.05 / 0.95
    assert sizes(split) == (50_477 + moved, 0, 12_620, 6_903 - moved)
    assert set(split.train) - set(clean.train) == set(clean.test) - set(split.test)
    assert np.array_equal(clean.test[np.isin(clean.test, split.test)], split.test)  # in the same order

    normal_only = labelled([100, 0], [20, 12])
    split = make_split(normal_only, STRICT, "1", 0, contamination=0.1)
    assert sizes(split) == (100, 10, 20, 2)


def test_contamination_is_a_share_of_the_reduced_training_set() -> None:
    split = make_split(CIFAR, STRICT, "0", 0, train_fraction=0.1, contamination=0.25)
    assert (len(split.train), split.contaminating) == (5_400, 1_350)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_fraction": 0.0}, r"train_fraction must be in \(0, 1\]"),
        ({"train_fraction": 1.1}, "train_fraction"),
        ({"train_fraction": float("nan")}, "train_fraction"),
        ({"contamination": -0.1}, r"contamination must be in \[0, 0.5\]"),
        ({"contamination": 0.6}, "contamination"),
        ({"contamination": 1e-6}, r"contamination=1e-06 of \d+ training images is less than one .* Take at least 0.0\d+, or 0"),
        ({"contamination": float("nan")}, "contamination"),
    ],
)
def test_shares_are_checked(options: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        make_split(PLAIN, STRICT, "0", 0, **options)


@pytest.mark.parametrize("seed", [None, -1, 1.0, "0", True, 2**32])
def test_seeds_are_whole_numbers(seed: object) -> None:
    with pytest.raises(InvalidInput, match="seed must be a whole number from 0 to 4294967295, got"):
        make_split(PLAIN, STRICT, "0", seed)  # type: ignore[arg-type]


def test_too_few_anomalies_say_how_many_there_are() -> None:
    few = labelled([100, 0], [20, 3])
    with pytest.raises(InvalidInput, match=r"needs 10 anomalies to train on, and there are 2 to spare .*Take at most 0.021"):
        make_split(few, STRICT, "1", 0, contamination=0.1)
    assert make_split(few, STRICT, "1", 0, contamination=0.021).contaminating == 2
    with pytest.raises(InvalidInput, match=r"there is none to spare .*Leave this class out"):
        make_split(labelled([100, 0], [20, 1]), STRICT, "1", 0, contamination=0.1)


@pytest.mark.parametrize("protocol", [STRICT, PAPER])
def test_other_defects_take_no_part(protocol: str) -> None:
    dataset = labelled([60, 5, 7], [20, 10, 8], classes=("good", "crack", "dirt"), anomaly_classes=("crack", "dirt"))
    split = make_split(dataset, protocol, "crack", 0)
    used = dataset.labels[np.concatenate([split.train, split.reference, split.test])]
    assert 2 not in used
    assert sizes(split)[2:] == ((20, 10) if protocol == STRICT else (16, 15))
    with pytest.raises(InvalidInput, match="Unknown class"):
        make_split(dataset, protocol, "good", 0)


def test_good_against_all_defects() -> None:
    dataset = labelled([60, 5, 7], [20, 10, 8], classes=("good", "crack", "dirt"), anomaly_classes=("crack", "dirt"))
    assert sizes(make_split(dataset, NORMAL, "good", 0)) == (54, 6, 20, 18)


def test_too_few_of_a_kind_to_test_a_fifth_of_says_so() -> None:
    with pytest.raises(InvalidInput, match=r"no anomalous image .*: a fifth of each class is tested, and 2 are too few"):
        make_split(labelled([20, 2]), STRICT, "1", 0)
    with pytest.raises(InvalidInput, match=r"no anomalous image \(made, class 1, one-anomalous/strict-v1\); AUROC"):
        make_split(labelled([20, 2], [5, 0]), STRICT, "1", 0)
    assert sizes(make_split(labelled([20, 2]), PAPER, "1", 0)) == (16, 0, 4, 2)


def test_leaked_are_the_tested_images_that_were_trained_on() -> None:
    pixels = np.array([1, 1, 2, 3, 1, 1, 1, 3, 4], np.uint8).reshape(-1, 1, 1, 1)
    dataset = ImageDataset("made", pixels, np.zeros(9, np.int64), ("a",))
    none = np.empty(0, np.int64)
    split = Split(np.arange(4), none, np.arange(4, 9), np.zeros(5, bool))
    assert leaked(dataset, split) == 4  # three copies of one that was trained on twice, and one of another


def test_the_digest_of_a_data_set_tells_which_images_are_for_tests() -> None:
    one, other = (labelled([3], [2]), labelled([2], [3]))
    assert (one.images == other.images).all() and (one.labels == other.labels).all()
    assert len({one.digest, other.digest, labelled([5]).digest}) == 3


def test_images_are_antialiased_when_they_shrink() -> None:
    stripes = np.zeros((2, 1, 32, 32), np.uint8)
    stripes[..., ::4] = 255  # no pixel that is left lies on one
    small = resize(stripes, 8)
    assert small.shape == (2, 1, 8, 8) and np.abs(small[..., 1:-1].astype(int) - 255 // 4).max() < 12
    assert resize(stripes, 32) is stripes and resize(stripes, 64).max() == 255
