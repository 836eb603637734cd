"""The rows of `bench speed`: every trainer of every detector and the peers, then scoring, each set timed in turns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.errors import FAULTS, InvalidInput, one_line
from ganomaly_plugin.facts import described
from ganomaly_plugin.recipe import Precision, Recipe
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.selection import Selection, show
from ganomaly_plugin.speed.peers import PEERS, AnomalibEngine, authors
from ganomaly_plugin.speed.timing import Task, Timing, time_in_turns
from ganomaly_plugin.speed.trainers import TRAINERS, Prepared, Setting, plain
from ganomaly_plugin.speed.work import copying, count_work, matmul, peak_memory
from ganomaly_plugin.training.detector import RecipeDetector
from ganomaly_plugin.training.precision import precision
from ganomaly_plugin.training.scoring import SCORE_CHUNK

PATIENCE = 30.0  # seconds of scoring after which a detector is not timed again
FITTED = 64  # images that a detector is fitted on before its scoring is timed


@dataclass(frozen=True)
class Row:
    """One line of the table: what was timed, and the figures. Times are of one step, or of scoring all images."""

    what: str  # "training" or "scoring"
    detector: str
    trainer: str  # who trains; for scoring empty
    precision: str
    models: int  # trained at once
    images: int  # of one timed call
    timing: Timing
    parameters: int  # of one model
    peak_memory: int  # bytes
    flops: float | None  # of one image; None where nothing can be counted
    moved: float | None = None  # bytes that operations read and write for one image; None where they are not seen
    ceiling: float | None = None  # FLOP/s of the matrix product in the same turns
    bandwidth: float | None = None  # bytes/s of the copy in the same turns
    latency: Timing | None = None  # scoring one image

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return self.images / self.timing.median

    @property
    def share(self) -> float | None:
        """The share of the measured ceiling that is reached."""
        return None if self.flops is None or not self.ceiling else self.flops * self.images_per_second / self.ceiling

    @property
    def share_of_bandwidth(self) -> float | None:
        """Bytes moved in a second as a share of what a copy moves; above 1 where caches spare the memory."""
        return None if self.moved is None or not self.bandwidth else self.moved * self.images_per_second / self.bandwidth


@dataclass
class _Candidate:
    """What will be a row once it is timed."""

    fields: dict[str, Any]
    task: Task | None  # None: the host's loop
    latency: Task | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        detector, trainer = self.fields["detector"], self.fields["trainer"]
        return f"{detector}, {trainer}" if trainer else f"the scoring of {detector}"


def time_training(
    selections: Sequence[Selection],
    trainers: Sequence[str],
    peers: Sequence[str],
    setting: Setting,
    *,
    repeats: int,
    peer_precision: Precision = "float32",
) -> list[Row]:
    """Training rows: the peers of GANomaly first, then each detector's stages with each trainer.

    A trainer or peer that fails, as one that needs more memory than there is, is a printed line and no row.

    Raises:
        InvalidInput: Peers are asked for where no detector trains what they do, or no trainer can train a detector.
    """
    recipes = [(show(s.name, s.options), recipe) for s in selections if (recipe := recipe_of(s)) is not None]
    candidates: list[_Candidate] = []
    host: tuple[str, AnomalibEngine] | None = None
    ganomaly = next((entry for entry in recipes if has_peers(entry[1])), None)
    if peers and ganomaly is None:
        raise InvalidInput(
            "Peers are GANomaly with feature matching, and no GANomaly is timed that trains so. Add ganomaly to --models, or "
            "give --peers none."
        )
    for peer in peers:
        assert ganomaly is not None and isinstance(ganomaly[1], GanomalyRecipe)
        label, recipe = ganomaly[0], replace(ganomaly[1], precision=peer_precision)
        with _said(f"{label}, {PEERS[peer]}"):
            if peer == "anomalib":
                engine = AnomalibEngine(recipe, setting)
                candidates.append(_anomalib(engine, label, recipe, setting))
                host = (str(len(candidates) - 1), engine)
                if engine.remark:
                    print(engine.remark, flush=True)
                continue
            with precision(peer_precision):
                candidates.append(_prepared(label, PEERS[peer], recipe, setting, lambda r=recipe: authors(r, setting)))
    for label, recipe in recipes:
        recipe.check_shape(setting.chw)
        for stage in recipe.stages:
            name = label if len(recipe.stages) == 1 else f"{label}, {stage.name}"
            before, refused = len(candidates), list[BaseException]()
            flops: float | None = None
            with _said(name, refused):
                flops, _ = _work_per_image(plain(recipe, stage, setting))
            for trainer in trainers if flops is not None else ():
                prepare = functools.partial(TRAINERS[trainer], recipe, stage, setting)
                with _said(f"{name}, {trainer}", refused):
                    candidates.append(_prepared(name, trainer, recipe, setting, prepare, flops))
            if refused and isinstance(refused[-1], InvalidInput) and len(candidates) == before:
                raise refused[-1]
    return _timed(candidates, setting.device, repeats, host)


@contextlib.contextmanager
def _said(what: str, errors: list[BaseException] | None = None) -> Iterator[None]:
    """Make of an error one line, which says that `what` is not timed, and add it to `errors`."""
    try:
        yield
    except FAULTS as error:
        print(f"{what} is not timed: {one_line(error)}", flush=True)
        if errors is not None:
            errors.append(error.with_traceback(None))  # which holds its models


def recipe_of(selection: Selection) -> Recipe | None:
    """The selected detector's recipe; None for a detector that has no training steps."""
    detector = make_detector(selection.name, **selection.options)
    return detector.recipe if isinstance(detector, RecipeDetector) else None


