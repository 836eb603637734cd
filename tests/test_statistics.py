"""The statistics against SciPy, scikit-posthocs and Demšar's worked example; refusals where n is too small."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.metrics import auroc
from ganomaly_plugin.report.statistics import (
    JobScores,
    friedman,
    holm,
    image_interval,
    seed_interval,
    weighted_aurocs,
    wilcoxon_pairs,
)

# Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7, 2006, table 6: AUC of C4.5 and variants.
NAMES = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
DEMSAR = np.array(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],  # both print as .975; the paper's average ranks are those of the third being better
        [0.957, 0.978, 0.946, 0.970],
    ]
)


def test_friedman_and_nemenyi_as_demsar_has_them() -> None:
    found = friedman(NAMES, DEMSAR, ties=False)
    assert [round(rank, 3) for rank in found.ranks.values()] == [3.143, 2.000, 2.893, 1.964]
    assert found.chi2 == pytest.approx(9.28, abs=0.005) and found.f == pytest.approx(3.69, abs=0.005) and found.p < 0.05
    assert found.critical_difference == pytest.approx(1.25, abs=0.005)  # q = 2.569


def test_friedman_against_scipy_and_scikit_posthocs() -> None:
    posthocs = pytest.importorskip("scikit_posthocs")
    found = friedman(NAMES, DEMSAR)
    assert found.chi2 == pytest.approx(stats.friedmanchisquare(*DEMSAR.T).statistic)
    np.testing.assert_allclose(found.p_pairs, posthocs.posthoc_nemenyi_friedman(DEMSAR).to_numpy(), atol=1e-6)
    lower = friedman(NAMES, -DEMSAR, higher_is_better=False)
    assert lower.ranks == found.ranks


def test_friedman_is_refused_for_few_data_sets() -> None:
    with pytest.raises(InvalidInput, match="got 4 on 5"):
        friedman(NAMES, DEMSAR[:5])
    with pytest.raises(InvalidInput, match="got 2 on 14"):
        friedman(NAMES[:2], DEMSAR[:, :2])
    same = friedman(NAMES, np.ones((8, 4)))
    assert same.chi2 == pytest.approx(0) and same.p == pytest.approx(1)


def test_wilcoxon_as_demsar_has_it() -> None:
    """Section 3.1.3: C4.5 against C4.5+m over the same 14 data sets, R- = 93 and R+ = 12, significant at 0.05."""
    difference = DEMSAR[:, 1] - DEMSAR[:, 0]
    unequal = difference[difference != 0]
    (pair,) = wilcoxon_pairs({"plain": DEMSAR[:, 0], "m": DEMSAR[:, 1]}, [("m", "plain")])
    assert (pair.wins_a, pair.wins_b) == (10, 2) and pair.p < 0.05 and pair.p_holm == pair.p
    ranks = stats.rankdata(np.abs(unequal))
    signs = np.array(list(itertools.product([-1, 1], repeat=len(unequal))))
    assert pair.p == np.mean(np.abs(signs @ ranks) >= abs(np.sign(unequal) @ ranks))  # all orders of signs, counted


def test_of_a_measure_that_had_better_be_low_the_lower_wins() -> None:
    values = {"a": [0.1] * 6, "b": [0.3] * 6}
    (pair,) = wilcoxon_pairs(values, [("a", "b")], higher_is_better=False)
    assert (pair.wins_a, pair.wins_b) == (6, 0) and pair.difference == pytest.approx(-0.2)


def test_ties_between_many_classes_leave_wilcoxon_exact() -> None:
    (pair,) = wilcoxon_pairs({"a": [1.0] * 15 + [0.9, 0.8, 0.7, 0.6, 0.5], "b": [1.0] * 15 + [0.0] * 5}, [("a", "b")])
    assert (pair.wins_a, pair.wins_b, pair.p) == (5, 0, 2 / 2**5)


def test_what_differs_by_rounding_alone_is_level() -> None:
    a, b = [0.1 + 0.2, *np.arange(7) / 10], [0.3, *np.arange(1, 8) / 10]  # seven differences of -0.1, and none
    assert a[0] != b[0] and len(set(np.subtract(a, b))) > 2
    (pair,) = wilcoxon_pairs({"a": a, "b": b}, [("a", "b")])
    assert (pair.wins_a, pair.wins_b, pair.p) == (0, 7, 2 / 2**7)
    ranks = friedman(["a", "b", "c"], np.array([[0.1 + 0.2, 0.3, 0.4]] * 6)).ranks
    assert ranks == {"a": 2.5, "b": 2.5, "c": 1.0}


def test_wilcoxon_is_exact_and_refused_for_few_classes() -> None:
    values = {"a": np.arange(6) + 1.0, "b": np.zeros(6), "c": np.zeros(6)}
    pairs = wilcoxon_pairs(values, [("a", "b"), ("a", "c"), ("b", "c")])
    assert pairs[0].p == pytest.approx(2 / 2**6) and pairs[0].p_holm == pytest.approx(3 * 2 / 2**6)
    assert pairs[-1].p == 1.0  # no difference at all
    with pytest.raises(InvalidInput, match=r"got 5: the smallest p that 5 can give is 0\.0625"):
        wilcoxon_pairs({name: each[:5] for name, each in values.items()}, [("a", "b")])


def test_holm_by_hand_and_against_statsmodels() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).random(20) ** 3
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method="holm")[1])


def test_weights_are_how_often_an_image_is_there() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(40) < 0.4
    score = np.round(rng.normal(truth, 1), 1)  # with ties
    weights = rng.integers(0, 4, (5, 40))
    for found, times in zip(weighted_aurocs(truth, score, weights.T), weights, strict=True):
        assert found == pytest.approx(auroc(np.repeat(truth, times), np.repeat(score, times)))
    assert np.isnan(weighted_aurocs(truth, score, truth[:, None].astype(float))).all()


def scores_of(truth: np.ndarray, score: np.ndarray, first: int = 0, source: str = "") -> JobScores:
    return JobScores(first + np.arange(len(truth)), truth, score, source)


def test_image_interval_against_scipy() -> None:
    rng = np.random.default_rng(1)
    normal, anomalous = rng.normal(0, 1, 80), rng.normal(1, 1, 40)
    truth, score = np.r_[np.zeros(80, bool), np.ones(40, bool)], np.r_[normal, anomalous]

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return (np.moveaxis(a, axis, -1)[..., :, None] > np.moveaxis(b, axis, -1)[..., None, :]).mean((-1, -2))

    theirs = stats.bootstrap((anomalous, normal), statistic, n_resamples=2000, method="percentile", rng=2, batch=200)
    ours = image_interval([[scores_of(truth, score)]])
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.012)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.012)
    width = ours.high - ours.low
    for jobs in ([[scores_of(truth, score)] * 2], [[scores_of(truth, score)]] * 4):  # seeds, or classes, of the same images
        again = image_interval(jobs)
        assert again.high - again.low == pytest.approx(width)
    backwards = JobScores(np.arange(120)[::-1], truth[::-1], score[::-1])  # the same images in another order
    assert image_interval([[backwards]]) == ours
    for jobs in (
        [[scores_of(truth, score, 1000 * k)] for k in range(4)],
        [[scores_of(truth, score, 0, str(k))] for k in range(4)],
    ):
        four = image_interval(jobs)  # classes of other images do tell more
        assert (four.high - four.low) / width == pytest.approx(0.5, abs=0.08)
    with pytest.raises(InvalidInput, match="one kind is missing"):
        image_interval([[scores_of(np.ones(4, dtype=bool), np.arange(4.0))]])


@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_image_interval_covers_the_truth(shared: float) -> None:
    """Each of three classes is the anomaly once, and an image that looks odd looks odd to the detectors of all three."""
    rng, hits = np.random.default_rng(5), 0
    label = np.repeat(np.arange(3), 40)
    expected = stats.norm.cdf(1 / np.sqrt(2) / np.sqrt(1 + shared**2))
    for k in range(100):
        oddity = shared * rng.normal(size=len(label))
        jobs = [[scores_of(label == c, rng.normal(label == c, 1) + oddity)] for c in range(3)]
        interval = image_interval(jobs, replicates=300, seed=k)
        hits += interval.low <= expected <= interval.high
    assert 88 <= hits <= 100


def test_seed_interval() -> None:
    assert seed_interval([0.5]) is None
    three = seed_interval([0.90, 0.92, 0.94])
    assert three is not None and three.method.startswith("Student")
    theirs = stats.ttest_1samp([0.90, 0.92, 0.94], 0).confidence_interval(0.95)
    assert (three.low, three.high) == pytest.approx((theirs.low, theirs.high))
    values = np.random.default_rng(0).normal(size=20)
    many = seed_interval(list(values))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert many is not None and many.method.startswith("bootstrap")
    assert (many.low, many.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
