"""Pixel AUROC and AUPRO against values worked out by hand, and against another implementation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.integrate import trapezoid

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.pixel_metrics import aupro, pixel_auroc


def reference_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """AUPRO from its definition: at every threshold, the false positive rate and the mean overlap of the regions."""
    regions = []
    for k, mask in enumerate(masks):
        found, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(k, found == label) for label in range(1, count + 1)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        over = maps >= threshold
        rates.append(float((over & ~masks).sum() / (~masks).sum()))
        overlaps.append(float(np.mean([over[k][region].mean() for k, region in regions])))
    grid = np.linspace(0, limit, 20_001)
    return float(trapezoid(np.interp(grid, rates, overlaps), grid)) / limit


def test_by_hand() -> None:
    masks = np.zeros((1, 2, 4), dtype=bool)
    masks[0, :, :2] = True
    maps = np.array([[[8, 7, 6, 1], [5, 4, 3, 2]]], dtype=np.float64)
    assert pixel_auroc(maps, masks) == pytest.approx(14 / 16)  # of 16 pairs, 6 beats 5 and 4
    # Sorted by score the pixels are a a n a a n n n, so the curve goes (0, 1/2), (1/4, 1/2), (1/4, 1), (1, 1):
    assert aupro(maps, masks, fpr_limit=1.0) == pytest.approx(0.25 * 0.5 + 0.75 * 1.0)


def test_perfect_and_inverted_maps() -> None:
    masks = np.zeros((2, 8, 8), dtype=bool)
    masks[0, 2:4, 2:4] = True
    assert pixel_auroc(masks.astype(float), masks) == 1.0
    assert aupro(masks.astype(float), masks) == pytest.approx(1.0)
    assert aupro(-masks.astype(float), masks) == pytest.approx(0.0)


def test_a_small_region_counts_as_much_as_a_large_one() -> None:
    masks = np.zeros((1, 16, 16), dtype=bool)
    masks[0, :8, :8] = True
    masks[0, 15, 15] = True
    maps = np.where(masks, 1.0, 0.0)
    maps[0, 15, 15] = -1.0  # the small one is missed
    assert pixel_auroc(maps, masks) > 0.98
    assert aupro(maps, masks) == pytest.approx(0.5, abs=0.001)


def test_no_rounding_makes_it_more_than_all():
    rng = np.random.default_rng(197)
    n = int(rng.integers(2, 12))
    masks = np.zeros((n, 32, 32), dtype=bool)
    for k in range(n // 2 + 1):
        y, x = rng.integers(0, 24, 2)
        masks[k, y : y + rng.integers(2, 8), x : x + rng.integers(2, 8)] = True
    assert aupro(rng.random(masks.shape).astype(np.float32) + 2 * masks, masks) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_against_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = ndimage.binary_opening(rng.random((3, 24, 24)) > 0.35, structure=np.ones((1, 3, 3)))
    maps = rng.permutation(masks.size).reshape(masks.shape) / masks.size + 0.5 * masks
    assert aupro(maps, masks) == pytest.approx(reference_aupro(maps.astype(np.float32), masks, 0.3), abs=0.001)


@pytest.mark.parametrize(
    ("maps", "masks", "said"),
    [
        (np.zeros((1, 2, 2)), np.zeros((1, 2, 3), bool), "resize the maps"),
        (np.zeros((2, 2)), np.zeros((2, 2), bool), "must be"),
        (np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), "wanted bool"),
        (np.full((1, 2, 2), np.nan), np.eye(2, dtype=bool)[None], "not finite"),
        (np.full((1, 2, 2), np.inf), np.eye(2, dtype=bool)[None], "not finite"),
        (np.zeros((1, 2, 2)), np.zeros((1, 2, 2), bool), "no anomalous pixel"),
        (np.zeros((1, 2, 2)), np.ones((1, 2, 2), bool), "no normal pixel"),
    ],
)
def test_bad_input_is_named(maps: np.ndarray, masks: np.ndarray, said: str) -> None:
    for measure in (pixel_auroc, aupro):
        with pytest.raises(InvalidInput, match=said):
            measure(maps, masks)


def test_the_limit_is_checked() -> None:
    with pytest.raises(InvalidInput, match=r"fpr_limit must be in \(0, 1\]"):
        aupro(np.zeros((1, 2, 2)), np.eye(2, dtype=bool)[None], fpr_limit=0)
