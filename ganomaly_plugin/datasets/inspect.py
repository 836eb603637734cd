"""What is behind `bench data`: where a data set is and what it holds, whether its images are sound, how to get it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ganomaly_plugin.datasets import torchvision_sets
from ganomaly_plugin.datasets.anomalib_sets import expand, list_anomalib
from ganomaly_plugin.datasets.base import ImageDataset, check_options, data_root, load_dataset
from ganomaly_plugin.datasets.decode import BadImage, decode_mask, quiet_pillow, read_upright
from ganomaly_plugin.datasets.elpv import list_elpv
from ganomaly_plugin.datasets.folder import list_folder
from ganomaly_plugin.datasets.imagefiles import ImageFile, Listing, Problem
from ganomaly_plugin.errors import BenchError, InvalidInput, one_line
from ganomaly_plugin.provenance import available_cpus

_NAMED = 5  # examples of each finding that the lines name


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        name: The data set.
        images: How many images are usable.
        problems: Files and folders that are not usable.
        leaks: Groups of equal images that are in both the official train and test part, as names of images.
        duplicates: Groups of equal images inside one part, or inside a data set without parts.
        conflicts: Groups of equal images whose labels differ.
        counts: Images beyond the first of each group of duplicates, and test images that are in train too.
        others: Files that are not read, for their names do not end like images or they are in no class folder: ending, or
            where → how many.
    """

    name: str
    images: int
    problems: list[Problem] = field(default_factory=list)
    leaks: list[list[str]] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No unusable file and no leak. Duplicates inside a part are told, and are no fault by themselves."""
        return not self.problems and not self.leaks

    def lines(self) -> list[str]:
        """The report for people, one finding a line."""
        lines = [f"{self.name}: {self.images:,} usable images, {len(self.problems):,} problems"]
        lines += [f"  {problem}" for problem in self.problems]
        if self.others:
            lines.append(f"  not read: {', '.join(f'{n:,} {ending}' for ending, n in self.others.items())}")
        lines.append(f"  in both train and test (leakage): {self.counts.get('leaked', 0):,} test images")
        lines += _examples(self.leaks)
        lines.append(f"  repeated inside a part: {self.counts.get('repeated', 0):,} images")
        lines += _examples(self.duplicates)
        lines.append(f"  equal images with different labels: {len(self.conflicts):,} groups")
        return lines + _examples(self.conflicts)


def describe(name: str, root: str | Path | None = None, /, **options: Any) -> dict[str, Any]:
    """Where a data set is, or where it was looked for, and what it holds.

    Args:
        name: A registered name, or a family and its argument.
        root: The data root; see `data_root`.
        **options: The loader's options.

    Returns:
        name, root, found (bool); when found: shape, classes, counts {part: {class: images}}, masks, digest (sha256 over
        pixels and labels) and source; else: reason. Nothing is downloaded.

    Raises:
        InvalidInput: The name or an option is unknown.
    """
    place = data_root(root)
    resolved = check_options(name, options)
    entry = {"name": name, "options": resolved, "root": str(place.absolute()), "found": False}
    try:
        torchvision_set = torchvision_sets.set_of(name, **resolved)
        if torchvision_set is not None and torchvision_sets.locate(torchvision_set, place) is None:
            return {**entry, "reason": torchvision_sets.missing(torchvision_set, place)}
        listing = _listing(name, place, resolved, download=False)
        if listing is not None:
            entry["folder"] = str(listing.base.absolute())
        dataset = load_dataset(name, root=place, **resolved)
    except BenchError as error:
        return {**entry, "reason": one_line(error)}
    return {
        **entry,
        "found": True,
        "shape": list(dataset.images.shape),
        "classes": list(dataset.classes),
        "counts": counts(dataset),
        "masks": dataset.masks is not None,
        "digest": dataset.digest,
        "source": dict(dataset.source),
    }


def describe_lines(content: dict[str, Any]) -> list[str]:
    """`describe`'s content for people."""
    if not content["found"]:
        state = "not usable" if "folder" in content else "not found"
        return [f"{content['name']}: {state}. {content['reason']}"]
    n, c, h, w = content["shape"]
    lines = [f"{content['name']}: {n:,} images of {c}×{h}×{w}, sha256 {content['digest'][:16]}"]
    lines.append(f"  in {content.get('folder', content['root'])}")
    for part, classes in content["counts"].items():
        listed = ", ".join(f"{name} {count:,}" for name, count in classes.items())
        lines.append(f"  {part} {sum(classes.values()):,}: {listed}")
    if content["masks"]:
        lines.append("  with masks of the anomalous pixels")
    for key, value in content["source"].items():
        if key != "sha256":
            lines.append(f"  {key}: {value}")
    lines += [f"  sha256 {digest} {file}" for file, digest in content["source"].get("sha256", {}).items()]
    return lines


def counts(dataset: ImageDataset) -> dict[str, dict[str, int]]:
    """Images per part ("train", "test", or "all" without an official split) and class."""
    parts = {"all": np.ones(len(dataset.labels), dtype=bool)}
    if dataset.is_test is not None:
        parts = {"train": ~dataset.is_test, "test": dataset.is_test}
    k = len(dataset.classes)
    return {
        part: dict(zip(dataset.classes, np.bincount(dataset.labels[rows], minlength=k).tolist(), strict=True))
        for part, rows in parts.items()
    }


