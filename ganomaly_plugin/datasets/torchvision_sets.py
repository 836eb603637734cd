"""The labelled benchmark sets that torchvision knows: the same files in the same places, read without waste.

torchvision's own classes keep a data set as lists or in several copies; here each file is copied once into the array
that detectors train on. torchvision still does the download. What the sets are made of is in `torchvision_table`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ganomaly_plugin.datasets import torchvision_table as table
from ganomaly_plugin.datasets.base import ROOT_VARIABLE, ImageDataset, resize
from ganomaly_plugin.datasets.cache import cache_folder, remembered_digests
from ganomaly_plugin.datasets.formats import READERS, Part, unpacked
from ganomaly_plugin.datasets.torchvision_table import Layout, TorchvisionSet
from ganomaly_plugin.errors import CorruptFile, InvalidInput, one_line
from ganomaly_plugin.files import locked

_STALL_SECONDS = 20  # without network a download gives up after this
_CHUNK_BYTES = 1 << 20  # of uint8 pixels that are resized at once, as floats four times that


def _loader(name: str) -> Callable[..., ImageDataset]:
    def load(*, root: Path, image_size: int = 32) -> ImageDataset:
        return load_set(table.SETS[name], root, image_size)

    load.__doc__ = f"{table.SETS[name].download_class} as torchvision has it, resized bilinearly to `image_size`."
    return load


mnist = _loader("mnist")
fashion_mnist = _loader("fashion_mnist")
kmnist = _loader("kmnist")
cifar10 = _loader("cifar10")
svhn = _loader("svhn")
stl10 = _loader("stl10")


def emnist(*, root: Path, image_size: int = 32, split: str = "balanced") -> ImageDataset:
    """EMNIST, upright: unlike torchvision's, whose images have rows and columns exchanged.

    Args:
        root: The data root.
        image_size: Side of the images, pixels.
        split: torchvision's names: "balanced" (47 classes, the default: as many images of each), "byclass" (62),
            "bymerge" (47), "letters" (26), "digits" or "mnist" (10).
    """
    return load_set(table.emnist(split), root, image_size)


def cifar100(*, root: Path, image_size: int = 32, labels: str = "fine") -> ImageDataset:
    """CIFAR-100.

    Args:
        root: The data root.
        image_size: Side of the images, pixels.
        labels: "fine" (100 classes) or "coarse" (20, as one-class papers use).
    """
    return load_set(table.cifar100(labels), root, image_size)


def set_of(name: str, **options: Any) -> TorchvisionSet | None:
    """The table's entry for a registered name and its options; None for a data set that is not torchvision's.

    Raises:
        InvalidInput: An option is not allowed.
    """
    if name == "emnist":
        return table.emnist(options.get("split", "balanced"))
    if name == "cifar100":
        return table.cifar100(options.get("labels", "fine"))
    return table.SETS.get(name)


def load_set(entry: TorchvisionSet, root: Path, image_size: int) -> ImageDataset:
    """Find, or download, verify and read a data set.

    Raises:
        InvalidInput: The files are not there and cannot be downloaded; says which files to put where.
        CorruptFile: A file is damaged, or not the published one.
    """
    layout, paths = locate(entry, root) or _fetch(entry, root)
    source = _verified(layout, paths, root)
    images, labels, is_test = _assemble(READERS[layout.form](paths, **layout.options), entry, image_size)
    if labels.min() < 0 or labels.max() >= len(entry.classes):
        raise CorruptFile(f"{entry.name}: labels span {labels.min()} to {labels.max()}, not the {len(entry.classes)} classes.")
    return ImageDataset(entry.name, images, labels, entry.classes, is_test, source=source)


def locate(entry: TorchvisionSet, root: Path) -> tuple[Layout, list[Path]] | None:
    """The first layout whose files are all there, and the files; `.gz` beside which nothing is unpacked are unpacked."""
    for layout in entry.layouts:
        paths = [unpacked(root / file) for file in layout.files]
        if all(paths):
            return layout, [path for path in paths if path is not None]
    return None


def download(entry: TorchvisionSet, root: Path) -> None:
    """Let torchvision download the data set into `root`, its chatter on stderr.

    Raises:
        InvalidInput: It failed; says why, and which files to put where.
    """
    made = not root.exists()
    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(_STALL_SECONDS)
        with contextlib.redirect_stdout(sys.stderr):
            import torchvision.datasets

            for options in entry.download_options:
                getattr(torchvision.datasets, entry.download_class)(str(root), download=True, **options)
    except Exception as error:  # torchvision raises RuntimeError, URLError, OSError, EOFError, zipfile's and tarfile's
        _remove_empty(root if made else root / Path(entry.layouts[0].files[0]).parts[0])
        raise InvalidInput(f"{missing(entry, root)} (The download failed: {one_line(error)[:200]})") from error
    finally:
        socket.setdefaulttimeout(timeout)


def missing(entry: TorchvisionSet, root: Path) -> str:
    """One line: what is not there, and which files to put where."""
    choices = []
    for layout in entry.layouts:
        absent = [file for file in layout.files if not (root / file).is_file() and not (root / f"{file}.gz").is_file()]
        choices.append(", ".join(absent))
    return (
        f"Data set {entry.name!r} is not complete under {root.absolute()}. Put there {' or '.join(choices)}; or set "
        f"--data-root or {ROOT_VARIABLE} to the folder that has them; or run `bench data get {entry.name}` on a network."
    )


def _fetch(entry: TorchvisionSet, root: Path) -> tuple[Layout, list[Path]]:
    with locked(cache_folder(root) / f"{entry.name}.lock"):  # of many workers one downloads
        found = locate(entry, root)
        if found is None:
            print(f"{entry.name}: not under {root.absolute()}; downloading it there.", file=sys.stderr)
            download(entry, root)
            found = locate(entry, root)
    if found is None:
        raise InvalidInput(missing(entry, root))
    return found


def _remove_empty(folder: Path) -> None:
    """Remove `folder` when there are only empty folders in it."""
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            Path(path).rmdir()


def _verified(layout: Layout, paths: list[Path], root: Path) -> dict[str, Any]:
    """The record's `source`: each file's sha256, and whether its published md5 was checked."""
    digests = remembered_digests(paths, root)
    unpublished = []
    for file, path in zip(layout.files, paths, strict=True):
        want = table.PUBLISHED_MD5.get(file)
        if want is None:
            unpublished.append(file)
        elif digests[path]["md5"] != want:
            raise CorruptFile(f"{path} has md5 {digests[path]['md5']}, not the published {want}. Delete it and get it again.")
    sha256 = {file: digests[path]["sha256"] for file, path in zip(layout.files, paths, strict=True)}
    return {
        "sha256": sha256,
        "published_md5": "all match" if not unpublished else f"none published for {', '.join(unpublished)}",
    }


def _assemble(parts: list[Part], entry: TorchvisionSet, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Copy the parts, resized, one after another into one array; a part is let go before the next is loaded."""
    total = sum(part.count for part in parts)
    images = np.empty((total, entry.channels, size, size), dtype=np.uint8)
    labels = np.empty(total, dtype=np.int64)
    is_test = np.empty(total, dtype=bool)
    start = 0
    for part in parts:
        rows = slice(start, start + part.count)
        pixels, labels[rows] = part.load()
        images[rows] = resize(pixels, size, chunk=max(1, _CHUNK_BYTES // pixels[0].size))
        is_test[rows] = part.is_test
        start += part.count
        del pixels
    return images, labels, is_test
