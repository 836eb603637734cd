"""Names → detectors and data sets, resolved lazily; other packages add theirs through entry points.

Adding a built-in is one line in `DETECTORS` or `DATASETS`. Another package declares the entry point groups
`ganomaly_plugin.detectors` or `ganomaly_plugin.datasets`; two packages that claim one name are an error.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import operator
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from ganomaly_plugin.errors import BenchError, CorruptFile, InvalidInput, one_line, unknown

if TYPE_CHECKING:
    from ganomaly_plugin.detectors.base import BaseDetector


@dataclass(frozen=True)
class Entry:
    """One registered name: where its object lives (`module:attribute`) and what it is, in a line."""

    name: str
    target: str
    summary: str
    source: str = "ganomaly-plugin"


def _builtin(name: str, target: str, summary: str) -> Entry:
    return Entry(name, f"ganomaly_plugin.{target}", summary)


DETECTORS = (
    _builtin("ganomaly", "detectors.ganomaly:GanomalyRecipe", "GANomaly (ACCV 2018), as its authors' code"),
    _builtin("ganomaly_plus", "detectors.ganomaly_plus:GanomalyPlusRecipe", "GANomaly with a calibrated score, for small sets"),
    _builtin("ae", "detectors.ae:AutoencoderRecipe", "convolutional autoencoder, L1 or MSE"),
    _builtin("vae", "detectors.vae:VaeRecipe", "variational autoencoder; reconstruction error or negative ELBO"),
    _builtin("skip_ganomaly", "detectors.skip_ganomaly:SkipGanomalyRecipe", "Skip-GANomaly (IJCNN 2019), a U-Net generator"),
    _builtin("egbad", "detectors.egbad:EgbadRecipe", "EGBAD (2018), a bidirectional GAN"),
    _builtin("alad", "detectors.alad:AladRecipe", "ALAD (ICDM 2018), a cycle-consistent bidirectional GAN"),
    _builtin("f_anogan", "detectors.f_anogan:FAnoganRecipe", "f-AnoGAN (2019), a WGAN-GP and an encoder of it"),
    _builtin("anogan", "detectors.anogan:AnoganRecipe", "AnoGAN (IPMI 2017), a DCGAN searched for each image; slow to score"),
    _builtin("pca", "detectors.classical:Pca", "reconstruction error after principal component analysis, on pixels"),
    _builtin("knn", "detectors.classical:NearestNeighbours", "distance from the nearest training images, on pixels"),
    _builtin("iforest", "detectors.classical:IsolationForestDetector", "isolation forest, on pixels"),
    _builtin("ocsvm", "detectors.classical:OneClassSvm", "one-class SVM with an RBF kernel, on pixels"),
    _builtin("mean_intensity", "detectors.mean_intensity:MeanIntensity", "the floor: distance of the mean brightness"),
    _builtin("anomalib:", "detectors.anomalib_models:AnomalibDetector", "any model of anomalib, as anomalib:Padim"),
)

DATASETS = (
    _builtin("digits", "datasets.digits:load", "scikit-learn's 1,797 handwritten digits; no download"),
    _builtin("mnist", "datasets.torchvision_sets:mnist", "70,000 handwritten digits, 28×28"),
    _builtin("fashion_mnist", "datasets.torchvision_sets:fashion_mnist", "70,000 clothes, 28×28"),
    _builtin("kmnist", "datasets.torchvision_sets:kmnist", "70,000 cursive Japanese characters, 28×28"),
    _builtin("emnist", "datasets.torchvision_sets:emnist", "letters and digits, 28×28; split=balanced|letters|..."),
    _builtin("cifar10", "datasets.torchvision_sets:cifar10", "60,000 colour photographs of 10 things, 32×32"),
    _builtin("cifar100", "datasets.torchvision_sets:cifar100", "60,000 colour photographs, 32×32; labels=fine|coarse"),
    _builtin("svhn", "datasets.torchvision_sets:svhn", "99,289 house number digits in colour, 32×32"),
    _builtin("stl10", "datasets.torchvision_sets:stl10", "13,000 colour photographs of 10 things, 96×96"),
    _builtin("elpv", "datasets.elpv:load", "2,624 solar cells with real defects; subset=all|mono|poly"),
    _builtin(
        "synthetic_defects", "datasets.synthetic_defects:load", "normal images and seeded defects; base=textures|elpv|..."
    ),
    _builtin("folder:", "datasets.folder:load", "any folder of images, as folder:PATH"),
    _builtin("anomalib:", "datasets.anomalib_sets:load", "MVTec AD, VisA, BTech, ..., as anomalib:MVTecAD"),
)

_ON_PATH = " Put the folder that it is in on PYTHONPATH: PYTHONPATH=. bench …"
_ELSE = {
    "detector": "Or give a class path, package.module:Class.",
    "data set": "Or give a folder of images, folder:PATH, or a class path, package.module:function.",
}
_GROUPS = {"detector": ("ganomaly_plugin.detectors", DETECTORS), "data set": ("ganomaly_plugin.datasets", DATASETS)}


@functools.lru_cache(maxsize=8)
def _points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of `group` of what is installed in `path`, which is slow to look through for every job."""
    return tuple(entry_points(group=group))


