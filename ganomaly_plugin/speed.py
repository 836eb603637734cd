"""How fast training and scoring are. A GANomaly step of ours is timed beside the step as the authors write it.

The baseline is kept here in its slow form on purpose: D runs twice on x and twice on x̂, tensors are contiguous and
Adam is not fused. Both compute the same losses and gradients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganomaly_plugin.datasets.base import load_dataset
from ganomaly_plugin.detectors.base import resolve_device
from ganomaly_plugin.detectors.ganomaly import (
    GanomalyRecipe,
    contextual_loss,
    discriminator_loss,
    encoder_loss,
)
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.provenance import cpu_name, versions
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.selection import Selection, parse_selection, show
from ganomaly_plugin.store import atomic_write
from ganomaly_plugin.training.plain import PlainTrainer, build_networks

WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: median and extremes over the repeats."""

    name: str
    median: float
    fastest: float
    slowest: float


class AuthorsStep:
    """One GANomaly step in the authors' form: four passes of D, contiguous tensors, Adam of many small operations."""

    def __init__(self, recipe: GanomalyRecipe, chw: tuple[int, int, int], device: torch.device) -> None:
        self.recipe = recipe
        networks = build_networks(recipe, chw, seed=0)
        self.generator = networks["generator"].to(device).train()
        self.discriminator = networks["discriminator"].to(device).train()
        self.adam_g = torch.optim.Adam(self.generator.parameters(), recipe.lr, recipe.betas, foreach=False, fused=False)
        self.adam_d = torch.optim.Adam(self.discriminator.parameters(), recipe.lr, recipe.betas, foreach=False, fused=False)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Train on one batch in [-1, 1] and return its losses."""
        recipe = self.recipe
        x_hat, z, z_hat = self.generator(x)
        logits_real, _ = self.discriminator(x)
        logits_fake, _ = self.discriminator(x_hat.detach())

        self.adam_g.zero_grad()
        # As written there, D's features of x are not detached, and D's weights collect gradients that are thrown away.
        adv = (self.discriminator(x)[1] - self.discriminator(x_hat)[1]).square().mean()
        con, enc = contextual_loss(x, x_hat), encoder_loss(z, z_hat)
        total = recipe.w_adv * adv + recipe.w_con * con + recipe.w_enc * enc
        total.backward(retain_graph=True)
        self.adam_g.step()

        self.adam_d.zero_grad()
        loss = discriminator_loss(logits_real, logits_fake)
        loss.backward()
        self.adam_d.step()
        if loss.item() < recipe.redraw_below:
            recipe.redraw(self.discriminator)
        losses = {"adversarial": adv, "contextual": con, "encoder": enc, "generator": total, "discriminator": loss}
        return {name: value.detach() for name, value in losses.items()}


def time_steps(steps: dict[str, Callable[[Tensor], Any]], x: Tensor, repeats: int) -> list[Timing]:
    """Time each step on `x`, in turns so that a busy machine slows all alike; warm-up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + repeats):
        for name, step in steps.items():
            _synchronise(x)
            began = time.perf_counter()
            step(x)
            _synchronise(x)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    return [Timing(name, statistics.median(all_), min(all_), max(all_)) for name, all_ in seconds.items()]


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


@dataclass(frozen=True)
class Scoring:
    """How fast a fitted detector scores: images a second, the median of `repeats` runs over all images."""

    name: str
    images_per_second: float
    repeats: int


def time_scoring(selections: list[Selection], images: np.ndarray, *, device: str, repeats: int) -> list[Scoring]:
    """Scoring speed of detectors on `images` `(n, c, h, w)`, each fitted for one epoch on one batch of them.

    The weights do not matter for the time. A run that takes over 30 seconds is not repeated.
    """
    timings = []
    for selection in selections:
        detector = make_detector(selection.name, **selection.options).fit(images[:64], epochs=1, device=device)
        detector.score(images[:8])
        seconds: list[float] = []
        while len(seconds) < repeats and sum(seconds) < 30:
            began = time.perf_counter()
            detector.score(images)  # returns NumPy, so the device has finished
            seconds.append(time.perf_counter() - began)
        rate = len(images) / statistics.median(seconds)
        timings.append(Scoring(show(selection.name, selection.options), rate, len(seconds)))
    return timings


