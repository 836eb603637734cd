"""Fitting many detectors of one recipe together: every model with its own images, order and seed, one loop for all."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.recipe import Networks, Stage
from ganomaly_plugin.seeding import global_states
from ganomaly_plugin.training.captured import Record
from ganomaly_plugin.training.choice import Choice, way_for
from ganomaly_plugin.training.detector import RecipeDetector
from ganomaly_plugin.training.fitting import Fitting
from ganomaly_plugin.training.memory import models_that_fit
from ganomaly_plugin.training.plain import finite_mean, order_of, resident, stage_epochs
from ganomaly_plugin.training.room import make_room, out_of_memory
from ganomaly_plugin.training.stack import How, Stack, make_stack


@dataclass
class Member:
    """A detector to be fitted in a stack; `error` says afterwards why it failed, and is None when it is fitted.

    Attributes:
        detector: All members of a stack have the same recipe.
        index: Which of the stack's images are its training images, `(n,)`.
        seed: As in `Detector.fit`; a member gets what it would get alone.
        on_epoch: As in `Detector.fit`. It is called again from epoch 1 when a stack was too large for the memory.
    """

    detector: RecipeDetector
    index: Tensor
    seed: int
    on_epoch: OnEpoch | None = None
    error: Exception | None = field(default=None, init=False)


def fit_together(
    members: Sequence[Member],
    data: Tensor,
    *,
    epochs: int | None,
    steps: int | None,
    device: torch.device,
    how: How | None = None,
    record: Record | None = None,
) -> None:
    """Fit every member on its share of checked images `(n, c, h, w)`; one that fails leaves the others as they would be.

    A stack that does not fit into the device's memory is split in halves, which begin anew, and a single model that does not
    is advanced as the plain trainer does it. `how` and `record` are those of `make_stack`; without `how`, `way_for` chooses.
    """

    def fit_less(again: Sequence[Member], how: How | None, problem: Exception) -> None:
        fit = partial(fit_together, data=data, epochs=epochs, steps=steps, device=device, record=record)
        half = len(again) // 2
        if half:
            print(f"{len(again)} models do not fit into the memory of {device}; going on in halves", file=sys.stderr)
            fit(again[:half], how=how)
            fit(again[half:], how=how)
        elif how != "turns":
            print(f"a stack of one does not fit into the memory of {device}; going on as the plain trainer", file=sys.stderr)
            fit(again, how="turns")
        else:
            again[0].error = problem

    by_batch = _prepared(members, data, epochs=epochs, steps=steps, device=device)
    if isinstance(by_batch, Exception):
        make_room()
        fit_less(members, how, by_batch)
        return
    parts: list[tuple[Choice, list[_Course]]] = []
    for all_ in by_batch.values():
        choice = _way_for(all_, data, device, record) if how is None else Choice(how, {})
        parts += [(choice, courses) for courses in _packed(all_, data, device, choice.how)]
    for choice, courses in parts:
        problem = _too_large(courses, data, device, choice, record)
        if problem is not None:
            fit_less([course.member for course in courses], choice.how, problem)


def _prepared(
    members: Sequence[Member], data: Tensor, *, epochs: int | None, steps: int | None, device: torch.device
) -> dict[int, list[_Course]] | Exception:
    """The members' courses by the size of their batches, or why the memory does not do; a member that cannot begin fails."""
    by_batch: dict[int, list[_Course]] = {}
    for member in members:
        try:
            course = _Course(member, data, epochs=epochs, steps=steps, device=device)
        except Exception as error:
            if out_of_memory(error):
                return error.with_traceback(None)  # which holds what was begun
            member.error = error  # too few images for what it holds out, say
            continue
        by_batch.setdefault(course.batch_size, []).append(course)
    return by_batch


