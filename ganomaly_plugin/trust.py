"""What a config file may make `bench run` do that its user did not write: no code of its choice, and no folder of its choice.

A config travels: it is downloaded, mailed, published. The command line is the user's own word. So a class path that a config
names is imported only when the command line names its module too, and results go below the working directory or the config's
own folder. (Its data folder may be anywhere: what is downloaded, unpacked or decoded is written there.) Which cluster is
dialled, and what sbatch is told, the command line says alone. Registered names, `anomalib:NAME` and anomalib's own class
paths need no trust: they stand for code that is installed under a name that its package chose.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.files import as_path
from ganomaly_plugin.registry import is_registered


def on_command_line(option: str, words: Sequence[str]) -> bool:
    """Whether the words of a command line set `option`, such as "--out" or "--slurm-folder", also written with underscores."""
    given = ["--" + word[2:].partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    return option in given


def check_class_paths(kind: str, names: Iterable[str], trusted: Iterable[str], words: Sequence[str]) -> None:
    """Raise InvalidInput for a class path that only a config names.

    Args:
        kind: "detector" or "data set".
        names: Of a sweep's detectors or data sets, wherever they come from.
        trusted: Modules that --trust names.
        words: Of the command line.
    """
    roots = ("ganomaly_plugin", *trusted)
    for name in names:
        module, colon, attribute = name.partition(":")
        if not colon or not attribute or is_registered(kind, name):
            continue
        if any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", word) for word in words):
            continue
        if not any(module == root or module.startswith(f"{root}.") for root in roots):
            raise InvalidInput(
                f"The config names the class path {name!r}, and a config imports nothing by itself. If you trust that code, "
                f"add --trust {module}."
            )


#: Options of `bench run` that no config sets: a host that jobs and their code are sent to, and lines of a script.
NEVER_FROM_CONFIG = ("address", "sbatch")


def check_own_words(given: Mapping[str, object], words: Sequence[str]) -> None:
    """Raise InvalidInput when one of `NEVER_FROM_CONFIG` is `given`, and not by the `words` of the command line."""
    for name in NEVER_FROM_CONFIG:
        if name in given and not on_command_line(f"--{name}", words):
            raise InvalidInput(
                f"The config's {name} is {given[name]!r}; a config says neither which host is dialled nor what sbatch is told. "
                f"Give --{name} on the command line."
            )


def check_out(out: str, configs: Iterable[str], name: str = "out") -> None:
    """Raise InvalidInput when `out`, a config's `name`, lies neither below the working directory nor beside the config."""
    # resolve() would follow links that the user made, to a larger disk say.
    target = Path(os.path.abspath(as_path(out)))  # noqa: PTH100
    places = [Path.cwd(), *(Path(os.path.abspath(config)).parent for config in configs)]  # noqa: PTH100
    if not any(place in target.parents for place in places):
        raise InvalidInput(
            f"The config's {name} is {out!r}; a config writes only below the working directory or its own folder. "
            f"Give --{name.replace('_', '-')} on the command line."
        )
