"""Checks of what a detector takes and refuses: array types, shapes, sizes and bad images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ganomaly_plugin.conformance.subject import (
    Check,
    Failed,
    Subject,
    as_float,
    expect_equal,
    expect_scores,
    normals,
    refusal,
)


def keeps_input(subject: Subject) -> str:
    """`fit` and `score` leave the arrays they are given as they were."""
    for convert in (np.copy, as_float):
        train, test = convert(subject.train), convert(subject.test)
        subject.fit(train).score(test)
        for name, array, original in (("fit", train, subject.train), ("score", test, subject.test)):
            if not np.array_equal(array, convert(original)):
                raise Failed(f"expected {name} to leave its {array.dtype} images untouched, got them changed")
    return "uint8 and float32 untouched"


def accepts_read_only(subject: Subject) -> str:
    """Read-only arrays, such as memory maps, are taken."""
    for images in (subject.train, as_float(subject.train)):
        images.flags.writeable = False
        expect_scores(subject.fit(images).score(images), len(images))
    return "uint8 and float32"


def uint8_equals_float(subject: Subject) -> str:
    """uint8 images and the equal float images in [-1, 1] give equal scores."""
    images = as_float(subject.test)
    expect_equal(subject.scores, subject.fitted.score(images), "float32 images", tolerance=1e-3)
    expect_equal(subject.scores, subject.fitted.score(images.astype(np.float64)), "float64 images", tolerance=1e-3)
    expect_scores(subject.fit(as_float(subject.train)).score(images), len(images), "fitted on float32 images")
    return "equal"


def channels(subject: Subject) -> str:
    """Grey and colour images are taken."""
    _, height, width = subject.shape
    for c in (1, 3):
        _fits(subject, (c, height, width))
    return "1 and 3"


def sizes(subject: Subject) -> str:
    """Images of 16, 32 and 64 pixels a side are taken."""
    for side in (16, 32, 64):
        _fits(subject, (subject.shape[0], side, side))
    return "16, 32, 64"


def _fits(subject: Subject, chw: tuple[int, int, int]) -> None:
    what = "×".join(map(str, chw))
    try:
        scores = subject.fit(normals(2 * subject.batch, chw, seed=9)).score(normals(4, chw, seed=10))
    except Exception as error:
        raise Failed(f"expected images of {what} to be taken, got {type(error).__name__}: {error}") from error
    expect_scores(scores, 4, f"score of {what} images")


def last_batch_of_one(subject: Subject) -> str:
    """A last batch of a single image is no trouble, in training or scoring."""
    images = normals(2 * subject.batch + 1, subject.shape, seed=11)
    expect_scores(subject.fit(images).score(images), len(images))
    return f"{len(images)} images in batches of {subject.batch}"


def small_training_set(subject: Subject) -> str:
    """Fewer training images than a batch are enough."""
    n = max(2, subject.batch // 2)
    expect_scores(subject.fit(normals(n, subject.shape, seed=12)).score(subject.test.copy()), len(subject.test))
    return f"{n} images, batch {subject.batch}"


def one_training_image(subject: Subject) -> str:
    """A single training image works or is refused clearly."""
    one = normals(1, subject.shape, seed=13)
    detector = subject.make()
    try:
        detector.fit(one, seed=0, epochs=1, device=subject.device)
    except Exception:
        return "refused: " + refusal(lambda: subject.fit(one), "fit on one image")
    expect_scores(detector.score(subject.test.copy()), len(subject.test))
    return "works"


def refuses_unfitted(subject: Subject) -> str:
    """`score` and `save` before `fit` are refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.pt"
        refusal(lambda: subject.make().save(str(path)), "save before fit")
    return refusal(lambda: subject.make().score(subject.test.copy()), "score before fit")


def refuses_wrong_channels(subject: Subject) -> str:
    """Images of other channels than it was fitted on are refused."""
    c, height, width = subject.shape
    images = normals(4, (3 if c == 1 else 1, height, width), seed=14)
    return refusal(lambda: subject.fitted.score(images), f"score of {images.shape[1]} channels, fitted on {c}")


def refuses_wrong_size(subject: Subject) -> str:
    """Images of another size than it was fitted on are refused."""
    c, height, width = subject.shape
    images = normals(4, (c, 2 * height, 2 * width), seed=14)
    return refusal(lambda: subject.fitted.score(images), f"score of {2 * height}×{2 * width}, fitted on {height}×{width}")


def _with_nan(images: np.ndarray) -> np.ndarray:
    bad = as_float(images)
    bad[-1, 0, 3, 3] = np.nan
    return bad


def _refuses(name: str, asked: str, spoil: Callable[[np.ndarray], np.ndarray]) -> Check:
    """A check that both `fit` and `score` refuse spoiled images."""

    def check(subject: Subject) -> str:
        train, test = spoil(subject.train), spoil(subject.test)
        refusal(lambda: subject.fit(train), "fit")
        return refusal(lambda: subject.fitted.score(test), "score")

    check.__name__, check.__doc__ = name, asked
    return check


_ALL: tuple[Check, ...] = (
    keeps_input,
    accepts_read_only,
    uint8_equals_float,
    channels,
    sizes,
    last_batch_of_one,
    small_training_set,
    one_training_image,
    refuses_unfitted,
    refuses_wrong_channels,
    refuses_wrong_size,
    _refuses("refuses_empty", "No images at all are refused.", lambda images: images[:0]),
    _refuses("refuses_nan", "Images that hold NaN are refused.", _with_nan),
    _refuses(
        "refuses_wrong_ndim", "An array that is not `(n, c, h, w)` is refused.", lambda images: images.reshape(len(images), -1)
    ),
    # In [0, 255]: the mistake that users make.
    _refuses("refuses_out_of_range", "Float images outside [-1, 1] are refused.", lambda images: images.astype(np.float32)),
    _refuses("refuses_int64", "int64 images are refused.", lambda images: images.astype(np.int64)),
)
CHECKS: Mapping[str, Check] = {getattr(check, "__name__", ""): check for check in _ALL}