def has_peers(recipe: Recipe | None) -> bool:
    """Whether the peers train what `recipe` does: a recipe made from GANomaly's has other losses, as have its variants."""
    return type(recipe) is GanomalyRecipe and recipe.adversarial == "feature-matching"


def _prepared(
    label: str, trainer: str, recipe: Recipe, setting: Setting, prepare: Any, flops: float | None = None
) -> _Candidate:
    made: list[Prepared] = []

    def work() -> None:
        made.append(prepare())
        for _ in range(2):
            made[0].step()

    memory = peak_memory(work, setting.device)
    (prepared,) = made
    its_flops, moved = _work_per_image(prepared) if prepared.by_torch else (None, None)
    fields = {
        "what": "training",
        "detector": label,
        "trainer": trainer,
        "precision": recipe.precision,
        "models": prepared.models,
        "images": prepared.images,
        "parameters": _size(recipe.build(setting.chw).values()),
        "peak_memory": memory,
        "flops": its_flops if flops is None else flops,
        "moved": moved,
    }
    return _Candidate(fields, _in_precision(prepared.step, recipe.precision))


def _in_precision(step: Task, name: Precision) -> Task:
    def task() -> None:
        with precision(name):
            step()

    return task


def _anomalib(engine: AnomalibEngine, label: str, recipe: GanomalyRecipe, setting: Setting) -> _Candidate:
    memory = peak_memory(lambda: engine.steps(2), setting.device)
    fields = {
        "what": "training",
        "detector": label,
        "trainer": PEERS["anomalib"],
        "precision": recipe.precision,
        "models": 1,
        "images": engine.batch_size,
        "parameters": _size([engine.steps(1).model]),
        "peak_memory": memory,
        "flops": count_work(lambda: engine.steps(1)).flops / engine.batch_size,
    }
    return _Candidate(fields, None)


def _work_per_image(prepared: Prepared) -> tuple[float, float]:
    work = count_work(prepared.step)
    return work.flops / prepared.images, work.moved / prepared.images


def _size(modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def time_scoring(selections: Sequence[Selection], images: np.ndarray, device: torch.device, *, repeats: int) -> list[Row]:
    """Scoring rows of detectors on `images` `(n, c, h, w)`, each fitted for one epoch on a batch of them.

    The weights do not matter for the time. A detector that has taken over 30 seconds is not timed again; one that fails is a
    printed line and no row.
    """
    candidates: list[_Candidate] = []
    for selection in selections:
        with _said(f"the scoring of {show(selection.name, selection.options)}"):
            candidates.append(_scoring(selection, images, device))
    return _timed(candidates, device, repeats, None, patience=PATIENCE)


def _scoring(selection: Selection, images: np.ndarray, device: torch.device) -> _Candidate:
    detector = make_detector(selection.name, **selection.options).fit(images[:FITTED], epochs=1, device=str(device))
    models = [*getattr(detector, "networks_", {}).values(), getattr(detector, "model_", None)]
    networks = [model for model in models if isinstance(model, torch.nn.Module)]  # scikit-learn's models are none
    weights = sum(t.nbytes for net in networks for t in [*net.parameters(), *net.buffers()])
    work = count_work(lambda: detector.score(images[:1]))
    a_chunk = max(SCORE_CHUNK, selection.options.get("batch_size") or 0)
    # On a CPU networks score in chunks: more images take no more memory, and long to watch. Other models take all at once.
    at_once = a_chunk if networks and device.type != "cuda" else len(images)
    fields = {
        "what": "scoring",
        "detector": show(selection.name, selection.options),
        "trainer": "",
        "precision": "float32",
        "models": 1,
        "images": len(images),
        "parameters": described(detector, selection.name).get("parameters", _size(networks)),
        "peak_memory": weights + peak_memory(lambda: detector.score(images[:at_once]), device),
        "flops": work.flops or None,
    }
    return _Candidate(fields, lambda: detector.score(images), latency=lambda: detector.score(images[:1]))


def _timed(
    candidates: list[_Candidate],
    device: torch.device,
    repeats: int,
    host: tuple[str, AnomalibEngine] | None,
    patience: float = float("inf"),
) -> list[Row]:
    """Time the candidates, and beside them a large copy and a large matrix product in each precision that occurs, in turns.

    What fails in its turn is a printed line, and the others go on.
    """
    if not candidates:
        return []
    tasks = {str(k): c.task for k, c in enumerate(candidates) if c.task is not None}
    tasks |= {f"latency {k}": c.latency for k, c in enumerate(candidates) if c.latency is not None}
    names = {name: candidates[int(name.split()[-1])].name for name in tasks}
    ceiling_flops = {}
    for name in dict.fromkeys(c.fields["precision"] for c in candidates):
        with _said(f"the ceiling in {name}"):
            product, flops = matmul(device, torch.bfloat16 if name == "bf16" else torch.float32)
            tasks[f"ceiling {name}"], ceiling_flops[name] = _in_precision(product, name), flops
    copied = 0
    with _said("a copy"):
        tasks["copy"], copied = copying(device)

    def failed(task: str, error: BaseException) -> None:
        with _said(names.get(task, task)):
            raise error

    timings = time_in_turns(tasks, device, repeats, host=host, patience=patience, failed=failed)
    seconds = {name: timings[f"ceiling {name}"].median for name in ceiling_flops if f"ceiling {name}" in timings}
    ceilings = {name: ceiling_flops[name] / median for name, median in seconds.items()}
    return [
        Row(
            **c.fields,
            timing=timings[str(k)],
            ceiling=ceilings.get(c.fields["precision"]),
            bandwidth=copied / timings["copy"].median if "copy" in timings else None,
            latency=timings.get(f"latency {k}"),
        )
        for k, c in enumerate(candidates)
        if str(k) in timings
    ]
