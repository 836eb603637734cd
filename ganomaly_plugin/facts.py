"""What a fitted detector says of itself, checked before it becomes part of a record."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.metrics import check_scores


def described(detector: Any, name: str) -> dict[str, Any]:
    """Its `describe()`; {} where it has none. Raises InvalidInput unless that is a dict."""
    found = detector.describe() if hasattr(detector, "describe") else {}
    if not isinstance(found, Mapping):
        raise InvalidInput(f"{name}: describe() returned {_kind(found)}. Return a dict of plain facts, or {{}}.")
    return dict(found)


def history(detector: Any, name: str) -> list[dict[str, float]]:
    """Its `history_`; [] where it has none. Raises InvalidInput unless that is a list of dicts of numbers."""
    found = getattr(detector, "history_", [])
    if not isinstance(found, (list, tuple)) or not all(map(_are_numbers, found)):
        raise InvalidInput(f"{name}: history_ must be a list with a dict of numbers by name for each epoch, got {found!r:.80}.")
    return [{key: float(value) for key, value in epoch.items()} for epoch in found]


def named_scores(detector: Any, name: str, *images: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Its `named_scores` of each of several sets of images, float64 `(n,)` each; {} where it has none.

    Raises:
        InvalidInput: They are no dicts of as many finite scores as images, or have other names for other images.
    """
    if not hasattr(detector, "named_scores"):
        return [{} for _ in images]
    found = [detector.named_scores(each) for each in images]
    if not all(isinstance(each, Mapping) and all(isinstance(key, str) for key in each) for each in found):
        raise InvalidInput(f"{name}: named_scores() returned {_kind(found[0])}. Return a dict of scores by name, or {{}}.")
    if any(each.keys() != found[0].keys() for each in found):
        names = " and ".join(", ".join(sorted(each)) for each in found)
        raise InvalidInput(f"{name}: named_scores() returned {names}. Return the same names for all images.")
    return [
        {key: check_scores(values, len(given), f"{name}'s score {key!r}") for key, values in each.items()}
        for each, given in zip(found, images, strict=True)
    ]


def _are_numbers(epoch: Any) -> bool:
    if not isinstance(epoch, Mapping):
        return False
    return all(isinstance(key, str) and isinstance(value, Real) for key, value in epoch.items())


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, Mapping) else "a dict whose keys are not text"
