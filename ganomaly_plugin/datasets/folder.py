"""A folder of images, in one of three layouts: GANomaly's authors', MVTec's, or plain good/ and bad/."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from ganomaly_plugin.datasets.base import ImageDataset
from ganomaly_plugin.datasets.decode import SUFFIXES, BadImage
from ganomaly_plugin.datasets.imagefiles import ImageFile, Listing, Problem, load_listing, stamped
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.escape import printable, storable
from ganomaly_plugin.files import as_path

NORMAL, ANOMALY = "good", "anomaly"
_LAYOUTS = (
    "train/0.normal, test/0.normal, test/1.abnormal (GANomaly's authors); train/good, test/good, test/<defect> and "
    "perhaps ground_truth/<defect> (MVTec's); or good and bad and perhaps ground_truth/bad"
)

_MASK_ENDINGS = tuple(each for ending in (".png", *sorted(SUFFIXES)) for each in (ending, ending.upper()))


def load(
    path: str,
    *,
    root: Path,
    image_size: int = 64,
    channels: int = 0,
    fit: str = "crop",
    on_bad_image: str = "fail",
    defects: str = "together",
) -> ImageDataset:
    """The images of a folder; `folder:PATH` in a config or on the command line.

    Every format Pillow reads: palettes and CMYK become RGB, alpha is composited on black, 16-bit values are scaled
    from [0, 65535], EXIF orientation is applied, of several images in a file the first is read. Colour images need not
    be of one size.

    Masks of tested defects, and of `bad`, are the files of their names, or with `_mask` behind them, in ground_truth. A defect
    in train, or without a folder there, has none; where there is a folder, every image has one.

    Args:
        path: The folder, as it is or below the data root.
        root: The data root.
        image_size: Side of the images, pixels; 64 as the paper's X-ray photographs.
        channels: 1, 3, or 0: 1 when every image is grey, else 3.
        fit: "crop": the short side to `image_size`, then the centre, as the authors; "pad": all of it, rest black.
        on_bad_image: "fail", or "skip": leave bad images out and count them in the record.
        defects: "together": one class, anomaly; "each": a class for each folder of defects.

    Raises:
        InvalidInput: No such folder or layout, an option is not allowed, or too few normal images.
        BadImages: Images or folders are not usable: damaged, too large, unreadable, empty, with a mask of another size.
    """
    listing = list_folder(path, root=root, defects=defects)
    dataset = load_listing(listing, root, image_size=image_size, channels=channels, fit=fit, on_bad_image=on_bad_image)
    check_normals(dataset)
    return dataset


def check_normals(dataset: ImageDataset) -> None:
    """Raise InvalidInput when there are fewer than two normal images to train on."""
    trainable = dataset.labels == 0 if dataset.is_test is None else (dataset.labels == 0) & ~dataset.is_test
    if trainable.sum() < 2:
        raise InvalidInput(
            f"{dataset.name} has {int(trainable.sum())} normal image{'' if trainable.sum() == 1 else 's'} to train on; at "
            "least 2 are needed, and hundreds to learn from. Add some to the folder of normal training images."
        )


def list_folder(path: str, *, root: Path, defects: str = "together") -> Listing:
    """The image files below `path`, and what is wrong with its folders.

    Raises:
        InvalidInput: No such folder or layout.
    """
    if defects not in ("together", "each"):
        raise InvalidInput(f"defects must be together or each, got {defects!r}.")
    base = as_path(path)
    if not base.is_dir() and (root / base).is_dir():
        base = root / base
    if not base.is_dir():
        below = "" if base.is_absolute() else f", nor {(root / base).absolute()}"
        raise InvalidInput(f"There is no folder {base.absolute()}{below}. Give folder:PATH.")
    problems: list[Problem] = []
    others: Counter[str] = Counter()
    try:
        found = _class_folders(base, problems, others)
    except OSError as error:
        raise InvalidInput(f"{base.absolute()} cannot be read: {_reason(error)}. Mend its permissions.") from error
    for name in (path, *(folder.name for _, _, folder in found)):
        if name != name.encode("utf-8", "replace").decode():
            raise InvalidInput(f"The folder name {printable(name)} is no text in UTF-8, which no table can show. Rename it.")
    kinds = sorted({kind for _, kind, _ in found if kind is not None})
    counts = dict.fromkeys(kinds, 0)
    files: list[ImageFile] = []
    official = all(folder.parent != base for _, _, folder in found)  # a plain pair says nothing of parts
    for is_test, kind, folder in found:
        masks = base / "ground_truth" / folder.name
        masked = kind is not None and (is_test or not official) and masks.is_dir()
        label = 0 if kind is None else 1 if defects == "together" else 1 + kinds.index(kind)
        images = _images(folder, label, is_test, masks if masked else None, problems, others)
        files += images
        if kind is not None:
            counts[kind] += len(images)
    return Listing(
        f"folder:{path}",
        base,
        files,
        (NORMAL, *(kinds if defects == "each" else [ANOMALY])),
        tuple(kinds) if defects == "each" else (ANOMALY,),
        official,
        any(file.mask is not None for file in files),
        problems,
        {"files": len(files), "defects": counts, **({"other_files": dict(sorted(others.items()))} if others else {})},
    )


def _class_folders(base: Path, problems: list[Problem], others: Counter[str]) -> list[tuple[bool, str | None, Path]]:
    """(is test, kind of defect or None for normal, folder) of each class folder of the layout that `base` has.

    Images beside class folders are of no class, and counted in `others`.
    """
    if (base / "train" / "0.normal").is_dir():
        normal, other = "0.normal", "good"
    elif (base / "train" / "good").is_dir():
        normal, other = "good", "0.normal"
    elif (base / "good").is_dir() and (base / "bad").is_dir():
        return [(False, None, base / "good"), (False, "bad", base / "bad")]
    else:
        here = ", ".join(sorted(p.name for p in base.iterdir())[:8]) or "nothing"
        raise InvalidInput(f"{base.absolute()} has none of the known layouts: {_LAYOUTS}. It holds {here}.")
    found = []
    for part in ("train", "test"):
        if not (base / part).is_dir():
            raise InvalidInput(f"{base.absolute()} has train but no test folder. The known layouts: {_LAYOUTS}.")
        try:
            there = [p for p in (base / part).iterdir() if not p.name.startswith(".")]
            names = sorted(p.name for p in there if p.is_dir())
        except OSError as error:
            problems.append(Problem(base / part, _reason(error)))
            continue
        if other in names:  # whose normal images would count as a defect
            raise InvalidInput(f"{base.absolute()} has both train/{normal} and {part}/{other}, of two layouts. Rename one.")
        others.update(f"beside the folders of {part}" for p in there if p.suffix.lower() in SUFFIXES and p.name not in names)
        found += [(part == "test", None if name == normal else name, base / part / name) for name in names]
    return found


def _images(
    folder: Path, label: int, is_test: bool, masks: Path | None, problems: list[Problem], others: Counter[str]
) -> list[ImageFile]:
    """The image files below `folder`; files whose names do not end like images are counted in `others` by their ending."""
    before = len(problems)
    files = []
    for path in _walk(folder, problems, tuple(map(_inode, folder.absolute().parents))):
        if path.suffix.lower() not in SUFFIXES:
            others[storable(path.suffix.lower()) or "none"] += 1
            continue
        try:
            mask = None if masks is None else _mask_of(masks / path.relative_to(folder))
            files.append(stamped(path, label, is_test, mask))
        except OSError as error:
            problems.append(Problem(path, _reason(error)))
        except BadImage as error:
            problems.append(Problem(path, str(error)))
    if not files and len(problems) == before:
        problems.append(Problem(folder, "an empty class folder"))
    return files


def _mask_of(place: Path) -> Path:
    """The mask whose image would be at `place` in the ground truth: NAME_mask.* or NAME.*."""
    for stem in (f"{place.stem}_mask", place.stem):
        for suffix in dict.fromkeys((place.suffix, *_MASK_ENDINGS)):
            candidate = place.with_name(stem + suffix)
            if candidate.is_file():
                return candidate
    raise BadImage(f"no mask {place.parent.parent.name}/{place.parent.name}/{place.stem}_mask.png")


def _walk(folder: Path, problems: list[Problem], above: tuple[tuple[int, int], ...] = ()) -> list[Path]:
    """Files below `folder`, sorted, the hidden left out, links followed; a link back to a folder `above` is a problem."""
    try:
        inode = _inode(folder)
        if inode in above:
            problems.append(Problem(folder, "a symlink loop"))
            return []
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        problems.append(Problem(folder, _reason(error)))
        return []
    paths: list[Path] = []
    for entry in listed:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        try:
            is_folder = entry.is_dir()
        except OSError as error:
            problems.append(Problem(path, _reason(error)))
            continue
        if is_folder:
            paths += _walk(path, problems, (*above, inode))
        else:
            paths.append(path)
    return paths


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _reason(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if error.errno is not None and error.strerror and "symbolic links" in error.strerror:
        return "a symlink loop"
    if isinstance(error, FileNotFoundError):
        return "a link to a file that is not there"
    return error.strerror or str(error)
