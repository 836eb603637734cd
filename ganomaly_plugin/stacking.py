"""Which jobs are trained together: those of one detector and data set, whatever their classes and seeds."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ganomaly_plugin.core import Chunk, Job, canonical_json
from ganomaly_plugin.errors import InvalidInput, check_known
from ganomaly_plugin.recipe import Recipe
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.training.detector import RecipeDetector
from ganomaly_plugin.training.stack import WAYS, How
from ganomaly_plugin.training.stacked import why_not_stackable

#: What `--trainer` may be: "stacked" as the device likes it best, or in a way that is named.
TRAINERS = ("auto", "plain", "compiled", "stacked", *WAYS)
MOST = 64  # models in a stack, unless the user says otherwise; what a device holds may be fewer
_ALONE = "no other of the same data and settings is to be trained with it"
_APART = "--stack, or the number of workers, leaves them no other to be trained with"


def stack_key(job: Job) -> str:
    """Equal for jobs that may be trained together: everything about a job but its class and its seed."""
    same = (job.detector, dict(job.hparams), job.dataset, dict(job.data), job.protocol, dict(job.sampling))
    return canonical_json([*same, job.epochs, job.steps])


@functools.lru_cache(maxsize=256)
def _recipe(detector: str, hparams: str) -> Recipe | None:
    made = make_detector(detector, **json.loads(hparams))
    return made.recipe if isinstance(made, RecipeDetector) else None


def _why_not(job: Job, reason: Callable[[Recipe], str | None]) -> str | None:
    recipe = _recipe(job.detector, canonical_json(dict(job.hparams)))
    return "it is not made of a recipe" if recipe is None else reason(recipe)


def why_alone(job: Job) -> str | None:
    """Why a job cannot be part of a stack; None when it can."""
    return _why_not(job, why_not_stackable)


def why_not_compiled(job: Job) -> str | None:
    """Why a job's networks cannot be compiled; None when they can."""
    return _why_not(job, lambda recipe: recipe.uncompilable)


@dataclass(frozen=True)
class Stacking:
    """How jobs are put together for training. Nothing here changes a job's key.

    Attributes:
        trainer: "plain" (each model by itself), "compiled" (likewise, its networks compiled wherever the method allows it),
            "stacked" (together wherever the method allows it; "stacked-grouped" and so on say how), or "auto": stacked on a
            GPU, plain on a CPU, where it does not pay.
        on_gpu: Whether the jobs run on one.
        most: Models in a stack at most; None: `MOST`.
        workers: How many chunks run at the same time; each gets its share.
    """

    trainer: str = "auto"
    on_gpu: bool = False
    most: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        check_known("trainer", self.trainer, TRAINERS)
        if self.most is not None and self.most < 1:
            raise InvalidInput(f"--stack must be at least 1 model, got {self.most}.")

    @property
    def stacks(self) -> bool:
        """Whether anything is put together at all."""
        return self.trainer.startswith("stacked") or (self.trainer == "auto" and self.on_gpu)

    @property
    def how(self) -> How | None:
        """How the models of a stack advance; None leaves it to the device."""
        return WAYS.get(self.trainer)

    def chunks(self, jobs: list[Job]) -> Iterator[Chunk]:
        """Every job in exactly one chunk: stacks where jobs go together, single jobs otherwise, in the order of the jobs."""
        groups: dict[str, list[Job]] = {}
        for job in jobs:
            together = self.stacks and why_alone(job) is None
            groups.setdefault(stack_key(job) if together else job.key, []).append(job)
        for group in groups.values():
            count = max(-(-len(group) // (self.most or MOST)), min(self.workers, len(group)))
            yield from (tuple(group[k::count]) for k in range(count))

    def remarks(self, jobs: Iterable[Job]) -> list[str]:
        """One line for each detector that stacking or compiling was asked for, but that gets the plain trainer; and why."""
        jobs = list(jobs)
        why = {"stacked": why_alone, "compiled": why_not_compiled}.get(self.trainer.partition("-")[0])
        if why is None:
            return []
        reasons = {job.detector_label: why(job) for job in jobs}
        said = [f"{name} is trained by the plain trainer: {reason}" for name, reason in reasons.items() if reason is not None]
        if self.trainer == "stacked":  # a way that is named is taken for a job alone, too
            of_a_kind = Counter(map(stack_key, jobs))
            alone = Counter(
                (job.detector_label, _APART if of_a_kind[stack_key(job)] > 1 else _ALONE)
                for job, *others in self.chunks(jobs)
                if not others and not why(job)
            )
            said += [f"{name}: the plain trainer for {n} of its jobs, since {reason}" for (name, reason), n in alone.items()]
        return said
