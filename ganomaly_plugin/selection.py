"""How users name a model or data set with options: `vae[latent_dim=2]`, on the command line and in YAML alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ganomaly_plugin.errors import InvalidInput

_FORM = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<options>.*)\])?", re.DOTALL)


@dataclass(frozen=True)
class Selection:
    """A name and the options that go with it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def split_list(text: str) -> list[str]:
    """`text` at its commas, those inside brackets left alone; empty parts dropped."""
    parts, depth, start = [], 0, 0
    for k, char in enumerate(text):
        depth += (char in "[(") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[start:k])
            start = k + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def parse_options(text: str) -> dict[str, Any]:
    """`key=value,key=value` with values in YAML.

    Raises:
        InvalidInput: A part has no `=`, or a value is not YAML.
    """
    options = {}
    for part in split_list(text):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InvalidInput(f"Cannot read the option {part!r}. Write key=value, such as latent_dim=2.")
        if key.strip() in options:
            raise InvalidInput(f"The option {key.strip()} is given twice in {text!r}. Give it once.")
        try:
            options[key.strip()] = number_like(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise InvalidInput(
                f"Cannot read the value of {part!r}. Write a YAML value, such as 0.5 or [0.5, 0.999]."
            ) from error
    return options


def number_like(value: Any) -> Any:
    """YAML reads 1e-4 as text: take such text, also inside lists, as the number it is."""
    if isinstance(value, list):
        return [number_like(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value) if re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value) else value
        except ValueError:
            return value
    return value


def parse_selection(item: Any, what: str) -> Selection:
    """A `Selection` from `name`, `name[key=value]` or, in YAML, `{name: ..., options: {...}}`.

    anomalib's form, `{class_path: anomalib.models.Padim, init_args: {...}}`, means `anomalib:Padim` with those options.

    Raises:
        InvalidInput: The item has another form.
    """
    if isinstance(item, Mapping) and isinstance(item.get("class_path"), str) and not set(item) - {"class_path", "init_args"}:
        module, _, name = item["class_path"].rpartition(".")
        known = module.split(".")[0] in ("", "anomalib")
        item = {"name": f"anomalib:{name}" if known else f"{module}:{name}", "options": item.get("init_args") or {}}
    if isinstance(item, Mapping):
        extra = set(item) - {"name", "options"}
        if extra or not isinstance(item.get("name"), str) or not isinstance(item.get("options", {}), Mapping):
            raise InvalidInput(f"A {what} is name or {{name: ..., options: {{...}}}}, got {dict(item)!r}.")
        return Selection(item["name"], {key: number_like(value) for key, value in item.get("options", {}).items()})
    match = _FORM.fullmatch(str(item).strip())
    if match is None:
        raise InvalidInput(f"Cannot read the {what} {item!r}. Write name or name[key=value,key=value].")
    name = match["name"].strip()
    if name.endswith(":"):
        raise InvalidInput(f"The {what} {name!r} ends in its colon. Write what is meant behind it, as in folder:PATH.")
    return Selection(name, parse_options(match["options"] or ""))


def show(name: str, options: Mapping[str, Any]) -> str:
    """The spelling that `parse_selection` reads back."""
    if not options:
        return name
    inside = ",".join(f"{key}={_plain(value)}" for key, value in sorted(options.items()))
    return f"{name}[{inside}]"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def parse_seeds(value: Any) -> list[int]:
    """Seeds from 3, "0-2", "0,2,5-7" or a list of such.

    Raises:
        InvalidInput: A part is not a whole number of at least 0 or a range of them.
    """
    parts: Iterable[Any] = value if isinstance(value, (list, tuple)) else str(value).split(",")
    seeds: list[int] = []
    for part in parts:
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", str(part))
        if match is None or isinstance(part, bool):
            raise InvalidInput(f"Cannot read the seeds {value!r}. Write 3, 0-2 or 0,2,5-7.")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise InvalidInput(f"The seed range {str(part).strip()} runs backwards. Write {last}-{first}.")
        if last - first >= 10_000:
            raise InvalidInput(f"The seed range {str(part).strip()} has {last - first + 1} seeds; at most 10,000.")
        seeds += range(first, last + 1)
    if not seeds:
        raise InvalidInput("No seeds given. Write 3, 0-2 or 0,2,5-7.")
    return list(dict.fromkeys(seeds))
