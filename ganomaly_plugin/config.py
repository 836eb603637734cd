"""Command line and YAML → Experiment → list[Job]. Every name and value is checked here, before any work starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ganomaly_plugin.core import Job
from ganomaly_plugin.datasets.anomalib_sets import expand as expand_categories
from ganomaly_plugin.datasets.base import MAX_SIDE, ImageDataset, check_options, data_root, default_options, load_dataset
from ganomaly_plugin.datasets.splits import Protocol, categories, check_shares, get_protocol, make_split
from ganomaly_plugin.errors import InvalidInput, nearest, one_line, unknown
from ganomaly_plugin.hparams import (
    canonical_hparams,
    check_recordable,
    check_told,
    checked_hparams,
    default_hparams,
    recorded_hparams,
    told_hparams,
)
from ganomaly_plugin.recipe import Recipe
from ganomaly_plugin.registry import detectors_like, make_detector, resolve
from ganomaly_plugin.selection import Selection, show


@dataclass(frozen=True)
class Experiment:
    """A sweep, as the user described it: models × data sets × protocols × classes × seeds.

    Attributes:
        models: Detectors, with hyperparameters; a name may be a shell pattern. `epochs` among them is a budget.
        datasets: Data sets, with their options.
        protocols: Protocol ids.
        classes: Which classes take their turn; None: all.
        seeds: Each class is run once a seed.
        epochs: Training budget of every model; None: each model's published one.
        steps: The budget in steps instead, of every model that trains in steps.
        image_size: Side of the images in pixels; None: the data set's default.
        hparams: Hyperparameters for every model that has them; one that no model has is an error.
        preset: Likewise, from the quickstart: weaker than `hparams`, and ignored where no model has them.
        train_fraction: Share of the normal training images to train on.
        contamination: Share of the training images that are anomalies.
        on_bad_image: "fail" or "skip", for data sets that read image files; None: as their options say.
        limit: Only the first so many jobs.
        out: Results folder.
        data_root: Folder of the data sets.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    models: list[Selection]
    datasets: list[Selection]
    protocols: list[str]
    classes: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    epochs: int | None = None
    steps: int | None = None
    image_size: int | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)
    train_fraction: float = 1.0
    contamination: float = 0.0
    on_bad_image: str | None = None
    limit: int | None = None
    out: str = "results/quickstart"
    data_root: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Model:
    """A selected detector with its hyperparameters resolved."""

    name: str
    given: Mapping[str, Any]  # as the user set them, for the label
    epochs: int | None
    default_epochs: int | None
    has_epochs: bool
    protocol_batchnorm: bool
    cls: Any
    steps: int | None = None
    default_steps: int | None = None

    def job_fields(self, protocol: Protocol) -> dict[str, Any]:
        """The job's detector, hparams, epochs and label under `protocol`."""
        hparams = dict(self.given)
        if self.protocol_batchnorm and "batchnorm" not in hparams:
            hparams["batchnorm"] = protocol.batchnorm
        resolved = resolved_hparams(self.name, self.cls, hparams)
        epochs = (self.epochs or self.default_epochs) if self.has_epochs and self.steps is None else None
        defaults = canonical_hparams(self.cls, default_hparams(self.cls))
        if self.protocol_batchnorm:  # a name without options means the protocol's, and another choice shows
            defaults["batchnorm"] = protocol.batchnorm
        given = canonical_hparams(self.cls, self.given)
        shown = {key: value for key, value in given.items() if value != defaults.get(key)}
        if epochs is not None and (self.default_steps is not None or epochs != self.default_epochs):
            shown["epochs"] = epochs
        if self.steps is not None and self.steps != self.default_steps:
            shown["steps"] = self.steps
        label = show(self.name, shown)
        return {"detector": self.name, "hparams": resolved, "epochs": epochs, "steps": self.steps, "label": label}


