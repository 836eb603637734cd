"""A recipe is the maths of ONE model: networks, losses, score. It holds no device, loop, optimiser step or seed.

Trainers turn a recipe into a detector, so a method is written once and trained by any of them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.networks import check_square

Networks: TypeAlias = Mapping[str, nn.Module]
Tensors: TypeAlias = Mapping[str, Tensor]
Precision: TypeAlias = Literal["float32", "tf32", "bf16"]

CALIBRATION_LIMIT = 1024  # training images that a recipe's calibration sees at most, and held-out ones likewise
FEWEST_HELD_OUT = 10  # images; a mean and a deviation of fewer are noise, and calibration falls back to training images


@dataclass(frozen=True)
class StepInput:
    """What a phase may read: the batch, the step's random numbers, and what earlier phases of the step computed."""

    images: Tensor  # (b, c, h, w) in the recipe's input range
    draws: Tensors
    earlier: Tensors


PhaseLoss: TypeAlias = Callable[[Networks, StepInput], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Optimiser:
    """The update rule of a phase; `kind` names the torch optimiser."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["adam", "rmsprop"] = "adam"


@dataclass(frozen=True)
class Phase:
    """One update within a step: which networks move, and the loss they move down.

    `loss(networks, step)` is pure and returns the scalar to minimise and a dict of what later phases and the
    training log need; its scalars are logged by name. A later phase may differentiate an earlier phase's tensors
    with respect to its own networks: weights it reads there are still those from before the step.
    """

    name: str
    trains: tuple[str, ...]
    loss: PhaseLoss
    optimiser: Optimiser
    every: int = 1  # run at each `every`-th step
    redraw_below: float | None = None  # draw the trained networks anew when the loss falls under this


@dataclass(frozen=True)
class Stage:
    """Phases that run in order at each step, for the whole epoch budget. Most methods have one stage."""

    name: str
    phases: tuple[Phase, ...]


@functools.cache
def _choices(cls: type) -> dict[str, tuple[Any, ...]]:
    """The fields of a recipe class that name one of a few choices, and these; {} where the types cannot be told."""
    try:
        hints = get_type_hints(cls)
    except Exception:  # a name that is imported for type checkers only
        return {}
    return {each.name: get_args(hints[each.name]) for each in fields(cls) if get_origin(hints[each.name]) is Literal}


@dataclass(frozen=True)
class Recipe(ABC):
    """Base of all recipes: a frozen dataclass whose fields are the method's hyperparameters.

    Args:
        batch_size: Images in a training step. The last short batch of an epoch is dropped; with fewer images
            than one batch, all of them form it.
        batchnorm: Statistics that BatchNorm uses when scoring: "running" (each image on its own) or "batch"
            (those of the images scored together, as the GANomaly authors' code does; a score then depends on
            which images share its batch of `batch_size`).
        input_range: What the darkest and the brightest pixel become before the networks see them.
        select: Which networks to keep: those of the "last" epoch, or of the epoch that is best on a held-out share of
            the training images ("normal-val"), with early stopping. Anomalies have no say in either.
        val_share: The share, in (0, 1), of the training images that is held out, drawn by seed, by "normal-val" and by
            methods that calibrate their scores.
        criterion: What "normal-val" goes by, lower is better: a loss that the method logs, such as "generator" or
            "encoder", or "stability" of the held-out images' ranking from epoch to epoch.
        patience: "normal-val" stops after so many epochs without a better one.
        precision: The arithmetic of training. "float32", as exact as IEEE has it; "tf32", which rounds the factors of
            convolutions and matrix products to 10 bits on GPUs that can, and is float32 elsewhere; or "bf16", in which the
            networks run in bfloat16 while weights, losses, BatchNorm statistics and optimiser stay float32. Scores are
            always computed in float32.
    """

    batch_size: int = 64
    batchnorm: Literal["running", "batch"] = "running"
    input_range: tuple[float, float] = (-1.0, 1.0)
    select: Literal["last", "normal-val"] = field(default="last", kw_only=True, metadata={"late": True})
    val_share: float = field(default=0.1, kw_only=True, metadata={"late": True})
    criterion: str = field(default="generator", kw_only=True, metadata={"late": True})
    patience: int = field(default=10, kw_only=True, metadata={"late": True})
    precision: Precision = field(default="float32", kw_only=True, metadata={"late": True})

    default_epochs: ClassVar[int] = 15
    #: The budget in steps of a method that has no published epochs; it comes before `default_epochs`.
    default_steps: ClassVar[int | None] = None
    #: Whether a protocol says which statistics BatchNorm uses, where the user doesn't. Not for a score that holds each image
    #: against normal ones: in a batch with anomalies their statistics would make normal images look strange.
    protocol_batchnorm: ClassVar[bool] = True
    #: Names of the scores that `scores` gives; empty for a method that has one score only.
    score_names: ClassVar[tuple[str, ...]] = ()
    #: Whether score and anomaly map are plain functions of the image, which ONNX can hold; a gradient search is none.
    exportable: ClassVar[bool] = True
    #: As in `BaseDetector`: conformance checks that do not apply, and cheap settings for the others.
    conformance_exemptions: ClassVar[dict[str, str]] = {}
    conformance_hparams: ClassVar[dict[str, Any]] = {}
    conformance_epochs: ClassVar[int] = 15
    conformance_shape: ClassVar[tuple[int, int, int]] = (1, 16, 16)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InvalidInput(f"batch_size must be at least 1, got {self.batch_size}.")
        low, high = self.input_range
        if not low < high:
            raise InvalidInput(f"input_range must be (low, high) with low < high, got {self.input_range}.")
        if not 0 < self.val_share < 1:
            raise InvalidInput(f"val_share must lie between 0 and 1, got {self.val_share}.")
        at_least(patience=(self.patience, 1))
        for name, choices in _choices(type(self)).items():
            value = getattr(self, name)
            if value not in choices:
                raise InvalidInput(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InvalidInput(f"ema_decay must lie in [0, 1), or be None for no averaging, got {self.ema_decay}.")

    @property
    def ema_decay(self) -> float | None:
        """Decay of the moving average of weights and buffers to score with; None scores with the trained ones.

        A method whose paper averages makes it a hyperparameter: a field of this name.
        """
        return None

    @property
    def unstackable(self) -> str | None:
        """Why models of this method cannot be trained together by the stacked trainer; None where its losses allow it."""
        return None

    @property
    def uncompilable(self) -> str | None:
        """Why `torch.compile` cannot take this method's networks; None where it can."""
        return None

    def check_shape(self, chw: tuple[int, int, int]) -> None:
        """Raise InvalidInput when the networks cannot be built for images of `(c, h, w)`."""
        check_square(chw)

    @abstractmethod
    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """Fresh networks by name for images of `(c, h, w)`, initialised from torch's global random state.

        What differs between models, such as what is drawn here, must be a parameter or a buffer: of all else a stack has one.
        """

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """What is trained, in order."""

    @abstractmethod
    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """Anomaly score `(n,)` of each image `(n, c, h, w)`; higher is more anomalous."""

    def scores(self, networks: Networks, images: Tensor) -> dict[str, Tensor]:
        """Every score the trained networks offer, `(n,)` each, by the names of `score_names`; `score` is one of them."""
        return {}

    @property
    def calibrates(self) -> bool:
        """Whether `calibrate` is to be called after training, and after epochs whose scores are looked at.

        A share of the training images is then held out for it.
        """
        return False

    def calibrate(self, networks: Networks, train: list[Tensor], held_out: list[Tensor]) -> None:
        """Fit, in place, the buffers of `networks` that scores need, on normal images after training.

        Args:
            networks: The trained networks, as they score: no gradients, evaluation mode.
            train: Training images in chunks `(b, c, h, w)`; a seeded sample where there are many.
            held_out: Normal images that were not trained on, likewise. Where none could be held out, it is `train` itself.
        """
        return

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Every random number of one step on `n` images, drawn on the CPU from `generator`."""
        return {}

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """Anomaly of each pixel, `(n, h, w)`; higher is more anomalous. Only methods that reconstruct have one."""
        raise InvalidInput(f"{type(self).__name__} has no anomaly map: it does not reconstruct its input.")

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """What the method takes each image for, of its shape and in `input_range`. Only methods that reconstruct have one."""
        raise InvalidInput(f"{type(self).__name__} does not reconstruct its input.")

    def redraw(self, network: nn.Module) -> None:
        """Draw a collapsed network anew, in place, from torch's global random state."""
        raise InvalidInput(f"{type(self).__name__} does not say how to draw a network anew.")


def recipe_hparams(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields as plain values, tuples as lists.

    Fields marked `metadata={"late": True}` came after results were published: they are left out while they have their
    defaults, so that a job's key is what it was before there was such a field.
    """
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe) if not f.metadata.get("late")}
    values |= {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.metadata.get("late") and not _at_default(recipe, f)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _at_default(recipe: Recipe, field_: Any) -> bool:
    return bool(getattr(recipe, field_.name) == field_.default)


def at_least(**limits: tuple[float, float]) -> None:
    """Check hyperparameters given as `name=(value, smallest allowed)`; raises InvalidInput for the first that fails."""
    for name, (value, smallest) in limits.items():
        if not value >= smallest:
            raise InvalidInput(f"{name} must be at least {smallest}, got {value}.")


def check_adam(lr: float, betas: tuple[float, float]) -> None:
    """Raise InvalidInput unless `lr` is positive and both betas lie in [0, 1)."""
    if not lr > 0:
        raise InvalidInput(f"lr must be positive, got {lr}.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise InvalidInput(f"betas must be two numbers in [0, 1), got {betas}.")


def check_share(name: str, value: float) -> None:
    """Raise InvalidInput unless `value`, the share of one term in a sum of two, lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise InvalidInput(f"{name} must lie in [0, 1], got {value}.")
