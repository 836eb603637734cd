"""The trainers that `bench speed` times, by name: each prepares a step that can be called again and again."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ganomaly_plugin.errors import InvalidInput, one_line
from ganomaly_plugin.recipe import Recipe, Stage
from ganomaly_plugin.training.captured import WARM_UP, Record, record_on
from ganomaly_plugin.training.plain import PlainTrainer, build_networks, epoch_batches, order_of, resident
from ganomaly_plugin.training.stack import WAYS, How, make_stack
from ganomaly_plugin.training.stacked import check_stackable


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
    """A step ready to be timed. `step` trains every model on its next batch; its answer is not looked at.

    `by_torch`: whether torch carries out its operations one by one, so that they can be counted.
    """

    step: Callable[[], Any]
    images: int  # that a step trains on, summed over the models
    models: int = 1
    by_torch: bool = True


#: (recipe, one of its stages, setting) → a step. Raises InvalidInput for what the trainer cannot train.
Prepare = Callable[[Recipe, Stage, Setting], Prepared]


def plain(recipe: Recipe, stage: Stage, setting: Setting) -> Prepared:
    """One model, eager."""
    return _plain(recipe, stage, setting)


def compiled(recipe: Recipe, stage: Stage, setting: Setting) -> Prepared:
    """One model, its networks compiled by `torch.compile`, which the first step waits for."""
    prepared = _plain(recipe, stage, setting, compiled=True)
    try:
        prepared.step()
    except RuntimeError as error:  # a gradient of a gradient, or no C++ compiler
        raise InvalidInput(f"{type(recipe).__name__} cannot be trained compiled: {one_line(error)[:200]}") from error
    return replace(prepared, by_torch=False)


def _plain(recipe: Recipe, stage: Stage, setting: Setting, *, compiled: bool = False) -> Prepared:
    networks = build_networks(recipe, setting.chw, seed=0)
    trainer = PlainTrainer(recipe, networks, seed=0, device=setting.device, compiled=compiled)
    trainer.begin(stage)
    data = resident(setting.images, setting.device)
    order = indices(len(data), recipe.batch_size)
    cycle = steps_in_cycle(stage)

    def step() -> None:
        for _ in range(cycle):
            trainer.step(data[next(order).to(data.device)])

    return Prepared(step, images=cycle * min(recipe.batch_size, len(setting.images)))


def indices(n: int, batch_size: int, seed: int = 0, device: torch.device | None = None) -> Iterator[Tensor]:
    """Index tensors of batches without end, in a new order each epoch, as in training; an epoch's on `device` at once."""
    order = order_of(seed)
    while True:
        yield from torch.stack(list(epoch_batches(n, batch_size, order))).to(device).unbind()


def steps_in_cycle(stage: Stage) -> int:
    """Steps after which a stage's phases, some of which may be due at every n-th step only, have all had their turn."""
    return math.lcm(*(phase.every for phase in stage.phases))


def captured(recipe: Recipe, stage: Stage, setting: Setting, how: How = "grouped", jobs: int | None = None) -> Prepared:
    """`jobs` models, `setting.jobs` if not given, whose steps are replayed as a CUDA graph, which the first steps make."""
    if setting.device.type != "cuda":
        raise InvalidInput(f"CUDA graphs need a GPU, and this is timed on {setting.device.type}. Leave captured trainers out.")
    prepared = stacked(recipe, stage, setting, how, record=record_on(setting.device), jobs=jobs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a step cannot be replayed")  # what is timed would not be what its name says
        for _ in range(WARM_UP + 1):
            prepared.step()
    return prepared


def stacked(
    recipe: Recipe,
    stage: Stage,
    setting: Setting,
    how: How | None = None,
    record: Record | None = None,
    jobs: int | None = None,
) -> Prepared:
    """`jobs` models of one recipe together, `setting.jobs` if not given."""
    check_stackable(recipe)
    seeds = range(jobs or setting.jobs)
    models = [build_networks(recipe, setting.chw, seed=seed) for seed in seeds]
    stack = make_stack(recipe, models, seeds=seeds, device=setting.device, how=how, record=record)
    data = resident(setting.images, setting.device)
    orders = [indices(len(data), recipe.batch_size, seed, data.device) for seed in seeds]

    def step() -> None:
        stack.step(data[torch.stack([next(order) for order in orders])])

    return Prepared(step, images=len(seeds) * min(recipe.batch_size, len(setting.images)), models=len(seeds))


#: The trainers by name. Captured ones replay CUDA graphs, "captured" of a single model; how "stacked" carries out a step is the
#: device's affair, the others' names say it.
TRAINERS: Mapping[str, Prepare] = {
    "plain": plain,
    "compiled": compiled,
    "stacked": stacked,
    **{name: functools.partial(stacked, how=how) for name, how in WAYS.items()},
    "captured": functools.partial(captured, jobs=1),
    **{f"captured-{how}": functools.partial(captured, how=how) for how in WAYS.values() if how != "turns"},
}
