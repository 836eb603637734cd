"""Hyperparameters as users write them, checked against a detector's own signature."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ganomaly_plugin.core import canonical_json
from ganomaly_plugin.errors import InvalidInput, check_known, one_line


def default_hparams(cls: type) -> dict[str, Any]:
    """The hyperparameters of a detector or recipe class and their defaults, in the order of its signature."""
    if dataclasses.is_dataclass(cls):
        fields = [f for f in dataclasses.fields(cls) if f.init]
        return {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}
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
        nested = _has_mapping(value)  # before the parser changes it in place
        try:
            parsed = parser.parse_object({key: value}, defaults=False)
            if nested:
                parsed = parser.instantiate_classes(parsed)  # a dataclass, of its fields
            if value is None and known[key] is not None and not _takes_none(hints.get(key)):
                raise TypeError("the parser takes None for any type")
        except (ArgumentError, OverflowError, TypeError, ValueError) as error:
            allowed = hints.get(key) or inspect.signature(cls).parameters[key].annotation
            hint = " Put a comma between two options." if isinstance(value, str) and re.search(r"\s\w+=", value) else ""
            raise InvalidInput(f"{name}: {key} must be {_told_type(allowed)}, got {value!r}.{hint}") from error
        plain[key] = parsed[key]
    return plain


def _told_type(hint: Any) -> str:
    """The type `hint` for people, with the names of an Enum's members, which is what users write where text is not taken."""
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    leaves = _leaves(hint)
    enums = [leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, enum.Enum) and str not in leaves]
    members = ", ".join(name for each in enums for name in each.__members__)
    return inspect.formatannotation(hint) + (f" ({members})" if members else "")


def _takes_none(hint: Any) -> bool:
    """Whether None is a value of the type `hint`, or may be, for all that can be told."""
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return None in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(map(_takes_none, typing.get_args(hint)))
    return not isinstance(origin, type) or origin in (object, type(None))


def _plain(value: Any) -> Any:
    """`value` with numbers of numpy's as Python's own, and tuples, and lists of OmegaConf's, as lists."""
    if isinstance(value, np.generic):
        return value.item()
    is_list = isinstance(value, collections.abc.Sequence) and not isinstance(value, (str, bytes))
    return [_plain(each) for each in value] if is_list else value


def _has_mapping(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_has_mapping, value)))


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
    if isinstance(hint, list):  # the arguments of a Callable
        return {leaf for part in hint for leaf in _leaves(part)}
    inner = [part for part in typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal]
    return {leaf for part in inner for leaf in _leaves(part)} | {typing.get_origin(hint) or hint}


def _would_import(hint: Any, value: Any) -> bool:
    """Whether the parser would import a module that `value` names: it does where a class or function is wanted."""
    if isinstance(value, dict):
        classes = [leaf for leaf in _leaves(hint) if isinstance(leaf, type) and dataclasses.is_dataclass(leaf)]
        hints = {key: part for each in classes for key, part in _hints(each).items()}
        return "class_path" in value or any(_would_import(hints.get(key, hint), part) for key, part in value.items())
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


