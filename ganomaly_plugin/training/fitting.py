"""What surrounds the training of one detector, by whichever trainer: held-out images, the choice of the epoch, calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.recipe import FEWEST_HELD_OUT, Networks, Recipe
from ganomaly_plugin.training.plain import build_networks, to_device
from ganomaly_plugin.training.validation import STABILITY, NormalValidation, calibrate, hold_out

if TYPE_CHECKING:
    from ganomaly_plugin.training.detector import RecipeDetector


class Fitting:
    """One detector on its way through training.

    Args:
        detector: Takes the networks, history and facts as they come.
        data: Checked images `(n, c, h, w)`, on the CPU; several fittings may share them.
        index: Which of `data` are this detector's training images, `(k,)`; None: all.
        seed: Of the held-out share.
        device: Where the networks are.
        on_epoch: As in `Detector.fit`.

    Raises:
        InvalidInput: Too few images for the share that is to be held out, or no such criterion.
    """

    def __init__(
        self,
        detector: RecipeDetector,
        data: Tensor,
        index: Tensor | None = None,
        *,
        seed: int,
        device: torch.device,
        on_epoch: OnEpoch | None,
    ) -> None:
        self.detector, self.recipe, self.data = detector, detector.recipe, data
        self.index = torch.arange(len(data)) if index is None else index
        self.seed, self.device, self.on_epoch = seed, device, on_epoch
        self._held_out: Tensor | None = None
        self._judge: NormalValidation | None = None
        recipe = self.recipe
        chooses = recipe.select == "normal-val"
        if chooses or (recipe.calibrates and round(recipe.val_share * len(self.index)) >= FEWEST_HELD_OUT):
            train, held_out = hold_out(len(self.index), recipe.val_share, seed)
            self._held_out, self.index = data[self.index[held_out]], self.index[train]
            if chooses:
                untrained = {name: to_device(net, device) for name, net in self.build().items()}
                self._judge = NormalValidation(recipe, self._held_out, seed=seed, networks=untrained, device=device)
        _, c, h, w = data.shape
        detector.image_shape_, detector.device_ = (c, h, w), device
        detector.history_, detector.facts_ = [], {}

    def build(self) -> dict[str, torch.nn.Module]:
        """The recipe's networks at the initial weights of this fitting's seed."""
        _, c, h, w = self.data.shape
        return build_networks(self.recipe, (c, h, w), self.seed)

    @property
    def images(self) -> Tensor:
        """The training images, less those held out."""
        return self.data if len(self.index) == len(self.data) else self.data[self.index]

    def after_epoch(self, epoch: int, networks: Networks, steps: int, losses: dict[str, float]) -> bool:
        """Take note of an epoch, counted from 1, with the networks as they would score; True ends the stage."""
        detector = self.detector
        detector.networks_, detector.steps_ = networks, steps
        if self.recipe.calibrates and self._looks_at_scores:
            self._calibrate()
        stop = self._judge is not None and self._judge.after_epoch(epoch, networks)
        detector.history_.append(losses if self._judge is None else {**losses, "validation": self._judge.values[-1]})
        if self.on_epoch is not None:
            self.on_epoch(epoch, detector)
        return stop

    @property
    def _looks_at_scores(self) -> bool:
        """Whether an epoch's scores are looked at: by the choice of the epoch, or by `on_epoch`, unless that only counts."""
        chooses = self._judge is not None and self.recipe.criterion == STABILITY
        return chooses or (self.on_epoch is not None and getattr(self.on_epoch, "scores", True))

    def finish(self, trainer: str, **facts: Any) -> None:
        """Leave the detector ready to score, and say in its record what happened, and by which trainer."""
        detector = self.detector
        seen = detector.steps_ * min(self.recipe.batch_size, len(self.index))
        detector.facts_ = {"trainer": trainer, "images_seen": seen, **facts}
        fallbacks = _fallbacks(self.recipe, self.data, self.index)
        if self._judge is not None:
            detector.networks_ = self._judge.networks
            detector.facts_ |= {"selected_epoch": self._judge.best_epoch, "validation_images": len(self._judge.images)}
        if self.recipe.calibrates:
            detector.facts_ |= self._calibrate()
            if detector.facts_["calibrated_on"] != "held-out images":
                fallbacks.append(
                    f"scores calibrated on the training images: val_share={self.recipe.val_share:g} of them is fewer than "
                    f"{FEWEST_HELD_OUT}"
                )
        if fallbacks:
            detector.facts_["fallbacks"] = fallbacks

    def _calibrate(self) -> dict[str, object]:
        networks = self.detector.networks_
        return calibrate(self.recipe, networks, self.images, self._held_out, seed=self.seed, device=self.device)


def _fallbacks(recipe: Recipe, data: Tensor, index: Tensor) -> list[str]:
    """What had to be done otherwise than usual with these training images, in words for record and progress."""
    said = []
    if len(index) < recipe.batch_size:
        said.append(f"{len(index)} training images, fewer than batch_size={recipe.batch_size}, form each batch")
    if all(torch.equal(data[index[0]], data[k]) for k in index.tolist()):
        said.append("all training images are equal: scores say how far an image is from that one")
    return said