class _Course:
    """One member on its way: its epochs, the batches left in this one, and the losses so far in it."""

    def __init__(self, member: Member, data: Tensor, *, epochs: int | None, steps: int | None, device: torch.device) -> None:
        self.member = member
        detector, recipe = member.detector, member.detector.recipe
        member.error = None
        self.fitting = Fitting(detector, data, member.index, seed=member.seed, device=device, on_epoch=member.on_epoch)
        n = len(self.fitting.index)
        self.batch_size = min(recipe.batch_size, n)
        epochs, steps = detector.budget(epochs, steps)
        self.steps = epochs * (n // self.batch_size) if steps is None else steps
        self._epochs: Iterator[Iterator[Tensor]] = stage_epochs(
            n, recipe.batch_size, order_of(member.seed), epochs=epochs, steps=steps
        )
        self.left = self._rows(next(self._epochs))
        self.epoch = 1
        self.losses: list[Tensor] = []
        self.is_over = False

    def next_batch(self) -> Tensor:
        """Which of the stack's images it trains on next, `(b,)`."""
        return self.left.popleft()

    def _rows(self, batches: Iterator[Tensor]) -> deque[Tensor]:
        """An epoch's batches as indices into the stack's images, on the device at once: no step waits for a copy."""
        return deque(self.fitting.index[torch.stack(list(batches))].to(self.fitting.device).unbind())

    def end_epoch(self, networks: Networks, steps: int, names: Sequence[str], stage: Stage) -> None:
        """Take note of the epoch that is over, and begin the next if there is one."""
        values = torch.stack(self.losses).double().cpu()  # (steps, losses)
        at = range(steps - len(values) + 1, steps + 1)
        means = {name: finite_mean(column, at, name, stage) for name, column in zip(names, values.unbind(1), strict=True)}
        stopped = self.fitting.after_epoch(self.epoch, networks, steps, means)
        batches = None if stopped else next(self._epochs, None)
        if batches is None:
            self.is_over = True
            return
        self.left, self.losses, self.epoch = self._rows(batches), [], self.epoch + 1


def _way_for(courses: list[_Course], data: Tensor, device: torch.device, record: Record | None) -> Choice:
    _, c, h, w = data.shape
    return way_for(courses[0].fitting.recipe, (c, h, w), len(courses), courses[0].steps, device, record)


def _packed(courses: list[_Course], data: Tensor, device: torch.device, how: How) -> list[list[_Course]]:
    """The courses in as few stacks as a GPU's memory allows, of about equal sizes; on a CPU in one."""
    if device.type == "cpu":
        return [courses]
    _, c, h, w = data.shape
    make_room()
    free = torch.cuda.mem_get_info(device)[0]
    fit = models_that_fit(courses[0].fitting.recipe, (c, h, w), free, how)
    count = -(-len(courses) // fit)
    return [courses[k::count] for k in range(count)]


def _too_large(
    courses: list[_Course], data: Tensor, device: torch.device, choice: Choice, record: Record | None
) -> Exception | None:
    """Run the courses; why they do not fit into the memory of `device`, or None. It then holds nothing of their stack."""
    problem: Exception | None = None
    try:
        _run(courses, resident(data, device), device, choice, record)
    except Exception as error:
        if not out_of_memory(error):
            raise
        problem = error.with_traceback(None)  # which holds the stack, also by functions within its own
    make_room(*(course.member.error for course in courses))
    return problem


@contextmanager
def _nothing_drawn(device: torch.device) -> Iterator[None]:
    """Refuse a step that draws from the process's own generators, which the models of a stack would share."""

    def states() -> list[Any]:
        gpu = [torch.cuda.get_rng_state(device).numpy().tobytes()] if device.type == "cuda" else []
        return [global_states(), *gpu]

    before = states()
    yield
    if before != states():
        raise InvalidInput("a step draws random numbers of its own, as dropout does, and not by the recipe's draw")


def _run(courses: list[_Course], data: Tensor, device: torch.device, choice: Choice, record: Record | None) -> None:
    recipe = courses[0].fitting.recipe
    stage = recipe.stages[0]
    models = [course.fitting.build() for course in courses]
    seeds = [course.member.seed for course in courses]
    stack: Stack = make_stack(recipe, models, seeds=seeds, device=device, how=choice.how, record=record)
    size = len(courses)
    while courses:
        index = torch.stack([course.next_batch() for course in courses])
        with _nothing_drawn(device) if device.type == "cpu" or not stack.steps else nullcontext():
            losses = stack.step(data[index.to(data.device)])
        rows = torch.stack(list(losses.values())) if losses else index.new_empty(0, len(courses))  # (losses, m)
        for k, course in enumerate(courses):
            course.losses.append(rows[:, k])
        if all(course.left for course in courses):
            continue
        stack.refill()
        for k, course in enumerate(courses):
            if course.left:
                continue
            networks = stack.scoring_networks(k)
            try:
                course.end_epoch(networks, stack.steps, list(losses), stage)
                if course.is_over:
                    way: dict[str, Any] = {"stacked_by": choice.how, "stacked_models": size}
                    way |= {"replayed": True} if stack.is_recorded else {}
                    way |= {"ways_tried": choice.tried} if choice.tried else {}
                    course.fitting.finish("stacked", **way)
            except Exception as error:  # it diverged, or its scores are not finite: its own affair
                if out_of_memory(error):
                    raise
                course.member.error, course.is_over = error, True
        on = [k for k, course in enumerate(courses) if not course.is_over]
        if len(on) < len(courses):
            courses = [courses[k] for k in on]
            if courses:
                stack.keep(on)
