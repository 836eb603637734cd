"""The floor: an image is as anomalous as its mean brightness is far from that of the training images."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.detectors.base import BaseDetector
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.images import to_float
from ganomaly_plugin.metrics import scale_of


class MeanIntensity(BaseDetector):
    """Distance of an image's mean pixel value from the training images' mean, in their standard deviations.

    What a method must beat before its AUROC says anything about what it learned.

    Args:
        side: "both" (darker and brighter are anomalous alike), "dark" or "bright".
    """

    conformance_exemptions: ClassVar[dict[str, str]] = {"seed_matters": "deterministic: nothing is drawn at random"}

    def __init__(self, side: Literal["both", "dark", "bright"] = "both") -> None:
        if side not in ("both", "dark", "bright"):
            raise InvalidInput(f"side must be both, dark or bright, got {side!r}.")
        self.side = side

    @property
    def hparams(self) -> dict[str, Any]:
        """The hyperparameters."""
        return {"side": self.side}

    def _fit(self, images: Tensor, *, seed: int, epochs: int | None, device: torch.device, on_epoch: OnEpoch | None) -> None:
        means = _means(images)
        self.mean_ = float(means.mean())
        self.std_ = scale_of(means.numpy(), float(means.std(correction=0)))

    def _score(self, images: Tensor) -> Tensor:
        z = (_means(images) - self.mean_) / self.std_
        return {"both": z.abs(), "dark": -z, "bright": z}[self.side]

    def describe(self) -> dict[str, Any]:
        """Two numbers are learned."""
        return {"parameters": 2}

    def _state(self) -> dict[str, Any]:
        return {"mean": self.mean_, "std": self.std_}

    def _load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.mean_, self.std_ = float(state["mean"]), float(state["std"])


def _means(images: Tensor, chunk: int = 4096) -> Tensor:
    return torch.cat([to_float(part).double().flatten(1).mean(1) for part in images.split(chunk)])
