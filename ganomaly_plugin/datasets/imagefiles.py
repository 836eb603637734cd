"""Many image files → one uint8 memory map, decoded once, in parallel, never all in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ganomaly_plugin.core import canonical_json
from ganomaly_plugin.datasets.base import ImageDataset
from ganomaly_plugin.datasets.cache import cache_folder
from ganomaly_plugin.datasets.decode import BadImage, check_options, decode, decode_mask, is_grey, quiet_pillow
from ganomaly_plugin.errors import InvalidInput, one_line
from ganomaly_plugin.escape import storable
from ganomaly_plugin.files import locked
from ganomaly_plugin.provenance import available_cpus
from ganomaly_plugin.selection import as_word

_FORMAT = 4  # of the cached folder; a change of how pixels are made changes it
_BATCH = 16  # files a task of the thread pool decodes
_NAMED = 5  # problems an error or a record names
_UNUSED = 30 * 86_400.0  # seconds after which nobody is taken to want cached images any more


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file or folder."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BadImages(InvalidInput):
    """Some images or folders are not usable; `problems` holds them all, the text the first few."""

    def __init__(self, text: str, problems: list[Problem]) -> None:
        super().__init__(text)
        self.problems = problems


@dataclass(frozen=True)
class ImageFile:
    """One image of a listing. `stamp` is the size and time of the file and its mask: it tells that either changed."""

    path: Path
    label: int
    is_test: bool = False
    mask: Path | None = None
    stamp: tuple[int, ...] = ()


@dataclass
class Listing:
    """The image files of a data set, found but not decoded.

    Attributes:
        name: Of the data set, as the user wrote it.
        base: The folder they are in; problems are told relative to it.
        files: The images, in the order of the data set.
        classes: Class names.
        anomaly_classes: Those that are defects.
        official_split: Whether `is_test` of the files means something.
        has_masks: Whether some file has a mask.
        problems: What the search itself met: unreadable folders, loops, empty classes, images without a mask.
        source: For the record.
    """

    name: str
    base: Path
    files: list[ImageFile]
    classes: tuple[str, ...]
    anomaly_classes: tuple[str, ...] | None
    official_split: bool
    has_masks: bool = False
    problems: list[Problem] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)

    def shown(self, path: Path) -> str:
        """`path` relative to `base` where it lies below it, as a record can hold it."""
        return storable(str(path.relative_to(self.base) if path.is_relative_to(self.base) else path))


def stamped(path: Path, label: int, is_test: bool = False, mask: Path | None = None) -> ImageFile:
    """An `ImageFile` with its stamp.

    Raises:
        OSError: The file or its mask is not there, or a link goes round in circles.
        BadImage: It is not a regular file.
    """
    stamp: list[int] = []
    for each in (path, mask):
        if each is not None:
            status = each.stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            stamp += [status.st_size, status.st_mtime_ns]
    return ImageFile(path, label, is_test, mask, tuple(stamp))


def load_listing(
    listing: Listing, root: Path, *, image_size: int, channels: int = 0, fit: str = "crop", on_bad_image: str = "fail"
) -> ImageDataset:
    """The listing's images as a data set whose pixels are a read-only memory map.

    Args:
        listing: What to decode.
        root: The data root: the map is kept in its `.cache`, or in the user's cache folder.
        image_size: Side of the images, pixels.
        channels: 1, 3, or 0: 1 when every image is grey, else 3.
        fit: "crop" (short side to `image_size`, then the centre) or "pad" (long side, the rest black).
        on_bad_image: "fail", or "skip": leave bad images, and defects that have none left, out, and count them in `source`.

    Raises:
        BadImages: Something is not usable, and `on_bad_image` is "fail"; all of it in one report.
        InvalidInput: An option is not allowed, no image is left, or the disk is full.
    """
    check_options(channels, fit, on_bad_image, image_size)
    if not listing.files:
        why = f": {_first(listing, listing.problems)}" if listing.problems else ""
        raise BadImages(f"{listing.name}: there is no usable image in {listing.base}{why}.", listing.problems)
    with _cached(listing, cache_folder(root), image_size, channels, fit) as folder:
        meta, kept, bad = _remembered(listing, folder)
        problems = listing.problems + [Problem(file.path, reason) for file, reason in bad]
        if problems and on_bad_image == "fail":
            raise BadImages(_report(listing, problems), problems)
        if len(kept) == 0:
            raise InvalidInput(f"{listing.name}: no usable image in {listing.base}: {_first(listing, problems)}.")
        shape = (len(kept), meta["channels"], image_size, image_size)
        images = np.memmap(folder / "images.u8", dtype=np.uint8, mode="r", shape=shape)
        place = folder / "masks.u8"
        masks = np.memmap(place, dtype=bool, mode="r", shape=shape[:1] + shape[2:]) if listing.has_masks else None
    source = {**listing.source, "skipped": len(problems)}
    if problems:
        source["skipped_first"] = [f"{listing.shown(p.path)}: {p.reason}" for p in problems[:_NAMED]]
    if meta["masks_lost"]:
        source["masks_lost_to_resizing"] = meta["masks_lost"]
    files = [listing.files[k] for k in kept]
    classes, defects = listing.classes, listing.anomaly_classes
    labels = np.array([file.label for file in files], dtype=np.int64)
    has_mask = np.array([file.mask is not None for file in files])
    if not has_mask.any():
        masks = None
    elif without := int((labels[~has_mask] > 0).sum()):
        source["without_mask"] = without
    there = [k for k, name in enumerate(classes) if name not in (defects or ()) or (labels == k).any()]
    if defects and len(there) > len(classes) - len(defects):  # else no defect is left, which will be said
        classes, labels = tuple(classes[k] for k in there), np.searchsorted(there, labels)
        defects = tuple(name for name in defects if name in classes)
    return ImageDataset(
        listing.name,
        images,
        labels,
        classes,
        np.array([file.is_test for file in files]) if listing.official_split else None,
        defects,
        masks,
        source,
        None if masks is None else has_mask,
        np.array([listing.shown(file.path) for file in files]),
    )


def _report(listing: Listing, problems: list[Problem]) -> str:
    return (
        f"{listing.name}: {len(problems)} of {len(listing.files) + len(listing.problems)} files and folders are not usable: "
        f"{_first(listing, problems)}. Mend or remove them (bench data check {as_word(listing.name)} lists all), or leave them "
        "out with on_bad_image=skip."
    )


def _first(listing: Listing, problems: list[Problem]) -> str:
    named = "; ".join(f"{listing.shown(p.path)} ({p.reason})" for p in problems[:_NAMED])
    return named + (f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else "")


@contextlib.contextmanager
def _cached(listing: Listing, cache: Path, size: int, channels: int, fit: str) -> Iterator[Path]:
    """The folder of the decoded listing, made when it is not there yet, not whole or out of date; in the context it stays."""
    content = [[str(f.path.absolute()), str(f.mask or ""), *f.stamp] for f in listing.files]
    key = hashlib.sha256(canonical_json([_FORMAT, size, channels, fit, listing.has_masks, content]).encode()).hexdigest()[:20]
    folder = cache / f"images-{key}"
    if not _whole(folder):
        _sweep_out_unused(cache)
    with locked(cache / f"images-{key}.lock"):
        if _whole(folder) and _still_bad(listing, folder, size, fit):
            with contextlib.suppress(OSError):
                os.utime(folder)  # it is in use
        else:
            shutil.rmtree(folder, ignore_errors=True)
            building = Path(tempfile.mkdtemp(dir=cache, prefix="building-"))
            building.chmod(0o755)  # a cache beside shared data serves all who read that data
            try:
                _build(listing, building, size, channels, fit)
                building.replace(folder)
            except OSError as error:
                if not _whole(folder):  # else without locks another process was first
                    raise InvalidInput(
                        f"Cannot write decoded images to {cache}: {one_line(error)}. Free some space there."
                    ) from error
            finally:
                shutil.rmtree(building, ignore_errors=True)
        yield folder


def _remembered(listing: Listing, folder: Path) -> tuple[dict[str, Any], np.ndarray, list[tuple[ImageFile, str]]]:
    """What `_build` left in `folder` beside pixels: its notes, the places of the usable files, the others with the reasons."""
    meta = json.loads((folder / "meta.json").read_text())
    kept = np.setdiff1d(np.arange(len(listing.files)), [k for k, _ in meta["bad"]])
    return meta, kept, [(listing.files[k], reason) for k, reason in meta["bad"]]


def _still_bad(listing: Listing, folder: Path, size: int, fit: str) -> bool:
    """Whether the files that were not usable still are not, for the same reasons.

    A permission, a disk, a lack of memory and Pillow are mended without a trace in a file's size and time.
    """
    meta, _, bad = _remembered(listing, folder)

    def same(was: tuple[ImageFile, str]) -> bool:
        try:
            _decoded(was[0], size, meta["channels"], fit)
        except BadImage as error:
            return str(error) == was[1]
        return False

    with quiet_pillow(), ThreadPoolExecutor(available_cpus()) as pool:
        return all(pool.map(same, bad))


def _decoded(file: ImageFile, size: int, channels: int, fit: str) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """The pixels of a file, its mask if it has one, and whether that marked something and marks nothing at this size."""
    image, original = decode(file.path, size=size, channels=channels, fit=fit)
    return (image, None, False) if file.mask is None else (image, *decode_mask(file.mask, original, size=size, fit=fit))


def _sweep_out_unused(cache: Path) -> None:
    """Remove what was of no use for a month: images of files that have changed since, and what killed decoders left."""
    for building in filter(_unused, cache.glob("building-*")):
        shutil.rmtree(building, ignore_errors=True)
    for folder in filter(_unused, cache.glob("images-*")):
        with locked(folder.with_name(f"{folder.name}.lock")):
            if _unused(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _unused(folder: Path) -> bool:
    try:
        return folder.is_dir() and time.time() - folder.stat().st_mtime > _UNUSED
    except OSError:  # removed by another
        return False


def _whole(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no JSON, or another
        return False


def _build(listing: Listing, folder: Path, size: int, channels: int, fit: str) -> None:
    """Decode every file of the listing into `images.u8` (and `masks.u8`), the bad ones left out."""
    files, n = listing.files, len(listing.files)
    with quiet_pillow(), ThreadPoolExecutor(available_cpus()) as pool:
        channels = channels or (1 if _all_grey(files, pool) else 3)
        images = _allocate(folder / "images.u8", (n, channels, size, size))
        masks = _allocate(folder / "masks.u8", (n, size, size)) if listing.has_masks else None

        def decode_batch(start: int) -> tuple[list[tuple[int, str]], int]:
            bad, lost = [], 0
            for k in range(start, min(start + _BATCH, n)):
                try:
                    images[k], mask, emptied = _decoded(files[k], size, channels, fit)
                    if masks is not None and mask is not None:
                        masks[k] = mask
                        lost += emptied
                except BadImage as error:
                    bad.append((k, str(error)))
            return bad, lost

        bad: list[tuple[int, str]] = []
        lost = 0
        for some, emptied in _with_progress(pool.map(decode_batch, range(0, n, _BATCH)), listing.name, n):
            bad += some
            lost += emptied
    kept = np.setdiff1d(np.arange(n), [k for k, _ in bad])
    for name, array in (("images.u8", images), ("masks.u8", masks)):
        if array is not None:
            _compact(array, kept)
            array.flush()
            os.truncate(folder / name, len(kept) * int(np.prod(array.shape[1:])))
    meta = {
        "channels": channels,
        "bad": bad,
        "masks_lost": lost,
        "sizes": {path.name: path.stat().st_size for path in folder.iterdir()},
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _all_grey(files: list[ImageFile], pool: ThreadPoolExecutor) -> bool:
    """Whether every image that opens is grey; stops at the first that is not."""

    def grey(file: ImageFile) -> bool:
        try:
            return is_grey(file.path)
        except BadImage:
            return True  # it will be reported when it is decoded

    return all(all(pool.map(grey, files[start : start + 512])) for start in range(0, len(files), 512))


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A writable memory map with its disk space reserved: writing past a full disk would kill the process."""
    size = int(np.prod(shape))
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    return np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)


def _compact(array: np.ndarray, kept: np.ndarray, chunk: int = 256) -> None:
    """Move the kept rows to the front, in order."""
    if len(kept) == len(array):
        return
    for start in range(0, len(kept), chunk):
        rows = kept[start : start + chunk]
        array[start : start + len(rows)] = array[rows]


def _with_progress(batches: Iterable[Any], name: str, total: int) -> Iterator[Any]:
    """Pass `batches` on; when they take more than about two seconds, tell on stderr how far it is."""
    terminal = sys.stderr.isatty()
    began = told = time.monotonic()
    for count, batch in enumerate(batches, 1):
        now = time.monotonic()
        if now - began > 2 and now - told > (0.2 if terminal else 10):
            told = now
            done = min(count * _BATCH, total)
            print(f"{name}: decoded {done:,} of {total:,} images", end="\r" if terminal else "\n", file=sys.stderr, flush=True)
        yield batch
    if told > began:
        print(f"{name}: decoded {total:,} images in {time.monotonic() - began:.0f} s", file=sys.stderr)
