"""How users name a model or data set with options: `vae[latent_dim=2]`, on the command line and in YAML alike."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ganomaly_plugin.errors import InvalidInput, check_seed

_DOUBLE = r'"(?:[^"\\]|\\.)*"'
_QUOTED = rf"(?:{_DOUBLE}|'(?:[^']|'')*')"
_FORM = re.compile(rf"(?P<name>{_DOUBLE}|[^\[\]]+)(?:\[(?P<options>.*)\])?", re.DOTALL)
_BARE = re.compile(r'(?!["\s])[^\[\]]*(?<!\s)')
#: Quotes and braces count where YAML has them open a value, and are part of the text elsewhere: it's, a{b.
_MARK = re.compile(
    rf"(?:^|(?<=[\[({{,])|(?<=: ))\s*(?:\?\s+)?(?:[\w-]+\s*=\s*)?(?:{_QUOTED}\s*:\s*)?(?:{_QUOTED}|\{{)|[\[\](),}}]", re.DOTALL
)


@dataclass(frozen=True)
class Selection:
    """A name and the options that go with it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 and None as Python does; only in quotes are they text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"None$"), ["N"])


class _Dumper(yaml.SafeDumper):
    """YAML with all text in double quotes, in which nothing has a meaning of its own."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoting(dumper: Any, value: Any) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style='"')


_Dumper.add_representer(str, _quoting)
_Dumper.add_multi_representer(object, _quoting)


def split_list(text: str) -> list[str]:
    """`text` at its commas, those inside quotes, brackets and braces left alone; empty parts dropped."""
    parts, depth, braces, start = [], 0, 0, 0
    for match in _MARK.finditer(text):
        mark = match[0][-1]
        depth += (mark in "[(") - (mark in ")]")
        braces += (mark == "{") - (mark == "}" and braces > 0)
        if mark == "," and depth == 0 and braces == 0:
            parts.append(text[start : match.start()])
            start = match.end()
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
            options[key.strip()] = yaml.load(value, _Loader)  # a safe loader
        except (yaml.YAMLError, ValueError) as error:  # 2026-02-30 is a date to YAML, and none
            raise InvalidInput(
                f"Cannot read the value of {part!r}. Write a YAML value, such as 0.5 or [0.5, 0.999]."
            ) from error
    return options


def parse_texts(text: str, what: str) -> dict[str, str | bool]:
    """`key=value,key=value` with values that are the text they are, quoted or not; True for `true` without quotes.

    Raises:
        InvalidInput: A part is none, or a key is there twice; names it, and `what` it is in.
    """
    found: dict[str, str | bool] = {}
    for part in split_list(text):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z][\w-]*", key):
            example = f"""{what} 'exclude="n1,n2",qos=x'"""
            raise InvalidInput(
                f"Cannot read {part!r} in {what}. Write name=value, and put a value that has a comma in quotes: {example}."
            )
        if key in found:
            raise InvalidInput(f"{key} is given twice in {what}. Give it once.")
        try:
            quoted = re.fullmatch(_QUOTED, value, re.DOTALL)
            found[key] = str(yaml.load(value, _Loader)) if quoted else value == "true" or value
        except yaml.YAMLError as error:
            raise InvalidInput(f"Cannot read {part!r} in {what}. Quote the value as YAML does, or not at all.") from error
    return found


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
        for key in item.get("options", {}):
            if not isinstance(key, str):
                said = f"The {what} {item['name']} has an option {key!r}, which is no text"
                raise InvalidInput(f"{said}. Write name: value, such as latent_dim: 2.")
        return Selection(item["name"], {key: number_like(value) for key, value in item.get("options", {}).items()})
    match = _FORM.fullmatch(str(item).strip())
    if match is None:
        raise InvalidInput(f"Cannot read the {what} {item!r}. Write name or name[key=value,key=value].")
    name = unquoted(match["name"].strip(), what)
    if name.endswith(":"):
        raise InvalidInput(f"The {what} {name!r} ends in its colon. Write what is meant behind it, as in folder:PATH.")
    try:
        return Selection(name, parse_options(match["options"] or ""))
    except InvalidInput as error:
        if not name.startswith("folder:"):
            raise
        whole = show(str(item).strip(), {})
        raise InvalidInput(f"{error} A path that has brackets of its own stands in double quotes: {whole}.") from error


def unquoted(name: str, what: str) -> str:
    """`name` without the double quotes that it stands in, if it does.

    Raises:
        InvalidInput: What is between them is not as YAML has it.
    """
    if not re.fullmatch(_DOUBLE, name, re.DOTALL):
        return name
    try:
        return str(yaml.load(name, _Loader))
    except yaml.YAMLError as error:
        raise InvalidInput(f"Cannot read the {what} {name}. Write its name without quotes, or as YAML has them.") from error


def parse_label(label: str) -> Selection:
    """What `show` made the label of a record from; a label that cannot be read is a name without options.

    Such labels are those of versions that put no quotes around text such as `*.png`.
    """
    try:
        return parse_selection(label, "model")
    except InvalidInput:
        return Selection(label)


def show(name: str, options: Mapping[str, Any]) -> str:
    """The spelling that `parse_selection` reads back: in quotes what it would take for something else."""
    shown = name if _BARE.fullmatch(name) else _quoted(name)
    parts: list[str] = []
    for key, value in sorted(options.items(), reverse=True):
        part = f"{key}={_plain(value)}"
        if isinstance(value, (str, float, list, dict)) and not _reads_back(part, value, parts):
            part = f"{key}={_quoted(value)}"
        parts.insert(0, part)
    return f"{shown}[{','.join(parts)}]" if options else shown


def as_word(name: str) -> str:
    """`name` without options as one writes it in a shell."""
    return shlex.quote(show(name, {}))


def _reads_back(part: str, value: Any, rest: list[str]) -> bool:
    """Whether `key=value`, in front of the options `rest`, is read as one option of that value."""
    try:
        return split_list(",".join([part, *rest]))[0] == part and list(parse_options(part).values()) == [value]
    except InvalidInput:
        return False


def _quoted(value: Any) -> str:
    style: dict[str, Any] = {"default_flow_style": True, "allow_unicode": True, "sort_keys": False, "width": math.inf}
    return str(yaml.dump(value, None, _Dumper, **style)).rstrip()


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
        InvalidInput: A part is not a whole number of 32 bits or a range of them.
    """
    parts: Iterable[Any] = value if isinstance(value, (list, tuple)) else str(value).split(",")
    seeds: list[int] = []
    for part in parts:
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", str(part))
        if match is None or isinstance(part, bool):
            raise InvalidInput(f"Cannot read the seeds {value!r}. Write 3, 0-2 or 0,2,5-7.")
        first = int(match[1])
        last = check_seed(int(match[2] or first))
        if last < first:
            raise InvalidInput(f"The seed range {str(part).strip()} runs backwards. Write {last}-{first}.")
        if last - first >= 10_000:
            raise InvalidInput(f"The seed range {str(part).strip()} has {last - first + 1} seeds; at most 10,000.")
        seeds += range(first, last + 1)
    if not seeds:
        raise InvalidInput("No seeds given. Write 3, 0-2 or 0,2,5-7.")
    return list(dict.fromkeys(seeds))
