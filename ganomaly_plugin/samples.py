"""A few test images of a job, with reconstructions and anomaly maps, kept small for the report: never part of a result."""

from __future__ import annotations

from typing import Any

import numpy as np

from ganomaly_plugin.datasets.base import resize
from ganomaly_plugin.errors import InvalidInput

COUNT = 4  # of each kind
SIDE = 64  # pixels, at most
KINDS = ("most anomalous", "least anomalous", "missed anomalies", "false alarms")


def choose(is_anomaly: np.ndarray, score: np.ndarray, count: int = COUNT) -> dict[str, np.ndarray]:
    """Positions of the highest and lowest scores, the lowest of the anomalies and the highest of the normal images."""
    order = np.argsort(score, kind="stable")
    return {
        KINDS[0]: order[::-1][:count],
        KINDS[1]: order[:count],
        KINDS[2]: order[is_anomaly[order]][:count],
        KINDS[3]: order[~is_anomaly[order]][::-1][:count],
    }


def sample(detector: Any, test: np.ndarray, is_anomaly: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray]:
    """Thumbnails of the images that a reader wants to see, or {} for a detector without a map.

    Args:
        detector: Fitted.
        test: All test images, uint8 `(n, c, h, w)`: with batch statistics an image is seen with its whole batch.
        is_anomaly: bool `(n,)`.
        score: `(n,)`.

    Returns:
        `position` and `kind` `(m,)`; `input` and, of methods that reconstruct, `reconstruction`, uint8 `(m, c, s, s)`;
        `map`, uint8 `(m, s, s)`, from 0 or the least value of the sample to its largest, which lies `map_scale` above.
    """
    if not getattr(detector, "has_anomaly_map", False):
        return {}
    chosen = choose(is_anomaly, score)
    position = np.concatenate(list(chosen.values()))
    seen = _with_their_batches(detector, np.unique(position), len(test))
    at = np.searchsorted(seen, position)
    maps = np.asarray(detector.anomaly_map(test[seen]), dtype=np.float32)
    if maps.shape != (len(seen), *test.shape[2:]) or not np.isfinite(maps).all():
        raise InvalidInput(f"anomaly_map gave {maps.shape}, or numbers that are not finite; wanted one a pixel of (n, h, w).")
    maps = maps[at]
    least = min(0.0, float(maps.min()))  # a map may lie below zero, as log-likelihoods do
    span = float(maps.max()) - least
    found = {
        "position": position,
        "kind": np.repeat(np.arange(len(KINDS)), [len(part) for part in chosen.values()]),
        "input": _shrink(test[position]),
        "map": _shrink((255 * np.clip((maps - least) / (span or 1), 0, 1)).astype(np.uint8)[:, None])[:, 0],
        "map_scale": np.array(span),
    }
    if getattr(detector, "has_reconstruction", False):
        made = detector.reconstruct(test[seen])[at]
        found["reconstruction"] = _shrink((np.clip((made + 1) / 2, 0, 1) * 255).round().astype(np.uint8))
    return found


def _with_their_batches(detector: Any, position: np.ndarray, n: int) -> np.ndarray:
    """Sorted positions of the images to pass, so that each is in the batch in which it was scored."""
    hparams = getattr(detector, "hparams", {})
    if hparams.get("batchnorm") != "batch":
        return position
    size = int(hparams["batch_size"])
    starts = np.unique(position // size) * size  # a last short batch stays last
    return np.concatenate([np.arange(start, min(start + size, n)) for start in starts])


def _shrink(images: np.ndarray) -> np.ndarray:
    """uint8 `(n, c, h, w)`, at most SIDE pixels wide."""
    return resize(np.ascontiguousarray(images), SIDE) if max(images.shape[-2:]) > SIDE else images
