"""Choosing the epoch, and stopping early, on held-out normal images alone. No anomaly has a say here."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from ganomaly_plugin.errors import InvalidInput, unknown
from ganomaly_plugin.images import to_float
from ganomaly_plugin.recipe import CALIBRATION_LIMIT, FEWEST_HELD_OUT, Networks, Recipe, StepInput
from ganomaly_plugin.seeding import seeded
from ganomaly_plugin.training.plain import build_networks
from ganomaly_plugin.training.scoring import batches, in_chunks, scoring_mode

STABILITY = "stability"
_FEWEST_TO_RANK = 3  # images; a rank correlation of two says nothing


def hold_out(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which of `n` images are `(trained on, held out)`: a seeded share of at least one image is held out.

    Raises:
        InvalidInput: The share leaves nothing on one of the sides.
    """
    count = round(share * n)
    if not 1 <= count < n:
        side = "hold out" if count < 1 else "train on"
        raise InvalidInput(
            f"val_share={share:g} of {n} training images leaves none to {side}. Give more images, a val_share of "
            f"{1 / n:.2g} or more, or select=last."
            if n > 1
            else f"val_share={share:g} cannot split a single training image. Give more images, or select=last."
        )
    order = torch.from_numpy(np.random.default_rng([seed, 8]).permutation(n))
    return order[count:].sort().values, order[:count].sort().values


def calibrate(
    recipe: Recipe, networks: Networks, images: Tensor, held_out: Tensor | None, *, seed: int, device: torch.device
) -> dict[str, object]:
    """Let `recipe` calibrate `networks` in place; returns what it was calibrated on, for the record."""
    few = held_out is None or len(held_out) < FEWEST_HELD_OUT

    def some(source: Tensor) -> list[Tensor]:
        order = torch.from_numpy(np.random.default_rng([seed, 9]).permutation(len(source))[:CALIBRATION_LIMIT])
        return list(batches(recipe, source[order.sort().values], device))

    gpus = [str(device)] if device.type == "cuda" else []
    with seeded(seed, gpus), torch.no_grad(), scoring_mode(networks, recipe.batchnorm):  # whatever was drawn before
        train = some(images)
        held = train if few or held_out is None else some(held_out)
        recipe.calibrate(networks, train, held)
    return {"calibrated_on": "training images" if few else "held-out images", "calibration_images": sum(map(len, held))}


def check_choice(recipe: Recipe, chw: tuple[int, int, int]) -> None:
    """Raise InvalidInput when `select=normal-val` cannot be for this recipe: several stages, or no such criterion.

    The criterion is tried on black images of `(c, h, w)`.
    """
    if recipe.select != "normal-val":
        return
    black = torch.zeros((_FEWEST_TO_RANK, *chw), dtype=torch.uint8)
    try:
        networks = build_networks(recipe, chw, 0)
        NormalValidation(recipe, black, seed=0, networks=networks, device=torch.device("cpu"))
    except InvalidInput:
        raise
    except Exception:  # a mistake of the recipe's own is its jobs' to tell
        return


class NormalValidation:
    """Looks at held-out normal images after each epoch, and keeps the networks of the best.

    The criterion, lower is better, is one of the recipe's logged losses on the held-out images, by the running statistics of
    BatchNorm (for GANomaly: generator, encoder, contextual, ...), or "stability": 1 less the rank correlation of the held-out
    images' scores after this epoch and after the one before.

    Args:
        recipe: What is trained; its `criterion` and `patience` say what is looked at and for how long.
        images: The held-out normals.
        seed: Of the random numbers that a loss may need: the same for every epoch.
        networks: Untrained networks, on which the criterion is tried once: a wrong name is an error before training.

    Raises:
        InvalidInput: The recipe has several stages or no such loss, or the images are too few to be ranked.
    """

    def __init__(self, recipe: Recipe, images: Tensor, *, seed: int, networks: Networks, device: torch.device) -> None:
        if len(recipe.stages) > 1:
            raise InvalidInput(f"select=normal-val is for methods of one stage; this one has {len(recipe.stages)}. Use last.")
        self.recipe, self.images, self.seed, self.device = recipe, images, seed, device
        self.values: list[float] = []
        self.best_epoch, self.best = 0, math.inf
        self.networks: dict[str, nn.Module] = {}
        self._previous: np.ndarray | None = None
        if recipe.criterion == STABILITY:
            if len(images) < _FEWEST_TO_RANK:
                raise InvalidInput(
                    f"criterion=stability ranks at least {_FEWEST_TO_RANK} held-out images, got {len(images)}. Raise val_share."
                )
        else:
            self._loss(networks)

    def after_epoch(self, epoch: int, networks: Networks) -> bool:
        """Look at the networks after `epoch`; True when `patience` epochs have passed since the best."""
        value = self._instability(networks) if self.recipe.criterion == STABILITY else self._loss(networks)
        self.values.append(value)
        if value < self.best or not self.networks:
            self.best, self.best_epoch = value, epoch
            self.networks = {name: copy.deepcopy(network) for name, network in networks.items()}
        return epoch - self.best_epoch >= self.recipe.patience

    def _loss(self, networks: Networks) -> float:
        total, weight = 0.0, 0
        rng = torch.Generator().manual_seed(self.seed)
        with torch.no_grad(), scoring_mode(networks, "running"):
            for part in self.images.split(self.recipe.batch_size):
                x = to_float(part.to(self.device), self.recipe.input_range)
                x = x.contiguous(memory_format=torch.channels_last)
                draws = {name: value.to(self.device) for name, value in self.recipe.draw(len(x), rng).items()}
                losses: dict[str, Tensor] = {}
                for phase in self.recipe.stages[0].phases:
                    if self.recipe.criterion not in losses:
                        losses.update(phase.loss(networks, StepInput(x, draws, losses))[1])
                if self.recipe.criterion not in losses:
                    known = [name for name, value in losses.items() if value.ndim == 0]
                    raise unknown("criterion", self.recipe.criterion, [*known, STABILITY])
                total, weight = total + float(losses[self.recipe.criterion]) * len(x), weight + len(x)
        return total / weight

    def _instability(self, networks: Networks) -> float:
        from scipy.stats import spearmanr  # only here: the import takes a second

        score = in_chunks(self.recipe, networks, self.images, self.recipe.score, self.device).double().numpy()
        previous, self._previous = self._previous, score
        if previous is None or np.ptp(score) == 0 or np.ptp(previous) == 0:
            return 2.0  # the largest there is: nothing to compare with, or nothing to rank
        return float(1 - spearmanr(previous, score).statistic)
