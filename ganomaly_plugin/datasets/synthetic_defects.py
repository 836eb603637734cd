"""Normal images with seeded synthetic defects: a set to choose methods on without seeing one real anomaly.

Every test image comes twice, as it is and with a defect: a local one (a thin crack, a soft dark patch, a piece of another
place), or one of a large part or the whole of the image (its brightness, its contrast, its sharpness, a band across it).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from ganomaly_plugin.datasets.base import ImageDataset, load_dataset
from ganomaly_plugin.datasets.splits import make_split
from ganomaly_plugin.errors import InvalidInput

BASES = ("textures", "elpv", "digits", "mnist", "fashion_mnist")
TEST_SHARE = 0.3  # of the normal images; the others are for training
LOCAL = ("crack", "patch", "moved")
GLOBAL = ("shaded", "faded", "blurred", "band")
DEFECTS = LOCAL + GLOBAL
KINDS = {"local": LOCAL, "global": GLOBAL, "all": DEFECTS}
_TEXTURES = 600
_TRIES = 1000  # of a defect that does not show where it falls, such as a shadow on black


def load(
    *,
    root: Path,
    image_size: int = 64,
    base: str = "textures",
    subset: str = "mono",
    kinds: str = "local",
    seed: int = 0,
) -> ImageDataset:
    """Good images of `base`, and copies of the test images among them with one synthetic defect each.

    Of a real data set only normal images of the strict protocol's training part are used, so that nothing chosen on
    this set has seen a test image, let alone a real anomaly. Take a strict protocol: `one-anomalous/paper-v1` pools the
    normal images, and would train on some of which defective copies are tested.

    Args:
        root: The data root of the base.
        image_size: Side of the images, pixels; defects are made at that size.
        base: "textures" (procedural: smooth noise and a grid), "elpv" (solar cells), "digits", "mnist" or
            "fashion_mnist".
        subset: Of "elpv": "mono", "poly" or "all".
        kinds: Which defects: "local", "global" or "all".
        seed: Of the textures, of who is tested, and of the defects.

    Raises:
        InvalidInput: An option is not allowed, or the base is not there.
    """
    if base not in BASES:
        raise InvalidInput(f"base must be one of {', '.join(BASES)}, got {base!r}.")
    if kinds not in KINDS:
        raise InvalidInput(f"kinds must be one of {', '.join(KINDS)}, got {kinds!r}.")
    defects = KINDS[kinds]
    rng = np.random.default_rng([seed, 6])
    good = textures(_TEXTURES, image_size, rng) if base == "textures" else _training_normals(base, root, image_size, subset)
    order = rng.permutation(len(good))
    n_test = round(TEST_SHARE * len(good))
    tested = good[order[:n_test]]
    defective = np.stack([add_defect(image, defects[k % len(defects)], rng) for k, image in enumerate(tested)])
    images = np.concatenate([good[order[n_test:]], tested, defective])
    labels = np.repeat([0, 1], [len(good), n_test])
    is_test = np.arange(len(images)) >= len(good) - n_test
    source = {"base": base, "defects": ", ".join(defects), "seed": seed}
    return ImageDataset("synthetic_defects", images, labels, ("good", "defective"), is_test, ("defective",), source=source)


def _training_normals(base: str, root: Path, image_size: int, subset: str) -> np.ndarray:
    options = {"subset": subset} if base == "elpv" else {}
    dataset = load_dataset(base, root=root, image_size=image_size, **options)
    if base == "elpv":
        split = make_split(dataset, "one-anomalous/strict-v1", "defective", 0)
    else:  # all classes but the first are normal
        split = make_split(dataset, "one-anomalous/strict-v1", dataset.classes[0], 0)
    chosen = np.sort(np.concatenate([split.train, split.reference]))
    if len(chosen) > 2000:  # as many as a small factory set has, and a little more
        chosen = np.sort(np.random.default_rng([0, 7]).permutation(chosen)[:2000])
    return dataset.images[chosen]


def textures(n: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Grey images uint8 `(n, 1, side, side)`: smooth noise, a grid of lines, and a brightness of their own."""
    spectrum = np.fft.rfft2(rng.normal(size=(n, side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    noise = np.fft.irfft2(spectrum / (frequency + 1 / side), s=(side, side))
    noise /= noise.std((1, 2), keepdims=True)
    phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    rows = np.cos(2 * np.pi * np.arange(side)[None, :, None] * 4 / side + phase)
    level, contrast = rng.uniform(110, 170, (n, 1, 1)), rng.uniform(8, 16, (n, 1, 1))
    return (level + contrast * noise + 12 * rows).round().clip(0, 255).astype(np.uint8)[:, None]


def add_defect(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """A copy of the uint8 image `(c, s, s)` with one defect of `kind` (of DEFECTS) drawn from `rng`, until one shows.

    Raises:
        InvalidInput: None does, as on an image that is black all over.
    """
    for _ in range(_TRIES):
        made = _MAKERS[kind](image.astype(np.float64), rng).round().clip(0, 255).astype(np.uint8)
        if not np.array_equal(made, image):
            return made
    raise InvalidInput(f"No defect of kind {kind} shows on an image with grey levels {image.min()} to {image.max()} only.")


def _crack(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = image.shape[-1]
    length = int(rng.uniform(0.3, 0.9) * side)
    place, heading = rng.uniform(0.15, 0.85, 2) * side, rng.uniform(0, 2 * np.pi)
    mask = np.zeros((side, side), dtype=bool)
    for _ in range(2 * length):  # steps of half a pixel
        heading += rng.normal(0, 0.15)
        place = place + 0.5 * np.array([np.sin(heading), np.cos(heading)])
        row, column = (int(value) for value in place)
        if not (0 <= row < side and 0 <= column < side):
            break
        width = max(1, side // 64)
        mask[row : row + width, column : column + width] = True
    return np.where(mask, image * rng.uniform(0.3, 0.7), image)


def _patch(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = image.shape[-1]
    y, x = np.mgrid[:side, :side]
    cy, cx = rng.uniform(0, side, 2)
    ry, rx = rng.uniform(0.06, 0.25, 2) * side
    depth = np.clip(1.5 - np.hypot((y - cy) / ry, (x - cx) / rx), 0, 1)  # 1 inside, soft edge
    return image * (1 - rng.uniform(0.3, 0.7) * depth)


def _moved(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = image.shape[-1]
    h, w = (int(value) for value in rng.uniform(0.15, 0.4, 2) * side)
    (top, to_top), (left, to_left) = rng.integers(0, side - h, 2), rng.integers(0, side - w, 2)
    moved = image.copy()
    piece = image[:, top : top + h, left : left + w]
    moved[:, to_top : to_top + h, to_left : to_left + w] = np.rot90(piece, 2, (1, 2)) * rng.uniform(0.75, 1.1)
    return moved


def _shaded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = image.shape[-1]
    y, x = np.mgrid[:side, :side] / side - 0.5
    heading = rng.uniform(0, 2 * np.pi)
    ramp = np.clip(0.5 + rng.uniform(0, 2) * (np.cos(heading) * y + np.sin(heading) * x), 0, 1)  # flat to half the image
    factor = rng.uniform(0.7, 0.9) if rng.random() < 0.7 else rng.uniform(1.1, 1.3)
    return image * (1 + (factor - 1) * 2 * ramp).clip(0.1)


def _faded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mean = image.mean((1, 2), keepdims=True)
    return mean + (image - mean) * rng.uniform(0.3, 0.7)


def _blurred(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    radius = rng.uniform(0.015, 0.04) * image.shape[-1]
    return gaussian_filter(image, (0, radius, radius))


def _band(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = image.shape[-1]
    height = max(1, int(rng.uniform(0.05, 0.3) * side))
    top = int(rng.integers(0, side - height))
    upright = bool(rng.random() < 0.5)
    made = image.swapaxes(1, 2).copy() if upright else image.copy()
    made[:, top : top + height] *= rng.uniform(0.4, 0.8)
    return made.swapaxes(1, 2) if upright else made


_MAKERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "crack": _crack,
    "patch": _patch,
    "moved": _moved,
    "shaded": _shaded,
    "faded": _faded,
    "blurred": _blurred,
    "band": _band,
}
