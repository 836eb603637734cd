"""ELPV: 2,624 photographs of solar cells by electroluminescence, 300×300, with real defects.

Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence Imagery",
EU PVSEC 2018. The images are licensed CC BY-NC-SA 4.0: not for commercial use, and never part of this package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from ganomaly_plugin.datasets.base import ROOT_VARIABLE, ImageDataset
from ganomaly_plugin.datasets.cache import remembered_digests
from ganomaly_plugin.datasets.decode import BadImage
from ganomaly_plugin.datasets.imagefiles import Listing, Problem, load_listing, stamped
from ganomaly_plugin.errors import CorruptFile, InvalidInput

LICENCE = "CC BY-NC-SA 4.0"
_SHA256 = {  # of elpv-dataset 1.0.0.post1; the images' is over the lines "<sha256>  <name>", sorted by name
    "labels.csv": "0abe6fe7700aea571717d7d7dfec005a47c6207b4cde26a4556b6807a115483d",
    "images": "b13e11b57dda614bfa0c29456bfc94038655d41d9d053d9be0cf0a3b66aa2280",
}
_SUBSETS = ("all", "mono", "poly")
_ROUNDS = 12
_LEVEL, _SPREAD = 128.0, 40.0  # grey levels that brightness="normalise" brings every image to


def load(
    *,
    root: Path,
    image_size: int = 64,
    subset: str = "all",
    brightness: str = "none",
    on_bad_image: str = "fail",
) -> ImageDataset:
    """The cells, one grey channel: good (defect probability 0) or defective (1); the grades 1/3 and 2/3 are dropped.

    Mean darkness alone separates the two at an AUROC near 0.78, so a result needs that floor beside it, or the
    brightness taken out.

    Args:
        root: The data root; `root/elpv` is read where it exists, else the package `elpv-dataset`.
        image_size: Side of the images, pixels.
        subset: "mono" or "poly" crystalline cells, or "all".
        brightness: "none", or "normalise": each image is shifted and scaled to mean 128 and standard deviation 40
            grey levels, so that neither overall darkness nor contrast tells the classes apart.
        on_bad_image: "fail" or "skip".

    Raises:
        InvalidInput: An option is not allowed, or the data set is not there.
        CorruptFile: labels.csv is not in its format.
    """
    if brightness not in ("none", "normalise"):
        raise InvalidInput(f"brightness must be none or normalise, got {brightness!r}.")
    listing = list_elpv(root=root, subset=subset)
    dataset = load_listing(listing, root, image_size=image_size, channels=1, on_bad_image=on_bad_image)
    if brightness == "normalise":
        dataset = dataclasses.replace(dataset, images=normalise_brightness(dataset.images))
    return dataset


def list_elpv(*, root: Path, subset: str = "all", **_: Any) -> Listing:
    """The images of a subset and their labels.

    Raises:
        InvalidInput: `subset` is not allowed, or the data set is not there.
        CorruptFile: labels.csv is not in its format.
    """
    if subset not in _SUBSETS:
        raise InvalidInput(f"subset must be one of {', '.join(_SUBSETS)}, got {subset!r}.")
    base = find(root)
    files, problems, dropped = [], [], 0
    for path, probability, kind in _read_labels(base / "labels.csv"):
        if subset not in ("all", kind):
            continue
        if probability not in (0.0, 1.0):
            dropped += 1
            continue
        try:
            files.append(stamped(path, int(probability)))
        except (OSError, BadImage) as error:
            problems.append(Problem(path, getattr(error, "strerror", None) or str(error)))
    sha256 = _digests(base, root)
    source = {
        "licence": LICENCE,
        "sha256": sha256,
        "published_sha256": "all match" if sha256 == _SHA256 else "the files differ from those of elpv-dataset 1.0.0",
        "ambiguous_dropped": dropped,
    }
    return Listing("elpv", base, files, ("good", "defective"), ("defective",), False, False, problems, source)


def find(root: Path) -> Path:
    """The folder with labels.csv and images/: `root/elpv`, else inside the installed package `elpv-dataset`.

    Raises:
        InvalidInput: In neither.
    """
    places = [root / "elpv"]
    package = importlib.util.find_spec("elpv_dataset")  # found, not imported
    for folder in (package.submodule_search_locations or []) if package else []:
        places.append(Path(folder) / "data")
    for place in places:
        if (place / "labels.csv").is_file():
            return place
    raise InvalidInput(
        f"Data set 'elpv' is not in {places[0].absolute()}, nor is the package elpv-dataset installed. Run pip install "
        f"'ganomaly-plugin[elpv]', or put labels.csv and images/ there, or set --data-root or {ROOT_VARIABLE}. "
        f"It is licensed {LICENCE}."
    )


def _digests(base: Path, root: Path) -> dict[str, str]:
    images = sorted((base / "images").glob("*.png")) if (base / "images").is_dir() else []
    found = remembered_digests([base / "labels.csv", *images], root)
    lines = "".join(f"{found[path]['sha256']}  {path.name}\n" for path in images)
    return {"labels.csv": found[base / "labels.csv"]["sha256"], "images": hashlib.sha256(lines.encode()).hexdigest()}


def _read_labels(path: Path) -> list[tuple[Path, float, str]]:
    """(image, defect probability, mono or poly) of each line of labels.csv, which is separated by blanks."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            name, probability, kind = words
            rows.append((path.parent / name, float(probability), kind))
        except ValueError as error:
            raise CorruptFile(f"{path}, line {number}: expected an image, a probability and a kind, got {line!r}.") from error
    return rows


def normalise_brightness(images: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """uint8 images `(n, c, h, w)`, each shifted and scaled to mean 128 and standard deviation 40, clipping included.

    Clipping alone would move the mean again, and further for images with more extreme pixels: a trace of brightness
    that still ranks defects. So the shift and scale are corrected until they hold after clipping.
    """
    normalised = np.empty(images.shape, dtype=np.uint8)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk].astype(np.float32)
        level = part
        for _ in range(_ROUNDS):
            mean = level.mean((1, 2, 3), keepdims=True)
            spread = np.maximum(level.std((1, 2, 3), keepdims=True), 1.0)  # of a blank image: nothing to scale
            part = (part - mean) * (_SPREAD / spread) + _LEVEL
            level = np.clip(part, 0, 255)
        normalised[start : start + chunk] = np.round(level)
    return normalised