def resolved_hparams(name: str, cls: Any, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a detector made with `hparams`, defaults filled in, as its job holds them.

    Raises:
        InvalidInput: A hyperparameter is not usable, the detector does not tell it, or its record would not make it again.
    """
    given = dict(hparams)
    told = told_hparams(name, make_detector(name, **given))
    if told:
        check_told(name, cls, given, told)
    return recorded_hparams(name, cls, told or {**default_hparams(cls), **checked_hparams(name, cls, given)})


def check_keys(path: str) -> None:
    """Raise InvalidInput for what goes unnoticed in a YAML file, which has been read before.

    That is the first of two values of a key, and numbers to the base of 60 or 8: 1:30 is 90 to YAML, and 010 is 8.
    """

    def look(node: Any) -> None:
        if node is not None and node.tag.endswith(":int") and re.match(r"[-+]?0\d|.*:", node.value):
            raise InvalidInput(f"{path} has {node.value}, which is another number to YAML. Write it out, or put it in quotes.")
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        names = [key.value for key, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise InvalidInput(f"{path} sets {name!r} twice, and only the last would count. Keep one.")
        for part in [value for _, value in pairs] or (node.value if isinstance(node, yaml.SequenceNode) else []):
            look(part)

    try:
        look(yaml.compose(Path(path).read_text(encoding="utf-8-sig")))
    except yaml.YAMLError as error:  # such as a tab, which the parser's own reader of YAML lets pass
        raise InvalidInput(f"The config {path} is no YAML: {one_line(error)}. Mend that; write spaces for tabs.") from error


def expand(experiment: Experiment, splits: dict[str, str] | None = None) -> list[Job]:
    """The jobs of a sweep in the order they run: data set, protocol, class, seed, then model.

    Args:
        experiment: The sweep.
        splits: Where the digest of each job's split goes, by the job's key.

    Raises:
        InvalidInput: Anything in the experiment is unknown, not allowed or not there; nothing has been run then.
    """
    check_budget(experiment)
    models = select_models(experiment)
    sampling: dict[str, Any] = {}
    if experiment.train_fraction != 1.0:
        sampling["train_fraction"] = experiment.train_fraction
    if experiment.contamination != 0.0:
        sampling["contamination"] = experiment.contamination
    jobs: dict[str, Job] = {}
    unused = set(experiment.classes or [])
    for name, options in select_datasets(experiment):
        dataset = load_dataset(name, root=experiment.data_root, **options)
        shape = tuple(int(v) for v in dataset.images.shape[1:])
        for model in models:
            check_shape(model, shape)
        for protocol in map(get_protocol, experiment.protocols):
            chosen = choose_classes(dataset, protocol, experiment.classes)
            unused -= set(chosen)
            fields = [model.job_fields(protocol) for model in models]
            for category in chosen:
                for seed in experiment.seeds:
                    split = make_split(dataset, protocol.id, category, seed, **sampling)
                    for model_fields in fields:
                        job = Job(
                            dataset=name,
                            data=options,
                            protocol=protocol.id,
                            category=category,
                            seed=seed,
                            sampling=sampling,
                            **model_fields,
                        )
                        jobs.setdefault(_key(job), job)
                        if splits is not None:
                            splits[job.key] = split.digest
    if unused:
        name = sorted(unused)[0]
        todo = "Write each class, as in 0,1,2: ranges are for seeds." if re.fullmatch(r"\d+-\d+", name) else ""
        raise unknown("class", name, _all_categories(experiment), todo=todo)
    return list(jobs.values())[: experiment.limit]


def _key(job: Job) -> str:
    """The job's key.

    Raises:
        InvalidInput: It has an option that no record can hold, such as an infinite number.
    """
    try:
        return job.key
    except (TypeError, ValueError):
        check_recordable(job.dataset, job.data)
        check_recordable(job.detector, job.hparams)
        raise


def check_budget(experiment: Experiment) -> None:
    """Raise InvalidInput for a number that no sweep can have, or an empty list."""
    for name in ("models", "datasets", "protocols", "classes"):
        if getattr(experiment, name) in ([], ()):
            raise InvalidInput(f"{name} is empty. Give at least one; bench ls shows what there is.")
    for name in ("epochs", "steps", "limit"):
        value = getattr(experiment, name)
        if value is not None and value < 1:
            raise InvalidInput(f"{name} must be at least 1, got {value}.")
    if experiment.epochs is not None and experiment.steps is not None:
        raise InvalidInput(f"The budget is epochs={experiment.epochs} and steps={experiment.steps}. Give one of them.")
    if experiment.image_size is not None and not 1 <= experiment.image_size <= MAX_SIDE:
        raise InvalidInput(f"image_size must be at least 1 and at most {MAX_SIDE}, got {experiment.image_size}.")
    if experiment.on_bad_image not in (None, "fail", "skip"):
        raise InvalidInput(f"on_bad_image must be fail or skip, got {experiment.on_bad_image!r}.")
    check_shares(experiment.train_fraction, experiment.contamination)


def select_models(experiment: Experiment) -> list[Model]:
    """The experiment's models, patterns expanded, every hyperparameter checked."""
    models: list[Model] = []
    used: set[str] = set()
    for selection in experiment.models:
        for name in detectors_like(selection.name):
            model, shared = _select(name, selection.options, experiment)
            used |= shared
            models.append(model)
    left = set(experiment.hparams) - used
    if left:
        name, known = min(left, key=str), {key for model in models for key in default_hparams(model.cls)}
        todo = "bench ls NAME shows those of a model."
        raise InvalidInput(f"No selected model has a hyperparameter {name!r}.{nearest(name, known)} {todo}")
    return models


def _select(name: str, options: Mapping[str, Any], experiment: Experiment) -> tuple[Model, set[str]]:
    cls = resolve("detector", name)
    known = default_hparams(cls)
    shared = {key: value for key, value in experiment.hparams.items() if key in known}
    preset = {key: value for key, value in experiment.preset.items() if key in known}
    given = {**preset, **shared, **options}
    epochs = given.pop("epochs", experiment.epochs) if "epochs" not in known else experiment.epochs
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
        raise InvalidInput(f"epochs must be a whole number of at least 1, got {epochs!r}.")
    recipe = isinstance(cls, type) and issubclass(cls, Recipe)
    default_steps = getattr(cls, "default_steps", None)
    steps = _steps(given, options, experiment, recipe or getattr(cls, "has_steps", False), default_steps)
    if steps is not None and "epochs" in options:
        raise InvalidInput(f"{name} has a budget of epochs={epochs} and of steps={steps}. Give one of them.")
    has_epochs = recipe or getattr(cls, "has_epochs", True)
    if "epochs" in options and "epochs" not in known and not has_epochs:
        raise InvalidInput(f"{name} does not train in epochs, got epochs={epochs}. Leave epochs out.")
    resolved_hparams(name, cls, given)
    model = Model(
        name=name,
        given=given,
        epochs=epochs,
        default_epochs=getattr(cls, "default_epochs", None),
        has_epochs=has_epochs,
        protocol_batchnorm="batchnorm" in known and getattr(cls, "protocol_batchnorm", True),
        cls=cls,
        steps=steps,
        default_steps=default_steps,
    )
    return model, set(shared)


def _steps(
    given: dict[str, Any], options: Mapping[str, Any], experiment: Experiment, trains_in_steps: bool, default: int | None
) -> int | None:
    """The model's budget in steps, taken out of `given`; its own epochs or steps come before the experiment's."""
    own = given.pop("steps", None) if trains_in_steps else None
    steps = experiment.steps if own is None and trains_in_steps and "epochs" not in options else own
    if steps is None and experiment.epochs is None and "epochs" not in options:
        steps = default
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InvalidInput(f"steps must be a whole number of at least 1, got {steps!r}.")
    return steps


def check_shape(model: Model, chw: tuple[int, ...]) -> None:
    """Raise InvalidInput when the model cannot take images of `(c, h, w)`."""
    check = getattr(make_detector(model.name, **dict(model.given)), "check_shape", None)
    if check is None:
        return
    try:
        check(chw)
    except InvalidInput as error:
        raise InvalidInput(f"{model.name}: {error}") from error


def select_datasets(experiment: Experiment) -> list[tuple[str, dict[str, Any]]]:
    """The experiment's data sets with their options resolved; a set of categories counts once for each category."""
    root = data_root(experiment.data_root)
    return [
        (name, dataset_options(Selection(name, options), experiment))
        for selection in experiment.datasets
        for name, options in expand_categories(selection.name, root, dict(selection.options))
    ]


def dataset_options(selection: Selection, experiment: Experiment) -> dict[str, Any]:
    """The data set's options with defaults filled in; the experiment's apply unless the selection sets its own."""
    options = dict(selection.options)
    known = default_options(selection.name)
    for key in ("image_size", "on_bad_image"):
        value = getattr(experiment, key)
        if value is not None and key in known:
            options.setdefault(key, value)
    return check_options(selection.name, options)


def choose_classes(dataset: ImageDataset, protocol: Protocol, wanted: list[str] | None) -> list[str]:
    """Those of `wanted` that are classes of `dataset` under `protocol`; all of its classes for None."""
    allowed = categories(dataset, protocol)
    return list(allowed) if wanted is None else [name for name in dict.fromkeys(wanted) if name in allowed]


def _all_categories(experiment: Experiment) -> list[str]:
    found: set[str] = set()
    for name, options in select_datasets(experiment):
        dataset = load_dataset(name, root=experiment.data_root, **options)
        for protocol in experiment.protocols:
            found |= set(categories(dataset, get_protocol(protocol)))
    return sorted(found)
