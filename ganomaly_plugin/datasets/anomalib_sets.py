"""anomalib's industrial sets (MVTec AD, VisA, BTech, ...) through its own data modules: `anomalib:MVTecAD`.

anomalib says which image belongs to which part and has which mask; the pixels are decoded as those of any folder.
It is imported inside the functions, since it takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ganomaly_plugin.datasets.base import ROOT_VARIABLE, ImageDataset
from ganomaly_plugin.datasets.decode import BadImage
from ganomaly_plugin.datasets.folder import ANOMALY, NORMAL, check_normals
from ganomaly_plugin.datasets.imagefiles import Listing, Problem, load_listing, stamped
from ganomaly_plugin.errors import InvalidInput, check_known, one_line
from ganomaly_plugin.escape import storable

_PREFIX = "anomalib:"
_LEFT_OUT = {"Folder", "Datumaro", "Tabular"}  # they are no data sets, but ways to describe one


def load(
    name: str,
    *,
    root: Path,
    image_size: int = 64,
    category: str = "",
    channels: int = 0,
    fit: str = "crop",
    on_bad_image: str = "fail",
) -> ImageDataset:
    """One category of an anomalib data set, with its official split, and masks where it has them.

    Classes are good and anomaly. anomalib's own validation images, where a set has some, are left out.

    Args:
        name: The data module's class in `anomalib.data`, such as MVTecAD.
        root: The data root; the set is below it in the folder anomalib uses, such as MVTecAD/.
        image_size: Side of the images, pixels.
        category: Such as bottle; "" only for a set without categories (see `expand`).
        channels: 1, 3, or 0: 1 when every image is grey, else 3.
        fit: "crop" or "pad", as of `folder`.
        on_bad_image: "fail" or "skip".

    Raises:
        InvalidInput: The name or category is unknown, or the files are not there and cannot be downloaded.
        BadImages: Images are not usable.
    """
    listing = list_anomalib(name, root=root, category=category)
    dataset = load_listing(listing, root, image_size=image_size, channels=channels, fit=fit, on_bad_image=on_bad_image)
    check_normals(dataset)
    return dataset


def expand(name: str, root: Path, options: dict[str, Any] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The data sets that `anomalib:NAME` stands for: one a category when no category is given.

    Args:
        name: With or without `anomalib:`; any other data set's name comes back alone.
        root: The data root.
        options: The user's options; those beside `category` go to every entry.

    Returns:
        (name, options) of each: the categories whose folders are there, or all of anomalib's when none is.
    """
    options = dict(options or {})
    if not name.startswith(_PREFIX) or options.get("category"):
        return [(name, options)]
    known = categories(name.removeprefix(_PREFIX))
    folder = _folder(_module_class(name.removeprefix(_PREFIX)), root)
    present = [category for category in known if any((place / category).is_dir() for place in _places(folder))]
    return [(name, {**options, "category": category}) for category in present or known] or [(name, options)]


def names() -> list[str]:
    """The image data sets anomalib has."""
    import anomalib.data.datamodules.image as module

    return sorted(n for n, value in vars(module).items() if inspect.isclass(value) and _is_module(value) and n not in _LEFT_OUT)


def categories(name: str) -> list[str]:
    """The categories anomalib knows of the data set `name`; none for a set without."""
    cls = _module_class(name)
    if "category" not in inspect.signature(cls).parameters:
        return []
    stem = cls.__module__.rpartition(".")[2]
    known = getattr(importlib.import_module(f"anomalib.data.datasets.image.{stem}"), "CATEGORIES", ())
    return [str(category) for category in known]


