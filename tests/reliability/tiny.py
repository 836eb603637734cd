"""A detector that does next to nothing, so that what is measured is the runner; it notes each time it is fitted."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

LOG = "BENCH_RELIABILITY_LOG"  # file that gets a line for each fit


class Tiny:
    """Distance from one pixel's mean, after a pause of so many seconds."""

    has_epochs = False

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.hparams = {"pause": pause}

    def fit(self, images: Any, *, seed: int = 0, epochs: int | None = None, device: str = "auto", on_epoch: Any = None) -> Tiny:
        time.sleep(self.pause)
        self.row = seed % images.shape[-2]
        self.mean = images[:64, :, self.row].mean()
        if os.environ.get(LOG):
            with Path(os.environ[LOG]).open("a") as file:
                file.write(f"{seed}\n")
        return self

    def score(self, images: Any) -> np.ndarray:
        return np.abs(images[:, :, self.row].mean((1, 2)) - self.mean)
