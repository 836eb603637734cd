"""How fast a GANomaly training step is: ours beside the same step as the authors write it, in one run.

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

import torch
from torch import Tensor

from ganomaly_plugin.detectors.base import resolve_device
from ganomaly_plugin.detectors.ganomaly import (
    GanomalyRecipe,
    contextual_loss,
    discriminator_loss,
    encoder_loss,
)
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.provenance import cpu_name, versions
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


def run_speed(options: Any) -> int:
    """The `bench speed` command: print both timings and their ratio, and write them to `options.out`."""
    if options.repeats < 5:
        raise InvalidInput(f"repeats must be at least 5 for a median, got {options.repeats}.")
    device = resolve_device(options.device)
    recipe = GanomalyRecipe(features=options.features, batch_size=options.batch_size)
    chw = (options.channels, options.image_size, options.image_size)
    recipe.check_shape(chw)
    x = torch.rand(options.batch_size, *chw, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(device)
    trainer = PlainTrainer(recipe, build_networks(recipe, chw, seed=0), seed=0, device=device)
    authors, ours = time_steps({"authors' form": AuthorsStep(recipe, chw, device), "plain": trainer.step}, x, options.repeats)

    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    where = f"{hardware}, {torch.get_num_threads()} threads, torch {versions()['torch']}"
    setting = f"{options.batch_size} images, {'×'.join(map(str, chw))}, features {options.features}"
    print(f"GANomaly, one training step: {setting}\n{where}\nmedian of {options.repeats} after {WARM_UP} warm-up steps")
    for timing in (authors, ours):
        rate = options.batch_size / timing.median
        span = f"{timing.fastest * 1e3:.1f}–{timing.slowest * 1e3:.1f}"
        print(f"  {timing.name:14}{timing.median * 1e3:9.1f} ms ({span}){rate:9.0f} images/s")
    print(f"  ratio plain / authors' form: {ours.median / authors.median:.2f}")
    if options.out:
        lines = ["step,median_s,fastest_s,slowest_s,ratio_to_authors,repeats,setting,hardware"]
        for timing in (authors, ours):
            figures = f"{timing.median:.6f},{timing.fastest:.6f},{timing.slowest:.6f},{timing.median / authors.median:.4f}"
            lines.append(f'{timing.name},{figures},{options.repeats},"{setting}","{where}"')
        atomic_write(Path(options.out), ("\n".join(lines) + "\n").encode())
    return 0