def list_anomalib(name: str, *, root: Path, category: str = "", download: bool = True, **_: Any) -> Listing:
    """The image files of one category, as anomalib's data module lists them.

    Raises:
        InvalidInput: The name or category is unknown, or the files are not there and cannot be downloaded.
    """
    cls = _module_class(name)
    from anomalib.data.utils import TestSplitMode

    known = categories(name)
    if known:
        check_known(f"category of {_PREFIX}{name}", category, known, todo=f"Write {_PREFIX}{name}[category={known[0]}].")
    elif category:
        raise InvalidInput(f"{_PREFIX}{name} has no categories, got {category!r}. Leave category out.")
    base = _folder(cls, root)
    module = cls(root=str(base), **({"category": category} if category else {}), **_no_extra_splits(cls))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it has to say
            if download:
                module.prepare_data()
            # The default of Real-IAD and MVTec AD 2, "none", drops the normal images of the test part.
            module.test_split_mode = TestSplitMode.FROM_DIR
            module.setup()
    except Exception as error:  # anomalib's, tarfile's, urllib's, pandas' and OSError
        where = base / category if category else base
        raise InvalidInput(
            f"{_PREFIX}{name} cannot be read from {where.absolute()}: {one_line(error)[:300]} Put the files there as anomalib "
            f"lays them out, or set --data-root or {ROOT_VARIABLE} to the folder that has {base.name}."
        ) from error
    within = base / category  # not where VisA keeps them
    return _listing(name, category, within if within.is_dir() else base, module)


def _listing(name: str, category: str, base: Path, module: Any) -> Listing:
    files, problems, kinds = [], [], Counter[str]()
    has_masks = False
    for is_test, part in ((False, module.train_data), (True, module.test_data)):
        for row in part.samples.to_dict("records"):
            label = int(row["label_index"])
            mask = Path(row["mask_path"]) if label == 1 and isinstance(row.get("mask_path"), str) and row["mask_path"] else None
            has_masks |= mask is not None
            path = Path(row["image_path"])
            try:
                files.append(stamped(path, label, is_test, mask))
            except (OSError, BadImage) as error:
                problems.append(Problem(path, getattr(error, "strerror", None) or str(error)))
            if label == 1:
                kinds[storable(str(row.get("label", ANOMALY)))] += 1
    from importlib.metadata import version

    source = {"anomalib": version("anomalib"), "category": category, "files": len(files), "defects": dict(kinds)}
    files.sort(key=lambda file: (file.is_test, str(file.path)))
    shown = f"{_PREFIX}{name}"
    return Listing(shown, base, files, (NORMAL, ANOMALY), (ANOMALY,), True, has_masks, problems, source)


def _module_class(name: str) -> Any:
    try:
        import anomalib.data.datamodules.image as module
    except ImportError as error:
        raise InvalidInput(f"{_PREFIX}{name} needs anomalib: {one_line(error)}. Run pip install anomalib.") from error
    check_known("anomalib data set", name, names())
    return getattr(module, name)


def _is_module(cls: type) -> bool:
    return any(base.__name__ == "AnomalibDataModule" for base in cls.__mro__[1:])


def _folder(cls: Any, root: Path) -> Path:
    """Where the set lies below the data root: the last part of the class's own default, such as MVTecAD."""
    default = inspect.signature(cls).parameters["root"].default
    return root / (Path(default).name if default else cls.__name__)


def _places(folder: Path) -> list[Path]:
    """Folders that may hold the categories' folders: the set's own, and one below (VisA's split, Real-IAD's sizes)."""
    return [folder, *(path for path in (folder.iterdir() if folder.is_dir() else []) if path.is_dir())]


def _no_extra_splits(cls: Any) -> dict[str, Any]:
    """Arguments that keep every test image in the test part: no validation images are taken from it."""
    takes = inspect.signature(cls).parameters
    wanted = {"val_split_mode": "same_as_test", "seed": 0, "num_workers": 0}
    if "val_split_mode" in takes and str(takes["val_split_mode"].default).endswith(("from_dir", "FROM_DIR")):
        wanted.pop("val_split_mode")  # the set has validation images of its own
    return {key: value for key, value in wanted.items() if key in takes}
