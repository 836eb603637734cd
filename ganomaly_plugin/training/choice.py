"""Which way of stacking is fastest on a GPU: measured before a long training, as GPU, sizes and precision all matter."""

from __future__ import annotations

import functools
import time
import traceback
import warnings
from typing import NamedTuple

import torch

from ganomaly_plugin.errors import one_line
from ganomaly_plugin.recipe import Recipe
from ganomaly_plugin.training.captured import WARM_UP, Record
from ganomaly_plugin.training.memory import models_that_fit
from ganomaly_plugin.training.plain import build_networks
from ganomaly_plugin.training.room import make_room
from ganomaly_plugin.training.stack import WAYS, How, default_how, make_stack

LONG = 2000  # steps: a shorter training would not make good what the trials take
TIMED = 5  # steps of each trial that count
_CLEAR = 0.95  # of the default way's time: less of a gain is not worth another way


class Choice(NamedTuple):
    """A way of stacking, and what each way that was tried took, or why it failed, in words."""

    how: How
    tried: dict[str, str]


def way_for(
    recipe: Recipe, chw: tuple[int, int, int], models: int, steps: int, device: torch.device, record: Record | None
) -> Choice:
    """How to train so many models for `steps`: by `default_how`, or on a GPU, if it is worth a trial, by a faster way."""
    default = default_how(device)
    if device.type == "cpu" or steps < LONG:
        return Choice(default, {})
    return fastest(recipe, chw, models, device, record, default)


@functools.lru_cache(maxsize=64)
def fastest(
    recipe: Recipe, chw: tuple[int, int, int], models: int, device: torch.device, record: Record | None, default: How
) -> Choice:
    """The way whose steps take the least time for each model, and `default` where none is clearly faster.

    Every way is tried with as many of the models as it holds at once. One that fails, or whose memory does not do, is left out.
    """
    ways = [how for how in WAYS.values() if how != "turns" and (how != "implicit" or default == how)]
    seconds: dict[How, float] = {}
    tried: dict[str, str] = {}
    for how in ways:
        make_room()
        try:
            seconds[how] = _seconds_per_model(recipe, chw, models, device, record, how)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the stack
            tried[how] = one_line(error)
        else:
            tried[how] = f"{seconds[how] * 1e3:.3f} ms a model and step"
    make_room()
    return Choice(min(seconds, key=lambda how: seconds[how] * (_CLEAR if how == default else 1), default=default), tried)


def _seconds_per_model(
    recipe: Recipe, chw: tuple[int, int, int], models: int, device: torch.device, record: Record | None, how: How
) -> float:
    if device.type == "cuda":
        models = min(models, models_that_fit(recipe, chw, torch.cuda.mem_get_info(device)[0], how))
    networks, seeds = build_networks(recipe, chw, seed=0), range(models)
    stack = make_stack(recipe, [networks] * models, seeds=seeds, device=device, how=how, record=record)
    shape = (models, recipe.batch_size, *chw)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a step cannot be replayed")  # it would hold too much memory, and be slow
        for _ in range(WARM_UP + 2):
            stack.step(images)
    began = _now(device)
    for _ in range(TIMED):
        stack.step(images)
    return (_now(device) - began) / TIMED / models


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