def canonical_hparams(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of the hyperparameters of `cls` as plain JSON values, for records and keys."""
    hints = _hints(cls)
    return {key: _canonical(hints.get(key), value) for key, value in values.items()}


def _canonical(hint: Any, value: Any) -> Any:
    """`value` with tuples as lists, paths as text, dataclasses as mappings and members of an Enum by their names.

    A member that is text or a number itself stays that where `cls` takes such, as it does where nothing is said.
    """
    if isinstance(value, enum.Enum):
        plain = isinstance(value, (str, int, float)) and (
            type(value) not in _leaves(hint) or bool(_leaves(hint) & set(type(value).__mro__[1:]))
        )
        return value.value if plain else value.name
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return canonical_hparams(type(value), {key: getattr(value, key) for key in default_hparams(type(value))})
    if isinstance(value, dict):
        return {key: _canonical(hint, part) for key, part in value.items()}
    return [_canonical(hint, part) for part in value] if isinstance(value, (tuple, list)) else value


def told_hparams(name: str, detector: Any) -> dict[str, Any]:
    """What the detector's own `hparams` say; {} where it has none.

    Raises:
        InvalidInput: They are no mapping, such as a method, or cannot be had.
    """
    try:
        told = detector.hparams
    except (Exception, SystemExit) as error:  # another package's property may raise anything
        if isinstance(error, AttributeError) and inspect.getattr_static(detector, "hparams", None) is None:
            return {}
        raise InvalidInput(f"{name}: its hparams cannot be read: {one_line(error)}. Mend that property.") from error
    if told is not None and not isinstance(told, Mapping):
        raise InvalidInput(f"{name}: its hparams is a {type(told).__name__}, not a dict. Make it a property that returns one.")
    return dict(told or {})


def check_told(name: str, cls: type, hparams: dict[str, Any], told: Mapping[str, Any]) -> None:
    """Raise InvalidInput when `told`, a detector's own `hparams`, forgets one of `hparams`, or has what its constructor lacks.

    It may leave out, or resolve as it likes, what is at its default. Its job would otherwise be of another setting, or none.
    """
    known, given = default_hparams(cls), checked_hparams(name, cls, hparams)
    for key in told:
        if key not in known:
            raise InvalidInput(f"{name} has {key!r} in its hparams, which its constructor does not name. Have both agree.")
    hints = _hints(cls)
    for key, value in given.items():
        default, wanted, has = (_canonical(hints.get(key), each) for each in (known[key], value, told.get(key)))
        if _agree(default, wanted) or (key in told and (_agree(has, wanted) or _agree(has, getattr(value, "value", wanted)))):
            continue
        found = f"but {has!r}; return it" if key in told else "and would be run without it; add it"
        raise InvalidInput(f"{name} does not return the option {key} in its hparams as {wanted!r}, {found} there.")


def _agree(one: Any, other: Any) -> bool:
    """Whether two values are one in a record, 1 and 1.0 alike; yes for an `other` that none can hold: the job's key says so."""
    return recorded_text(other) is None or (recorded_text(one) is not None and as_recorded(one) == as_recorded(other))


def check_remade(name: str, key: str, value: Any, again: Any) -> None:
    """Raise InvalidInput when `value` holds what `holds_special` says and `again`, made from its record, is not it."""
    if holds_special(value) and value != again:
        held = "a mapping" if dataclasses.is_dataclass(value) else "text"
        raise InvalidInput(
            f"{name}: {key} is {value!r}, which a record holds as {held} that does not make it again. Annotate {key} in the "
            "constructor with its type."
        )


def recorded_hparams(name: str, cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of the hyperparameters of `cls` as records, keys and detector files hold them.

    Raises:
        InvalidInput: They would not make the same detector again.
    """
    recorded = canonical_hparams(cls, values)
    if any(map(holds_special, values.values())):
        again = _remade(name, cls, recorded)
        for key, value in values.items():
            check_remade(name, key, value, again.get(key))
    return recorded


def _remade(name: str, cls: Any, recorded: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of the detector that `recorded` makes; {} when it cannot."""
    try:
        given = checked_hparams(name, cls, recorded)
        return told_hparams(name, cls(**given)) or given
    except (Exception, SystemExit):  # a constructor may raise anything
        return {}


def holds_special(value: Any) -> bool:
    """Whether `value` is or holds a path, a member of an Enum or a dataclass, which records hold as text or a mapping."""
    if isinstance(value, (tuple, list)):
        return any(map(holds_special, value))
    return isinstance(value, (enum.Enum, PurePath)) or dataclasses.is_dataclass(value)


def recorded_text(value: Any) -> str | None:
    """`value` as a record writes it; None for what no record can hold."""
    try:
        return canonical_json(value)
    except (TypeError, ValueError):
        return None


def as_recorded(value: Any) -> Any:
    """`value` as it is read back from a record, tuples as lists; what no record can hold stays as it is."""
    text = recorded_text(value)
    return value if text is None else json.loads(text)


def check_recordable(owner: str, values: Mapping[str, Any]) -> None:
    """Raise InvalidInput for an option of `owner` that no record can hold, such as an infinite number."""
    for key, value in values.items():
        if recorded_text(value) is None:
            wanted = "Give finite numbers, text, true, false, and lists and mappings of such"
            raise InvalidInput(f"{owner}: {key} is {value!r}, which no record can hold. {wanted}.")
