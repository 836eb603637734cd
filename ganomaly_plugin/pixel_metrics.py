"""Measures of anomaly maps against masks: pixel AUROC, and the area under the per-region overlap curve."""

from __future__ import annotations

import warnings

import numpy as np

from ganomaly_plugin.errors import InvalidInput, one_line
from ganomaly_plugin.metrics import auroc

FPR_LIMIT = 0.3  # of AUPRO, as MVTec AD's authors have it


def check_maps(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps as float32 and masks as bool, both `(n, h, w)`.

    Raises:
        InvalidInput: Their shapes differ or are not `(n, h, w)`, a map is not finite, or a kind of pixel is missing.
    """
    maps = np.asarray(maps)
    masks = np.asarray(masks)
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise InvalidInput(
            f"Anomaly maps have shape {maps.shape} and masks {masks.shape}. Both must be (n, h, w): resize the maps."
        )
    if masks.dtype != np.bool_:
        raise InvalidInput(f"Masks have dtype {masks.dtype}; wanted bool, True where a pixel is anomalous.")
    if maps.dtype.kind not in "fiu" or not np.isfinite(maps).all():
        raise InvalidInput("Anomaly maps hold values that are not finite numbers. Look at the detector that made them.")
    if not masks.any() or masks.all():
        kind = "anomalous" if not masks.any() else "normal"
        raise InvalidInput(f"The masks have no {kind} pixel; pixel AUROC and AUPRO need both kinds.")
    return maps.astype(np.float32, copy=False), masks


def pixel_auroc(maps: np.ndarray, masks: np.ndarray) -> float:
    """AUROC in [0, 1] over all pixels of all images, anomalous pixels positive.

    Large defects count for more than small ones: see `aupro`.

    Args:
        maps: `(n, h, w)`, higher is more anomalous.
        masks: bool `(n, h, w)`.

    Raises:
        InvalidInput: See `check_maps`.
    """
    maps, masks = check_maps(maps, masks)
    return auroc(masks.reshape(-1), maps.reshape(-1))


def aupro(maps: np.ndarray, masks: np.ndarray, fpr_limit: float = FPR_LIMIT) -> float:
    """Area under the per-region overlap curve up to a false positive rate, divided by it: in [0, 1].

    Each connected region of a mask counts the same, whatever its size. Bergmann et al., "MVTec AD", IJCV 2021,
    computed by anomalib's `AUPRO`.

    Args:
        maps: `(n, h, w)`, higher is more anomalous.
        masks: bool `(n, h, w)`.
        fpr_limit: In (0, 1].

    Raises:
        InvalidInput: See `check_maps`; `fpr_limit` is out of range; or anomalib is not installed.
    """
    maps, masks = check_maps(maps, masks)
    if not 0 < fpr_limit <= 1:
        raise InvalidInput(f"fpr_limit must be in (0, 1], got {fpr_limit}.")
    try:
        from anomalib.metrics.aupro import _AUPRO
    except ImportError as error:
        raise InvalidInput(f"AUPRO needs anomalib: {one_line(error)}. Run pip install anomalib.") from error
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchmetrics, about keeping all maps, which AUPRO needs
        metric = _AUPRO(fpr_limit=fpr_limit)
        metric.update(torch.from_numpy(np.ascontiguousarray(maps)), torch.from_numpy(masks.astype(np.float32)))
        return min(1.0, max(0.0, float(metric.compute())))  # of float32, which rounds beyond them
