"""Distance from the median image: a small detector from start to end."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.detectors.base import BaseDetector
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.images import to_float


class MedianImage(BaseDetector):
    """Mean over the pixels of |x - median of the training images| to a power.

    Args:
        power: At least 1; 2 lets large differences count more.
    """

    has_anomaly_map: ClassVar[bool] = True
    conformance_exemptions: ClassVar[dict[str, str]] = {"seed_matters": "deterministic: a median draws nothing"}

    def __init__(self, power: float = 1.0) -> None:
        if not power >= 1:
            raise InvalidInput(f"power must be at least 1, got {power}.")
        self.power = power

    @property
    def hparams(self) -> dict[str, Any]:
        """The hyperparameters."""
        return {"power": self.power}

    def _fit(self, images: Tensor, *, seed: int, epochs: int | None, device: torch.device, on_epoch: OnEpoch | None) -> None:
        self.median_ = to_float(images).median(dim=0).values  # (c, h, w)

    def _anomaly_map(self, images: Tensor) -> Tensor:
        return ((to_float(images) - self.median_).abs() ** self.power).mean(1)  # (n, h, w)

    def _score(self, images: Tensor) -> Tensor:
        return self._anomaly_map(images).double().mean((1, 2))

    def _state(self) -> dict[str, Any]:
        return {"median": self.median_}

    def _load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.median_ = state["median"]
