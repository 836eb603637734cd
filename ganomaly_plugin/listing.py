"""What `bench ls` prints: names with a line each, and of a single one its options with their defaults."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from ganomaly_plugin.datasets.base import default_options
from ganomaly_plugin.datasets.splits import PROTOCOLS
from ganomaly_plugin.errors import BenchError, InvalidInput, unknown
from ganomaly_plugin.hparams import as_recorded, canonical_hparams, default_hparams
from ganomaly_plugin.registry import entries, make_detector, resolve
from ganomaly_plugin.selection import show

KINDS = {"detector": "detectors", "data set": "data sets"}
_WIDTH = 100


def listing(pattern: str | None) -> str:
    """The registered detectors, data sets and protocols whose names match `pattern`; of a single name also its options.

    Raises:
        InvalidInput: There is none.
    """
    known: dict[str, dict[str, str]] = {
        title: {name: entry.summary for name, entry in sorted(entries(kind).items())} for kind, title in KINDS.items()
    }
    known["protocols"] = {name: protocol.summary for name, protocol in PROTOCOLS.items()}
    chosen = {title: _matching(names, pattern or "*") for title, names in known.items()}
    blocks = [_section(title, names) for title, names in chosen.items() if names]
    if pattern and not set("*?[") & set(pattern):
        kinds = [kind for kind, title in KINDS.items() if pattern in chosen[title]]
        blocks += filter(None, (_options(kind, pattern) for kind in kinds))
        if not blocks:  # a family's member, or a class path
            blocks = list(filter(None, (_options(kind, pattern) for kind in KINDS)))[:1]
        if not blocks:
            raise unknown("name", pattern, {name for names in known.values() for name in names})
    if not blocks:
        raise InvalidInput(f"Nothing is called {pattern!r}. Run bench ls without a pattern to see all names.")
    return "\n".join(blocks)


def _matching(names: Mapping[str, str], pattern: str) -> dict[str, str]:
    return {name: summary for name, summary in names.items() if fnmatch.fnmatchcase(name, pattern)}


def _section(title: str, names: Mapping[str, str]) -> str:
    width = max(map(len, names))
    return "\n".join([f"{title}:", *(f"  {name.ljust(width)}  {summary}" for name, summary in names.items())])


def _options(kind: str, name: str) -> str:
    """The options of `name` or why they cannot be told; "" where there are none, or a name behind the colon is wanted."""
    full = f"{name}PATH" if kind == "data set" and name.endswith(":") else name
    try:
        made = resolve(kind, full)
    except InvalidInput as error:
        return f"options cannot be told: {error}" if name in entries(kind) and not name.endswith(":") else ""
    of = getattr(made, "func", made)  # a family's name and argument resolve to a partial
    called = f"{name}NAME" if name.endswith(":") else name
    options = dict(_budget(name)) if kind == "detector" else {}
    described = _described(of)
    defaults = canonical_hparams(of, default_hparams(of)) if kind == "detector" else default_options(full)
    options |= {key: (value, described.get(key, "")) for key, value in defaults.items()}
    if not options:
        return ""
    lines = [f"options, as in {called}[{next(iter(options))}=…]:"]
    for key, (value, text) in options.items():
        lines.append(f"  {_shown(key, value)}")
        lines += textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _budget(name: str) -> Iterator[tuple[str, tuple[Any, str]]]:
    """What a detector that trains takes beside its hyperparameters."""
    try:
        detector = make_detector(name)
    except BenchError:  # an option has no default
        return
    steps = getattr(getattr(detector, "recipe", None), "default_steps", None)
    if getattr(detector, "has_epochs", False):
        yield "epochs", (None if steps else getattr(detector, "default_epochs", None), "Passes over the training images.")
    if getattr(detector, "has_steps", False):
        yield "steps", (steps, "Training steps, instead of epochs.")


def _described(of: Any) -> dict[str, str]:
    """What the docstrings of a class and those that it is made from, or of a function, say of each argument."""
    from docstring_parser import parse  # jsonargparse reads signatures with it

    found: dict[str, str] = {}
    places = [place for cls in of.__mro__ for place in (cls, vars(cls).get("__init__"))] if isinstance(of, type) else [of]
    for place in places:
        for argument in parse(getattr(place, "__doc__", None) or "").params:
            for key in argument.arg_name.split(","):
                found.setdefault(key.strip(), argument.description or "")
    return found


def _shown(key: str, value: Any) -> str:
    if value is dataclasses.MISSING or value is inspect.Parameter.empty:
        return f"{key}, which has no default"
    try:
        return show("", {key: as_recorded(value)})[1:-1]
    except InvalidInput:  # a default that no command line can hold
        return f"{key}={value}"