def entries(kind: str) -> dict[str, Entry]:
    """All registered entries of `kind` ("detector" or "data set") by name, those of other packages included.

    Raises:
        InvalidInput: Two packages claim one name.
    """
    group, builtins = _GROUPS[kind]
    found = {entry.name: entry for entry in builtins}
    for point in _points(group, tuple(sys.path)):
        source = point.dist.name if point.dist else "an unnamed package"
        known = found.get(point.name)
        if known is not None and (known.target, known.source) != (point.value, source):
            raise InvalidInput(
                f"The {kind} name {point.name!r} is claimed twice: by {known.source} ({known.target}) and by {source} "
                f"({point.value}). Uninstall one of them, or have its author choose another name."
            )
        found[point.name] = Entry(point.name, point.value, f"from {source}", source)
    return found


def _entry(known: Mapping[str, Entry], name: str) -> Entry | None:
    """The entry of `name`, itself or as a member of a family."""
    family, colon, _ = name.partition(":")
    return known.get(name) or known.get(family + colon)


def is_registered(kind: str, name: str) -> bool:
    """Whether `name` is registered, itself or as a member of a family: resolving it imports no class path."""
    return _entry(entries(kind), name) is not None


def list_detectors(pattern: str = "*") -> list[str]:
    """Names of the registered detectors that match a shell pattern, sorted."""
    if not isinstance(pattern, str):
        raise InvalidInput(f"A pattern must be text, got {pattern!r}. Write '*' for all names.")
    return sorted(fnmatch.filter(entries("detector"), pattern))


def detectors_like(name: str) -> list[str]:
    """The detectors that a shell pattern names, families left out; a name that is no pattern comes back alone.

    Raises:
        InvalidInput: The pattern matches none.
    """
    if not set("*?") & set(name):
        return [name]
    known = [each for each in list_detectors() if not each.endswith(":")]
    found = fnmatch.filter(known, name)
    if not found:
        raise unknown("detector pattern", name, known)
    return found


def anomalib_modules() -> dict[str, str]:
    """The recipes of this package by the name of their anomalib module: `Ganomaly` is made of `…:GanomalyRecipe`."""
    targets = [entry.target for entry in DETECTORS if entry.target.endswith("Recipe")]
    return {target.partition(":")[2].removesuffix("Recipe"): target for target in targets}


