"""Hyperparameters as users write them, checked against a detector's own signature."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from ganomaly_plugin.errors import InvalidInput, unknown


def default_hparams(cls: type) -> dict[str, Any]:
    """The hyperparameters of a detector or recipe class and their defaults, in the order of its signature."""
    if dataclasses.is_dataclass(cls):
        return {f.name: f.default for f in dataclasses.fields(cls)}
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def checked_hparams(name: str, cls: type, hparams: dict[str, Any]) -> dict[str, Any]:
    """`hparams` with their types checked and brought to what `cls` takes (lists to tuples, whole numbers to floats).

    Raises:
        InvalidInput: A name is unknown or a value has another type than the signature says.
    """
    known = default_hparams(cls)
    for key in hparams:
        if key not in known:
            raise unknown(f"hyperparameter of {name}", key, known)
    if not hparams:
        return {}
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, as_group=False, fail_untyped=False)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in hparams.items()}
    for key, value in plain.items():
        try:
            parsed = parser.parse_object({key: value}, defaults=False)
        except (ArgumentError, TypeError, ValueError) as error:
            allowed = cls.__annotations__.get(key) or inspect.signature(cls).parameters[key].annotation
            raise InvalidInput(f"{name}: {key} must be {allowed}, got {value!r}.") from error
        plain[key] = parsed[key]
    return plain


def canonical_hparams(values: dict[str, Any]) -> dict[str, Any]:
    """`values` as plain JSON values, for records and keys."""
    return {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in values.items()}
