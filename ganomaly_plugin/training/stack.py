"""Several models of one recipe in training at once: what a stack does, and the kinds there are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from ganomaly_plugin.recipe import Networks, Recipe
from ganomaly_plugin.training.captured import Record
from ganomaly_plugin.training.plain import PlainTrainer
from ganomaly_plugin.training.stacked import StackedTrainer, check_stackable
from ganomaly_plugin.training.streams import OnStreams

#: How the models of a stack advance: mapped, with convolutions "grouped" or as "matmul"; or each by itself, on "streams" of a
#: GPU that run at the same time, or in "turns", one after another.
How: TypeAlias = Literal["grouped", "matmul", "streams", "turns"]
HOWS: tuple[How, ...] = get_args(How)


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
    """In turns on a CPU, where that was measured to be faster. Elsewhere as products of matrices.

    That one is a choice by what others found (pytorch/pytorch#73764, #70954: grouped convolutions slower on GPUs than one
    after another), until it is measured here.
    """
    return "turns" if device.type == "cpu" else "matmul"


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
    """
    how = how or default_how(device)
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