def resolve(kind: str, name: str) -> Any:
    """The object registered as `name`, or named by a class path `module:attribute`.

    A registered name that ends in a colon is a family: `folder:PATH` resolves to the object of `folder:` with PATH
    as its first argument, and `anomalib:NAME` to what `for_name(NAME)` of the object of `anomalib:` returns.

    Raises:
        InvalidInput: The name is unknown, or its module cannot be imported.
    """
    known = entries(kind)
    if not isinstance(name, str):
        raise unknown(kind, name, known, todo=_ELSE[kind])
    bare = name.partition("[")[0]
    if name.endswith("]") and bare in known:  # as tables and command lines write it
        raise InvalidInput(f"{name!r} is a name with options. Give {bare!r}, and options as keyword arguments.")
    entry = _entry(known, name)
    target = name if entry is None else entry.target
    module, _, attribute = target.partition(":")
    if not attribute and entry is not None:
        raise InvalidInput(f"{kind} {name!r} is registered as {target!r}, which names no object. Register module:attribute.")
    if not attribute:
        raise unknown(kind, name, known, todo=_ELSE[kind])
    if entry is not None and name == entry.name and name.endswith(":"):
        raise InvalidInput(f"{kind} {name!r} needs a name or a path after the colon.")
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as error:  # a user's module may raise anything, a SyntaxError first of all, or exit
        todo = ""
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):  # not one that it imports
            todo = f" Install {entry.source} anew, which registers it." if entry else _ON_PATH
        raise InvalidInput(f"Cannot import {kind} {name!r} ({target}): {one_line(error)}.{todo}") from error
    if kind == "detector" and not _looks_like_a_detector(found):
        raise InvalidInput(f"{name!r} ({target}) is not a detector. Give a Recipe, or a class with fit and score.")
    if not callable(found):
        raise InvalidInput(f"{name!r} ({target}) is not a {kind}: it cannot be called. Give a function or a class.")
    if entry is None or name == entry.name:
        return found
    argument = name.removeprefix(entry.name)
    return found.for_name(argument) if hasattr(found, "for_name") else functools.partial(found, argument)


def _looks_like_a_detector(found: Any) -> bool:
    """Whether `found` is a recipe, told by its stages, or a class with the detector's methods."""
    return isinstance(found, type) and hasattr(found, "score") and (hasattr(found, "stages") or hasattr(found, "fit"))


def make_detector(name: str, /, **hparams: Any) -> BaseDetector:
    """A fresh detector.

    Args:
        name: A registered name (`list_detectors()`; behind one that ends in a colon comes a model's name) or a class path
            `package.module:Class`.
        **hparams: The method's hyperparameters; those left out take the published defaults.

    Raises:
        InvalidInput: The name or a hyperparameter is unknown, or a value is not allowed.
    """
    from ganomaly_plugin.hparams import checked_hparams, default_hparams
    from ganomaly_plugin.recipe import Recipe

    cls = resolve("detector", name)
    arguments = checked_hparams(name, cls, hparams)
    try:
        made = cls(**arguments)
    except BenchError:
        raise
    except (Exception, SystemExit) as error:  # abstract, an argument without default not given, or a value it does not take
        raise InvalidInput(f"Cannot make detector {name!r}: {one_line(error)}. Complete its class or its options.") from error
    if isinstance(made, Recipe):
        from ganomaly_plugin.training.detector import RecipeDetector

        detector: BaseDetector = RecipeDetector(made)
    else:
        detector = made
    if "name" in default_hparams(cls) and getattr(detector, "name", None):
        return detector  # it goes by an option of its own
    with contextlib.suppress(AttributeError):  # another package's object may be frozen or have slots; the name is optional
        detector.name = name
    return detector


def load_detector(path: str | os.PathLike[str], *, device: str = "auto", name: str | None = None) -> BaseDetector:
    """The fitted detector that `save` wrote to `path`. The file is read without unpickling code.

    Args:
        path: The file.
        device: Where the detector scores: "auto", "cpu", "cuda" or "cuda:N".
        name: Needed only for a detector that is not registered: the class path you trust this file to use.

    Raises:
        InvalidInput: No such file, or the detector is not registered and `name` was not given.
        CorruptFile: The file is damaged or of another format.
    """
    from ganomaly_plugin.detectors.base import read_detector_file, resolve_device

    content = read_detector_file(path)
    saved = content.get("name")
    if name is None and not is_registered("detector", str(saved)):
        raise InvalidInput(
            f"{path} holds a detector {saved!r} that is not registered. If you trust it, pass its class path as name=."
        )
    try:
        detector = make_detector(name or str(saved), **content["hparams"])
        if not hasattr(detector, "_load_state"):
            raise InvalidInput(f"{name or saved} cannot be loaded: it has no _load_state. Subclass BaseDetector to get files.")
        c, h, w = content["image_shape"]
        detector.image_shape_ = (int(c), int(h), int(w))
        detector._load_state(content["state"], resolve_device(device))
    except BenchError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is not a complete detector file: {one_line(error)}. Save it again.") from error
    return detector