def check(name: str, root: str | Path | None = None, /, **options: Any) -> Report:
    """Look at every image: is it usable, and is it there twice? Equal means equal pixels at the stored size.

    Images of a folder are decoded whole for this, which takes as long as loading them the first time.

    Args:
        name: A registered name, or a family and its argument.
        root: The data root; see `data_root`.
        **options: The loader's options.

    Raises:
        InvalidInput: The name or an option is unknown, or the data set is not there.
        CorruptFile: A file is not the published one.
    """
    place = data_root(root)
    resolved = check_options(name, options)
    listing = _listing(name, place, resolved, download=True)
    if listing is not None:
        return _check_listing(listing)
    torchvision_set = torchvision_sets.set_of(name, **resolved)
    if torchvision_set is not None and "image_size" in resolved:
        resolved["image_size"] = torchvision_set.side  # resizing could make different images equal
    dataset = load_dataset(name, root=place, **resolved)
    is_test = None if dataset.is_test is None else dataset.is_test.tolist()
    names = _row_names(is_test, len(dataset.images))
    return _report(name, dataset.first_equal.tolist(), names, dataset.labels.tolist(), is_test, [])


def get(name: str, root: str | Path | None = None, /, **options: Any) -> list[str]:
    """Download a data set that can be downloaded, and say where it is; what to do for one that cannot.

    Raises:
        InvalidInput: The name is unknown, the download failed, or a person has to do something: says what.
    """
    place = data_root(root)
    resolved = check_options(name, options)
    torchvision_set = torchvision_sets.set_of(name, **resolved)
    if torchvision_set is not None:
        if torchvision_sets.locate(torchvision_set, place) is None:
            torchvision_sets.download(torchvision_set, place)
    elif name.startswith("anomalib:"):
        for each, its in expand(name, place, dict(options)):
            load_dataset(each, root=place, **its)
        return [f"{name}: in {place.absolute()}"]
    return describe_lines(_found(describe(name, place, **resolved)))


def _found(content: dict[str, Any]) -> dict[str, Any]:
    if not content["found"]:
        raise InvalidInput(content["reason"])
    return content


def _listing(name: str, root: Path, options: dict[str, Any], *, download: bool) -> Listing | None:
    """The files of a data set that is made of image files; None for one that is not."""
    family, _, argument = name.partition(":")
    if family == "folder" and argument:
        return list_folder(argument, root=root, defects=options.get("defects", "together"))
    if family == "anomalib" and argument:
        return list_anomalib(argument, root=root, category=options.get("category", ""), download=download)
    if name == "elpv":
        return list_elpv(root=root, subset=options.get("subset", "all"))
    return None


def _check_listing(listing: Listing) -> Report:
    def look(file: ImageFile) -> bytes | Problem:
        try:
            image = read_upright(file.path)
            if file.mask is not None:
                decode_mask(file.mask, image.size, size=8, fit="crop")
        except BadImage as error:
            return Problem(file.path, str(error))
        bands = [band.tobytes() for band in image.split()]
        pixels = bands[0] if len(set(bands)) == 1 else b"".join(bands)  # a job sees grey alike in one channel and in three
        return hashlib.blake2b(str(image.size).encode() + pixels, digest_size=16).digest()

    with quiet_pillow(), ThreadPoolExecutor(available_cpus()) as pool:
        found = list(pool.map(look, listing.files))
    good = [(file, seen) for file, seen in zip(listing.files, found, strict=True) if isinstance(seen, bytes)]
    problems = [*listing.problems, *(seen for seen in found if isinstance(seen, Problem)), *_lonely(listing)]
    problems = [Problem(Path(listing.shown(problem.path)), problem.reason) for problem in problems]
    report = _report(
        listing.name,
        [seen for _, seen in good],
        [listing.shown(file.path) for file, _ in good],
        [file.label for file, _ in good],
        [file.is_test for file, _ in good] if listing.official_split else None,
        problems,
    )
    return replace(report, others=listing.source.get("other_files", {}))


def _lonely(listing: Listing) -> Iterator[Problem]:
    """Folders that hold one image: nothing can be learned from one, nor much measured."""
    for folder, count in Counter(file.path.parent for file in listing.files).items():
        if count == 1:
            yield Problem(folder, "a folder of one image")


def _row_names(is_test: list[bool] | None, n: int) -> list[str]:
    """Names of rows: their place in their part, as the data set's own files count them."""
    if is_test is None:
        return [f"image {k}" for k in range(n)]
    seen = {False: 0, True: 0}
    names = []
    for test in is_test:
        names.append(f"{'test' if test else 'train'} {seen[test]}")
        seen[test] += 1
    return names


def _report(
    name: str,
    contents: Sequence[Hashable],
    names: list[str],
    labels: list[int],
    is_test: list[bool] | None,
    problems: list[Problem],
) -> Report:
    """The report on images of which those with equal `contents` are equal."""
    groups: dict[Hashable, list[int]] = {}
    for k, content in enumerate(contents):
        groups.setdefault(content, []).append(k)
    leaks, duplicates, conflicts = [], [], []
    leaked = repeated = 0
    for members in groups.values():
        if len(members) == 1:
            continue
        in_test = [k for k in members if is_test is not None and is_test[k]]
        in_train = [k for k in members if is_test is None or not is_test[k]]
        if in_test and in_train:
            leaks.append([names[k] for k in members])
            leaked += len(in_test)
        for part in (in_train, in_test):
            if len(part) > 1:
                duplicates.append([names[k] for k in part])
                repeated += len(part) - 1
        if len({labels[k] for k in members}) > 1:
            conflicts.append([names[k] for k in members])
    found = {"leaked": leaked, "repeated": repeated}
    return Report(name, len(contents), problems, leaks, duplicates, conflicts, found)


def _examples(groups: Iterable[list[str]]) -> list[str]:
    groups = list(groups)
    lines = [f"    {' = '.join(group[:4])}{' = ...' if len(group) > 4 else ''}" for group in groups[:_NAMED]]
    return lines + ([f"    and {len(groups) - _NAMED:,} more"] if len(groups) > _NAMED else [])
