"""The trainers that `bench speed` times, by name: each prepares a step that can be called again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ganomaly_plugin.recipe import Recipe, Stage
from ganomaly_plugin.training.plain import PlainTrainer, build_networks, epoch_batches, resident


@dataclass(frozen=True)
class Setting:
    """What all trainers are given alike."""

    images: Tensor  # uint8 (n, c, h, w), on the CPU
    device: torch.device
    jobs: int = 1  # models at once, for trainers that train several

    @property
    def chw(self) -> tuple[int, int, int]:
        """The shape of an image."""
        _, c, h, w = self.images.shape
        return c, h, w


@dataclass(frozen=True)
class Prepared:
    """A step ready to be timed. `step` trains every model on its next batch; its answer is not looked at."""

    step: Callable[[], Any]
    images: int  # that a step trains on, summed over the models
    models: int = 1


#: (recipe, one of its stages, setting) → a step. Raises InvalidInput for what the trainer cannot train.
Prepare = Callable[[Recipe, Stage, Setting], Prepared]


def plain(recipe: Recipe, stage: Stage, setting: Setting) -> Prepared:
    """One model, eager."""
    trainer = PlainTrainer(recipe, build_networks(recipe, setting.chw, seed=0), seed=0, device=setting.device)
    trainer.begin(stage)
    feed = batches(setting.images, recipe.batch_size, setting.device)
    cycle = steps_in_cycle(stage)

    def step() -> None:
        for _ in range(cycle):
            trainer.step(next(feed))

    return Prepared(step, images=cycle * min(recipe.batch_size, len(setting.images)))


def batches(images: Tensor, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Batches without end, gathered as in training: from data on the device, in a new order each epoch."""
    data, rng = resident(images, device), torch.Generator().manual_seed(1)
    while True:
        for index in epoch_batches(len(data), batch_size, rng):
            yield data[index.to(data.device)]


def steps_in_cycle(stage: Stage) -> int:
    """Steps after which a stage's phases, some of which may be due at every n-th step only, have all had their turn."""
    return math.lcm(*(phase.every for phase in stage.phases))


#: The trainers by name.
TRAINERS: Mapping[str, Prepare] = {"plain": plain}