def run_speed(options: Any) -> int:
    """The `bench speed` command: time training steps or, with --score, scoring; print ratios and write `options.out`."""
    if options.repeats < 5:
        raise InvalidInput(f"repeats must be at least 5 for a median, got {options.repeats}.")
    device = resolve_device(options.device)
    chw = (options.channels, options.image_size, options.image_size)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    where = f"{hardware}, {torch.get_num_threads()} threads, torch {versions()['torch']}"
    rows = _scoring_rows(options, chw, device, where) if options.score else _training_rows(options, chw, device, where)
    if options.out:
        lines = [",".join(rows[0])] + [",".join(f'"{value}"' for value in row.values()) for row in rows]
        atomic_write(Path(options.out), ("\n".join(lines) + "\n").encode())
    return 0


def _training_rows(options: Any, chw: tuple[int, int, int], device: torch.device, where: str) -> list[dict[str, Any]]:
    recipe = GanomalyRecipe(features=options.features, batch_size=options.batch_size)
    recipe.check_shape(chw)
    x = torch.rand(options.batch_size, *chw, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(device)
    trainer = PlainTrainer(recipe, build_networks(recipe, chw, seed=0), seed=0, device=device)
    steps: dict[str, Callable[[Tensor], Any]] = {"authors' form": AuthorsStep(recipe, chw, device), "plain": trainer.step}
    setting = f"{options.batch_size} images, {'×'.join(map(str, chw))}, features {options.features}"
    print(f"GANomaly, one training step: {setting}\n{where}\nmedian of {options.repeats} after {WARM_UP} warm-up steps")
    timings = time_steps(steps, x, options.repeats)
    rows = []
    for timing in timings:
        rate = options.batch_size / timing.median
        span = f"{timing.fastest * 1e3:.1f}–{timing.slowest * 1e3:.1f}"
        print(f"  {timing.name:14}{timing.median * 1e3:9.1f} ms ({span}){rate:9.0f} images/s")
        seconds = {"median_s": timing.median, "fastest_s": timing.fastest, "slowest_s": timing.slowest}
        figures = {key: f"{value:.6f}" for key, value in seconds.items()}
        ratio = f"{timing.median / timings[0].median:.4f}"
        row = {"step": timing.name, **figures, "ratio_to_authors": ratio, "repeats": options.repeats}
        rows.append({**row, "setting": setting, "hardware": where})
    print(f"  ratio plain / authors' form: {timings[1].median / timings[0].median:.2f}")
    return rows


def _scoring_rows(options: Any, chw: tuple[int, int, int], device: torch.device, where: str) -> list[dict[str, Any]]:
    selections = [parse_selection(item, "model") for item in options.score]
    if options.dataset:
        dataset = load_dataset(options.dataset, root=options.data_root, image_size=options.image_size)
        images, what = dataset.images[: options.images], f"images of {options.dataset}"
    else:
        images, what = np.random.default_rng(0).integers(0, 256, (options.images, *chw), dtype=np.uint8), "random images"
    setting = f"{len(images)} {what}, {'×'.join(map(str, images.shape[1:]))}"
    print(f"scoring {setting}\n{where}")
    timings = time_scoring(selections, images, device=str(device), repeats=options.repeats)
    rows = []
    width = max(len(timing.name) for timing in timings)
    for timing in timings:
        ratio = timings[0].images_per_second / timing.images_per_second
        rate = f"{timing.images_per_second:12.2f} images/s (median of {timing.repeats})"
        print(f"  {timing.name:{width}}{rate}  {ratio:.2f} of the time of {timings[0].name}")
        row = {
            "detector": timing.name,
            "images_per_second": f"{timing.images_per_second:.3f}",
            "time_ratio_to_first": f"{ratio:.4f}",
        }
        rows.append({**row, "repeats": timing.repeats, "setting": setting, "hardware": where})
    return rows
