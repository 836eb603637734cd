"""Several models of one recipe in training at once: what a stack does, and the kinds there are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.recipe import Networks, Recipe
from ganomaly_plugin.training.captured import Record
from ganomaly_plugin.training.plain import PlainTrainer
from ganomaly_plugin.training.stacked import StackedTrainer, check_stackable
from ganomaly_plugin.training.streams import OnStreams
from ganomaly_plugin.training.trial import why_not_implicit

#: How the models of a stack advance: mapped, with convolutions "grouped", as "matmul" or "implicit"; or each by itself, on
#: "streams" of a GPU that run at the same time, or in "turns", one after another.
How: TypeAlias = Literal["grouped", "matmul", "implicit", "streams", "turns"]
#: By the names that trainers have.
WAYS: Mapping[str, How] = {f"stacked-{how}": how for how in get_args(How)}


class Stack(Protocol):
    """Several models of one recipe in training."""

    steps: int

    def __len__(self) -> int:
        """How many models."""
        ...

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed from a recording by now."""
        ...

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """One step of every model on its own batch of `images` `(m, b, c, h, w)`; the losses, `(m,)` each."""
        ...

    def scoring_networks(self, model: int) -> Networks:
        """The networks of one model to score with; later steps leave them as they are."""
        ...

    def keep(self, models: Sequence[int]) -> None:
        """Go on with these models only, in this order."""
        ...

    def refill(self) -> None:
        """What is to be done between epochs."""
        ...


def default_how(device: torch.device) -> How:
    """In turns on a CPU, where that was measured to be faster. Elsewhere as products of matrices, implicit where they can be.

    On an H200 implicit products were the fastest in each precision (results/speed).
    """
    if device.type == "cpu":
        return "turns"
    return "matmul" if why_not_implicit(device) is not None else "implicit"


def check_how(how: How, device: torch.device) -> None:
    """Raise InvalidInput when models cannot be stacked as `how` says on `device`."""
    if how == "implicit" and (reason := why_not_implicit(device)) is not None:
        raise InvalidInput(f"Models cannot be stacked as implicit matrix products here: {reason}. Use stacked-matmul.")


def make_stack(
    recipe: Recipe,
    models: Sequence[Networks],
    *,
    seeds: Sequence[int],
    device: torch.device,
    how: How | None = None,
    record: Record | None = None,
) -> Stack:
    """A stack of `models`.

    `how` says how they advance, None as `default_how` has it; `record` how a step is recorded, to be replayed from then on (in
    turns nothing is); the rest is as in `StackedTrainer`.

    Raises:
        InvalidInput: The recipe cannot be stacked, or not in this way on this device.
    """
    how = how or default_how(device)
    check_how(how, device)
    if how == "turns":
        return InTurns(recipe, models, seeds=seeds, device=device)
    if how == "streams":
        return OnStreams(recipe, models, seeds=seeds, device=device, record=record)
    return StackedTrainer(recipe, models, seeds=seeds, device=device, convolutions=how, record=record)


class InTurns:
    """Models that share one loop, each advanced by the plain trainer: bit for bit what it computes alone."""

    def __init__(self, recipe: Recipe, models: Sequence[Networks], *, seeds: Sequence[int], device: torch.device) -> None:
        check_stackable(recipe)
        self._trainers = [
            PlainTrainer(recipe, copy.deepcopy(dict(networks)), seed=seed, device=device)
            for networks, seed in zip(models, seeds, strict=True)
        ]
        self.steps = 0
        self.is_recorded = False

    def __len__(self) -> int:
        return len(self._trainers)

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """One step of every model; see `Stack`."""
        self.steps += 1
        losses = [trainer.step(batch) for trainer, batch in zip(self._trainers, images, strict=True)]
        return {name: torch.stack([each[name] for each in losses]) for name in losses[0]}

    def scoring_networks(self, model: int) -> Networks:
        """A copy of one model's networks."""
        return copy.deepcopy(dict(self._trainers[model].scoring_networks()))

    def keep(self, models: Sequence[int]) -> None:
        """Go on with these models only."""
        self._trainers = [self._trainers[model] for model in models]

    def refill(self) -> None:
        """Nothing."""
