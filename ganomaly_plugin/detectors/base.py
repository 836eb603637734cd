"""The shell around every detector of this package: checks, names, saving. A method fills in four small functions."""

from __future__ import annotations

import contextlib
import os
import zipfile
from abc import ABC, abstractmethod
from numbers import Integral
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ganomaly_plugin import __version__
from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.errors import CorruptFile, InvalidInput, NotFitted, check_seed, one_line
from ganomaly_plugin.files import as_path
from ganomaly_plugin.hparams import recorded_hparams
from ganomaly_plugin.images import check_images
from ganomaly_plugin.metrics import check_scores

FORMAT = 1
#: Training images of the conformance suite: so many batches, of so many images each where a method has no batches of its own.
SUITE_BATCHES, SUITE_BATCH = 3, 8


class BaseDetector(ABC):
    """Base class of detectors; see `ganomaly_plugin.core.Detector` for the interface.

    A subclass stores its hyperparameters in `__init__` and implements `_fit`, `_score`, `_state` and `_load_state`.
    Learned attributes end in `_`.
    """

    #: Whether `fit` trains in epochs; without them `epochs` is ignored and left out of the job.
    has_epochs: ClassVar[bool] = False
    #: Whether the budget of `fit` may be given in steps; `_fit` then takes `steps`.
    has_steps: ClassVar[bool] = False
    #: Whether `anomaly_map` works.
    has_anomaly_map: ClassVar[bool] = False
    #: Whether `reconstruct` works.
    has_reconstruction: ClassVar[bool] = False
    #: Conformance checks that do not apply to the method, by name, each with its reason.
    conformance_exemptions: ClassVar[dict[str, str]] = {}
    #: Hyperparameters and epochs that make the conformance suite cheap; what its user sets comes first.
    conformance_hparams: ClassVar[dict[str, Any]] = {}
    conformance_epochs: ClassVar[int] = 1
    #: The `(c, h, w)` of the suite's images, for methods that do not take small grey ones (and are exempt from "sizes").
    conformance_shape: ClassVar[tuple[int, int, int]] = (1, 16, 16)

    name: str = ""  # the registry's name, set by make_detector
    image_shape_: tuple[int, int, int]

    def fit(
        self,
        images: Any,
        *,
        seed: int = 0,
        epochs: int | None = None,
        steps: int | None = None,
        device: str = "auto",
        on_epoch: OnEpoch | None = None,
    ) -> BaseDetector:
        """Learn from normal images.

        Args:
            images: `(n, c, h, w)`, uint8 or float in [-1, 1]; not modified.
            seed: Determines every random choice; the same seed gives the same detector on the same CPU.
            epochs: Passes over the images; None takes the method's default.
            steps: Training steps of each stage, instead of `epochs`; methods without steps refuse it.
            device: "auto" (CUDA when there is one), "cpu", "cuda" or "cuda:N".
            on_epoch: Called as `on_epoch(epoch, self)` after each epoch; the detector can score then.

        Returns:
            The detector itself.

        Raises:
            InvalidInput: The images or an argument are not usable.
            Diverged: A training loss is not finite.
        """
        for budget, value in (("epochs", epochs), ("steps", steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise InvalidInput(f"{budget} must be a whole number of at least 1, got {value!r}.")
        if steps is not None and (epochs is not None or not self.has_steps):
            why = f"got epochs={epochs} and steps={steps}. Give epochs or steps, not both."
            why = why if self.has_steps else "has no budget in steps. Leave steps out."
            raise InvalidInput(f"{self._called} {why}")
        seed = check_seed(seed)
        checked = check_images(images)
        _, c, h, w = checked.shape
        self.check_shape((c, h, w))
        where = resolve_device(device)
        epochs = None if epochs is None else int(epochs)
        more: dict[str, Any] = {} if steps is None else {"steps": int(steps)}
        self.image_shape_ = (c, h, w)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                self._fit(checked, seed=seed, epochs=epochs, device=where, on_epoch=on_epoch, **more)
        except BaseException:
            del self.image_shape_  # it is not fitted
            raise
        return self

    def score(self, images: Any) -> np.ndarray:
        """Anomaly scores of `(n, c, h, w)` images: float64 `(n,)`, higher is more anomalous.

        Raises:
            NotFitted: Called before `fit`.
            InvalidInput: The images are not usable, or not of the shape that the detector was fitted on; or a score is not
                finite, as of networks whose last step diverged.
        """
        checked = self._check(images)
        return check_scores(_array(self._score(checked)), len(checked), self._called)

    def named_scores(self, images: Any) -> dict[str, np.ndarray]:
        """Every score that the method offers, by name: float64 `(n,)` each; {} for a method with one score only."""
        return {}

    def anomaly_map(self, images: Any) -> np.ndarray:
        """Anomaly of each pixel, float32 `(n, h, w)`; higher is more anomalous.

        Raises:
            NotFitted: Called before `fit`.
            InvalidInput: The method has no map, or the images are not usable.
        """
        return np.asarray(_array(self._anomaly_map(self._check(images))), dtype=np.float32)

    def reconstruct(self, images: Any) -> np.ndarray:
        """What the method takes each image for, float32 `(n, c, h, w)`, about [-1, 1].

        Raises:
            NotFitted: Called before `fit`.
            InvalidInput: The method does not reconstruct, or the images are not usable.
        """
        return np.asarray(_array(self._reconstruct(self._check(images))), dtype=np.float32)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted detector to one file of tensors and plain values (no pickled code); see `load_detector`."""
        self._check_fitted()
        content = {
            "ganomaly_plugin": FORMAT,
            "version": __version__,
            "name": self.name,
            "hparams": recorded_hparams(self._called, self._made_from, self.hparams),
            "image_shape": list(self.image_shape_),
            "state": self._state(),
        }
        target = as_path(path)
        if target.exists() and not target.is_file():  # a device would be replaced, not written to
            raise InvalidInput(f"Cannot write the detector to {target}: it is not a file. Choose another name.")
        partial = target.parent / f".{target.name}.{os.getpid()}.tmp"
        try:
            torch.save(content, partial)
            _check_loads(partial)
            partial.replace(target)
        except (OSError, RuntimeError) as error:
            raise InvalidInput(
                f"Cannot write the detector to {target}: {str(error).rstrip('.')}. Choose a folder that exists."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def check_shape(self, chw: tuple[int, int, int]) -> None:
        """Raise InvalidInput when the detector cannot take images of `(c, h, w)`; called before any work."""
        return  # any shape will do, unless a method says otherwise

    @property
    @abstractmethod
    def hparams(self) -> dict[str, Any]:
        """The hyperparameters, as values that `make_detector(name, **hparams)` takes."""

    @property
    def _made_from(self) -> type:
        """The class whose constructor takes the hyperparameters."""
        return type(self)

    def describe(self) -> dict[str, Any]:
        """Plain facts of the fitted detector for its record, such as its number of parameters."""
        return {}

    @abstractmethod
    def _fit(self, images: Tensor, *, seed: int, epochs: int | None, device: torch.device, on_epoch: OnEpoch | None) -> None:
        """Learn from checked images."""

    @abstractmethod
    def _score(self, images: Tensor) -> Tensor | np.ndarray:
        """Scores `(n,)` of checked images."""

    def _anomaly_map(self, images: Tensor) -> Tensor | np.ndarray:
        raise InvalidInput(f"{self._called} has no anomaly map: it does not reconstruct its input.")

    def _reconstruct(self, images: Tensor) -> Tensor | np.ndarray:
        raise InvalidInput(f"{self._called} offers no reconstruction.")

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What was learned, as tensors and plain values."""

    @abstractmethod
    def _load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """The inverse of `_state`."""

    @property
    def _called(self) -> str:
        """How messages call it."""
        return self.name or type(self).__name__

    def _check_fitted(self) -> None:
        if not hasattr(self, "image_shape_"):
            raise NotFitted(f"{self._called} is not fitted; call fit(images) first.")

    def _check(self, images: Any) -> Tensor:
        self._check_fitted()
        return check_images(images, chw=self.image_shape_)


def _array(values: Any) -> Any:
    """A tensor of any device or type, also one with gradients, as NumPy takes it; all else as it is."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def resolve_device(device: str) -> torch.device:
    """The torch device that `device` names; "auto" is CUDA when there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or not isinstance(device, str) or str(resolved) not in ("cpu", "cuda", f"cuda:{resolved.index}"):
        raise InvalidInput(f"Unknown device {device!r}. Allowed: auto, cpu, cuda, cuda:N.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"Device {device!r} is not here: {torch.cuda.device_count()} CUDA devices. Use auto or cpu.")
    return resolved


def _check_loads(path: Path) -> None:
    """Raise InvalidInput when the file just written holds what is not read back, such as arrays of NumPy."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = shorten(one_line(error), 200, placeholder=" …")
        raise InvalidInput(
            f"hparams or _state() hold what no detector file can: give tensors and plain values ({reason})."
        ) from error


def read_detector_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a file that `save` wrote, read without unpickling code."""
    source = as_path(path)
    if not source.is_file():
        raise InvalidInput(f"No detector file at {source}. Give the path that save(path) wrote.")
    try:
        with zipfile.ZipFile(source) as archive:
            damaged = archive.testzip()  # torch does not look at its checksums
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged archive
        raise CorruptFile(f"{source} is not a readable detector file ({type(error).__name__}). Save it again.") from error
    if not isinstance(content, dict) or content.get("ganomaly_plugin") != FORMAT:
        raise CorruptFile(f"{source} was not written by save() of this package (format {FORMAT}).")
    return content
