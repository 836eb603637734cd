"""What a loader returns, and the one way to call it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ganomaly_plugin.core import canonical_json
from ganomaly_plugin.errors import BenchError, InvalidInput, check_known, one_line
from ganomaly_plugin.files import as_path
from ganomaly_plugin.hparams import as_recorded, check_recordable, recorded_text
from ganomaly_plugin.registry import resolve

MAX_SIDE = 2048  # pixels
ROOT_VARIABLE = "GANOMALY_DATA_ROOT"


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images in memory or in a memory map.

    Attributes:
        name: As the user wrote it.
        images: `(n, c, h, w)`, uint8.
        labels: `(n,)`, whole numbers that index `classes`.
        classes: Class names.
        is_test: `(n,)` bool, the official test split; None when the data set has none.
        anomaly_classes: The classes that may be the anomalous one; None: any. A data set of good and defective
            images names its defects here.
        masks: `(n, h, w)` bool, the anomalous pixels, where the data set has them.
        source: Provenance for the record: files, checksums, skipped images, licence.
        has_mask: `(n,)` bool, which anomalous images have their mask in `masks`; None: all.
        files: `(n,)` text, the file of each image, where the data set is of files.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    is_test: np.ndarray | None = None
    anomaly_classes: tuple[str, ...] | None = None
    masks: np.ndarray | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    has_mask: np.ndarray | None = None
    files: np.ndarray | None = None

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over pixels, labels, classes and the official split."""
        content = hashlib.sha256(repr((self.images.shape, self.classes)).encode())
        content.update(np.ascontiguousarray(self.labels, dtype=np.int64).data)
        if self.is_test is not None:
            content.update(np.ascontiguousarray(self.is_test, dtype=np.uint8).data)
        for piece in self._pieces():
            content.update(piece.data)
        return content.hexdigest()

    @functools.cached_property
    def first_equal(self) -> np.ndarray:
        """For each image the place of the first with the same pixels, `(n,)`: equal images share a number."""
        first: dict[bytes, int] = {}
        hashes = (hashlib.sha256(image).digest() for piece in self._pieces() for image in piece)
        return np.array([first.setdefault(each, k) for k, each in enumerate(hashes)])

    def _pieces(self, size: int = 4096) -> Iterator[np.ndarray]:
        """The images as arrays in C order, a few thousand at a time: a memory map is not read whole."""
        return (np.ascontiguousarray(self.images[start : start + size]) for start in range(0, len(self.images), size))


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder data sets are read from: `root`, else $GANOMALY_DATA_ROOT, else ./datasets."""
    return as_path(root or os.environ.get(ROOT_VARIABLE) or "datasets")


def default_options(name: str) -> dict[str, Any]:
    """The options of the data set's loader and their defaults as records hold them; `image_size` is one of them.

    An option that must be given has `inspect.Parameter.empty`.
    """
    return {key: as_recorded(value) for key, value in _declared(name).items()}


def _declared(name: str) -> dict[str, Any]:
    """The options of the data set's loader and their defaults as its signature has them."""
    parameters = inspect.signature(resolve("data set", name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != "root"}


def _as_declared(default: Any, value: Any) -> Any:
    """`value` out of a record as the loader takes it: lists as tuples where its default is a tuple."""
    if recorded_text(default) == recorded_text(value):
        return default
    return _tuples(value) if isinstance(default, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with the loader's defaults filled in.

    Raises:
        InvalidInput: An option is unknown, of another type than its default, or has none and is not given; or no record
            can hold it.
    """
    known = default_options(name)
    resolved = dict(known)
    for key, value in options.items():
        check_known(f"option of data set {name}", key, known)
        resolved[key] = _checked_option(name, key, as_recorded(value), known[key])
    for key, value in resolved.items():
        if value is inspect.Parameter.empty:
            raise InvalidInput(f"{name} needs the option {key}: write {name}[{key}=…].")
    check_recordable(name, resolved)
    size = resolved.get("image_size")
    if isinstance(size, int) and not 1 <= size <= MAX_SIDE:
        raise InvalidInput(f"image_size of data set {name} must be at least 1 and at most {MAX_SIDE}, got {size}.")
    return resolved


def _checked_option(name: str, key: str, value: Any, default: Any) -> Any:
    """`value` when it is of the type of `default`, a whole number as a float where that is one."""
    if default is None or default is inspect.Parameter.empty:
        return value
    want, number = type(default), isinstance(value, (int, float)) and not isinstance(value, bool)
    if want is str and number:
        raise InvalidInput(f"Option {key} of data set {name} is text, and YAML reads {value!r} as a number. Quote it.")
    if want is float and number and abs(value) <= sys.float_info.max:
        return float(value)
    if not (isinstance(value, want) and isinstance(value, bool) == (want is bool)):
        raise InvalidInput(f"Option {key} of data set {name} must be {want.__name__}, got {value!r}.")
    return value


def _checked(name: str, made: Any) -> ImageDataset:
    """What the loader of `name` made, when it is as `ImageDataset` says.

    Raises:
        InvalidInput: It is not: says in what.
    """
    if not isinstance(made, ImageDataset):
        raise InvalidInput(f"The data set {name} is a {type(made).__name__}. Have its loader return an ImageDataset.")
    fault = next(_faults(made), None)
    if fault is not None:
        raise InvalidInput(f"The data set {name} is not usable: {fault}. Mend it.")
    return made


def _faults(made: ImageDataset) -> Iterator[str]:
    """In what a data set is not as its attributes are described; each line takes those before it for mended."""
    images, labels, classes = made.images, made.labels, made.classes
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else f"a {type(images).__name__}"
        yield f"its images are {found}, not a non-empty uint8 (n, c, h, w)"
    n = len(images)
    if not isinstance(labels, np.ndarray) or labels.shape != (n,) or labels.dtype.kind not in "iu":
        yield f"its labels are no array of {n} whole numbers, one an image"
    defects = () if made.anomaly_classes is None else made.anomaly_classes
    for part, names in (("classes", classes), ("anomaly_classes", defects)):
        if not isinstance(names, (tuple, list)):
            yield f"its {part} are no tuple, but a {type(names).__name__}"
    if not all(isinstance(each, str) for each in classes) or len(set(classes)) < len(classes):
        yield f"its classes are not names that differ, but {classes!r}"
    if labels.min() < 0 or labels.max() >= len(classes):
        yield f"its labels span [{labels.min()}, {labels.max()}], and there are {len(classes)} classes, counted from 0"
    if not set(defects) <= set(classes):
        yield f"its anomaly_classes {made.anomaly_classes!r} are not all among its classes"
    for part, shape in (("is_test", (n,)), ("has_mask", (n,)), ("masks", (n, *images.shape[2:]))):
        array = getattr(made, part)
        if array is not None and (not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != bool):
            yield f"its {part} is no array of bool {shape}"
    if not isinstance(made.source, Mapping) or recorded_text(dict(made.source)) is None:
        yield f"its source is no dict of plain finite numbers, text and lists, which a record can hold, but {made.source!r}"
    if made.files is not None and (
        not isinstance(made.files, np.ndarray) or made.files.shape != (n,) or made.files.dtype.kind != "U"
    ):
        yield f"its files are no array of text ({n},)"


@functools.lru_cache(maxsize=4)
def _load_cached(name: str, root: Path, text: str) -> ImageDataset:
    """The data set `name` with the options that the canonical JSON `text` holds, all of them."""
    loader, declared = resolve("data set", name), _declared(name)
    options = {key: _as_declared(declared[key], value) for key, value in json.loads(text).items()}
    try:
        return _checked(name, loader(root=root, **options))
    except BenchError:
        raise
    except (Exception, SystemExit) as error:  # a loader may raise anything for files or options that it did not expect
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise InvalidInput(f"The data set {name} ({given}) cannot be loaded: {one_line(error)}. Check its options.") from error


def load_dataset(name: str, /, *, root: str | os.PathLike[str] | None = None, **options: Any) -> ImageDataset:
    """The data set `name`, its images resized to `image_size`; the last few are kept in memory.

    Args:
        name: A registered name, or a family and its argument such as `folder:PATH`.
        root: Folder of the data sets; see `data_root`.
        **options: The loader's options, `image_size` among them.

    Raises:
        InvalidInput: The name or an option is unknown, or the files are not there: says where to put which.
    """
    resolved = check_options(name, options)
    return _load_cached(name, data_root(root), canonical_json(resolved))


def resize(images: np.ndarray, size: int, chunk: int = 2048) -> np.ndarray:
    """uint8 images `(n, c, h, w)` resized to `(n, c, size, size)`: bilinear, antialiased when they shrink."""
    if images.shape[-2:] == (size, size):
        return images
    import torch  # here, for `bench ls` reads the protocols and must not wait for torch
    from torch.nn.functional import interpolate

    resized = np.empty((*images.shape[:2], size, size), dtype=np.uint8)
    for start in range(0, len(images), chunk):
        part = torch.from_numpy(images[start : start + chunk].astype(np.float32))  # a copy: a memory map is read-only
        part = interpolate(part, size=(size, size), mode="bilinear", align_corners=False, antialias=size < max(part.shape[-2:]))
        resized[start : start + chunk] = part.round_().clamp_(0, 255).to(torch.uint8).numpy()
    return resized
