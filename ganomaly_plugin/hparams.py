"""Hyperparameters as users write them, checked against a detector's own signature."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import numpy as np

from ganomaly_plugin.errors import InvalidInput, check_known


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
        check_known(f"hyperparameter of {name}", key, known)
    if not hparams:
        return {}
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, as_group=False, fail_untyped=False)
    plain = {key: _plain(value) for key, value in hparams.items()}
    hints = _hints(cls)
    for key, value in plain.items():
        if _would_import(hints.get(key), value):
            if str in _leaves(hints.get(key)) and isinstance(value, str):
                continue  # text is what it may be: the parser would rather look for a class of that name
            raise InvalidInput(f"{name}: {key} is {value!r}, and a class path is imported nowhere here. Give a plain value.")
        try:
            parsed = parser.parse_object({key: value}, defaults=False)
        except (ArgumentError, TypeError, ValueError) as error:
            allowed = hints.get(key) or inspect.signature(cls).parameters[key].annotation
            raise InvalidInput(f"{name}: {key} must be {inspect.formatannotation(allowed)}, got {value!r}.") from error
        plain[key] = parsed[key]
    return plain


def _plain(value: Any) -> Any:
    """`value` with numbers of numpy's as Python's own, and tuples as lists."""
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _hints(cls: type) -> dict[str, Any]:
    """The types of the constructor's arguments; {} where they cannot be told."""
    try:
        signature = inspect.signature(cls)
        known = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else getattr(cls, "__init__"))  # noqa: B009
    except Exception:  # a name that is imported for type checkers only
        return {}
    found = {p.name: known.get(p.name, p.annotation) for p in signature.parameters.values()}
    return {key: hint for key, hint in found.items() if hint is not inspect.Parameter.empty}


def _leaves(hint: Any) -> set[Any]:
    """The types that a union or container is made of."""
    inner = [part for part in typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal]
    return {leaf for part in inner for leaf in _leaves(part)} | {typing.get_origin(hint) or hint}


def _would_import(hint: Any, value: Any) -> bool:
    """Whether the parser would import a module that `value` names: it does where a class or function is wanted."""
    if isinstance(value, dict):
        return "class_path" in value or any(_would_import(None, part) for part in value.values())
    if isinstance(value, list):
        return any(_would_import(hint, part) for part in value)
    if not isinstance(value, str) or not re.fullmatch(r"\w+([.:]\w+)+", value):
        return False
    return any(
        leaf is collections.abc.Callable or (isinstance(leaf, type) and leaf not in _PLAIN and not issubclass(leaf, enum.Enum))
        for leaf in _leaves(hint)
    )


_PLAIN = {
    str,
    int,
    float,
    bool,
    complex,
    list,
    tuple,
    dict,
    set,
    type(None),
    Path,
    collections.abc.Sequence,
    collections.abc.Mapping,
}


def canonical_hparams(values: dict[str, Any]) -> dict[str, Any]:
    """`values` as plain JSON values, for records and keys."""
    return {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in values.items()}
