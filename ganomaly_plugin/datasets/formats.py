"""Readers of the file formats that benchmark sets are published in: idx, CIFAR's two, SVHN's MATLAB, STL-10's.

Each returns the parts of a data set as promises, so that one part at a time is in memory.
"""

from __future__ import annotations

import gzip
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ganomaly_plugin.errors import CorruptFile, InvalidInput, one_line
from ganomaly_plugin.files import atomic_write

_AGAIN = "Delete it and get it again."


@dataclass(frozen=True)
class Part:
    """A run of images that is loaded at once.

    Attributes:
        count: How many images.
        is_test: Whether they are of the official test split.
        load: Gives the images `(count, c, h, w)` uint8 and the labels `(count,)`, counted from 0.
    """

    count: int
    is_test: bool
    load: Callable[[], tuple[np.ndarray, np.ndarray]]


def unpacked(path: Path) -> Path | None:
    """`path`, or what `path.gz` unpacks to beside it, or None when neither is there.

    Raises:
        CorruptFile: The archive is damaged.
        InvalidInput: The unpacked file cannot be written.
    """
    if path.is_file():
        return path
    archive = path.with_name(path.name + ".gz")
    if not archive.is_file():
        return None
    try:
        content = gzip.decompress(archive.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptFile(f"{archive} cannot be unpacked: {one_line(error)}. {_AGAIN}") from error
    try:
        atomic_write(path, content)
    except OSError as error:
        raise InvalidInput(f"{archive} cannot be unpacked beside itself: {one_line(error)}. Unpack it to {path}.") from error
    return path


def _idx_array(path: Path, ndim: int) -> np.ndarray:
    """An idx file of bytes as a read-only memory map."""
    with path.open("rb") as file:
        head = file.read(4 + 4 * ndim)
    shape = np.frombuffer(head[4:], dtype=">u4").astype(int) if len(head) == 4 + 4 * ndim else ()
    want = bytes([0, 0, 8, ndim])  # 8: unsigned bytes
    if head[:4] != want or path.stat().st_size != len(head) + int(np.prod(shape)):
        raise CorruptFile(f"{path} is not a whole idx file of {ndim} dimensions of bytes. {_AGAIN}")
    return np.memmap(path, dtype=np.uint8, mode="r", offset=len(head), shape=tuple(shape))


def read_idx(paths: list[Path], *, transposed: bool = False, first_label: int = 0) -> list[Part]:
    """MNIST's format: training images and labels, then those of the test split.

    Args:
        paths: The four files.
        transposed: The images are stored with rows and columns exchanged (EMNIST).
        first_label: The label of the first class (1 in EMNIST's letters).
    """

    def part(images: np.ndarray, labels: np.ndarray, is_test: bool) -> Part:
        upright = images.transpose(0, 2, 1) if transposed else images
        return Part(len(images), is_test, lambda: (upright[:, None], labels.astype(np.int64) - first_label))

    parts = []
    for image_path, label_path, is_test in ((paths[0], paths[1], False), (paths[2], paths[3], True)):
        images, labels = _idx_array(image_path, 3), _idx_array(label_path, 1)
        if len(images) != len(labels):
            raise CorruptFile(f"{image_path} has {len(images)} images but {label_path.name} {len(labels)} labels. {_AGAIN}")
        parts.append(part(images, labels, is_test))
    return parts


def read_cifar_binary(paths: list[Path], *, label_bytes: int = 1, label_at: int = 0) -> list[Part]:
    """CIFAR's "binary version": records of labels and 3×32×32 bytes; the last file is the test split.

    Args:
        paths: The batches.
        label_bytes: Labels a record starts with: CIFAR-10 has one, CIFAR-100 two (coarse, fine).
        label_at: Which of them to read.
    """
    record = label_bytes + 3 * 32 * 32

    def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
        rows = np.fromfile(path, dtype=np.uint8).reshape(-1, record)
        return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_at].astype(np.int64)

    parts = []
    for path in paths:
        count, rest = divmod(path.stat().st_size, record)
        if rest or not count:
            raise CorruptFile(f"{path} is {path.stat().st_size} bytes, not a multiple of its {record}-byte records. {_AGAIN}")
        parts.append(Part(count, path == paths[-1], lambda path=path: load(path)))  # type: ignore[misc]
    return parts


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled arrays, lists and text, and refuses everything that could run code."""

    _ALLOWED: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of images")
        return self._ALLOWED[module, name]


def _unpickle(file: IO[bytes]) -> Any:
    return _ArrayUnpickler(file, encoding="latin1").load()


def read_cifar_pickles(paths: list[Path], *, label_key: str = "labels") -> list[Part]:
    """CIFAR's "python version"; the last file is the test split.

    Args:
        paths: The batches.
        label_key: "labels" (CIFAR-10), "fine_labels" or "coarse_labels" (CIFAR-100).
    """

    def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            with path.open("rb") as file:
                content = _unpickle(file)
            images = np.asarray(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
            labels = np.asarray(content[label_key], dtype=np.int64).reshape(len(images))
        except Exception as error:  # a damaged pickle raises anything
            raise CorruptFile(f"{path} is not a batch of CIFAR's python version: {one_line(error)}. {_AGAIN}") from error
        return images, labels

    # The count is known only from the content, so these are read at once, and each is let go once copied.
    held = {path: load(path) for path in paths}
    return [Part(len(held[path][0]), path == paths[-1], lambda path=path: held.pop(path)) for path in paths]  # type: ignore[misc]


def read_svhn(paths: list[Path]) -> list[Part]:
    """SVHN's cropped digits: X (32, 32, 3, n) and y (n, 1), where 10 stands for digit 0."""
    from scipy.io import loadmat, whosmat

    def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
        content = loadmat(str(path))
        return content["X"].transpose(3, 2, 0, 1), content["y"].astype(np.int64).reshape(-1) % 10

    def parts() -> Iterator[Part]:
        for path in paths:
            count = {name: shape for name, shape, _ in whosmat(str(path))}["X"][3]
            yield Part(count, path == paths[-1], lambda path=path: load(path))  # type: ignore[misc]

    try:
        return list(parts())
    except Exception as error:  # scipy has no error class of its own
        raise CorruptFile(f"{paths[0].parent}: SVHN's .mat files cannot be read: {one_line(error)}. {_AGAIN}") from error


def read_stl10(paths: list[Path]) -> list[Part]:
    """STL-10: images of 3×96×96 bytes, each plane by columns; labels counted from 1. The unlabelled part is not read."""
    record = 3 * 96 * 96
    parts = []
    for image_path, label_path, is_test in ((paths[0], paths[1], False), (paths[2], paths[3], True)):
        count, rest = divmod(image_path.stat().st_size, record)
        if rest or not count or label_path.stat().st_size != count:
            raise CorruptFile(f"{image_path} and {label_path.name} do not hold as many images as labels. {_AGAIN}")
        images = np.memmap(image_path, dtype=np.uint8, mode="r", shape=(count, 3, 96, 96)).transpose(0, 1, 3, 2)
        labels = np.fromfile(label_path, dtype=np.uint8).astype(np.int64) - 1
        parts.append(Part(count, is_test, lambda images=images, labels=labels: (images, labels)))  # type: ignore[misc]
    return parts


READERS: dict[str, Callable[..., list[Part]]] = {
    "idx": read_idx,
    "idx-transposed": lambda paths, **options: read_idx(paths, transposed=True, **options),
    "cifar-python": read_cifar_pickles,
    "cifar-binary": read_cifar_binary,
    "svhn": read_svhn,
    "stl10": read_stl10,
}
