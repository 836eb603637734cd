"""The errors a user sees: one line that says what is wrong, what is allowed, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from numbers import Integral


class BenchError(Exception):
    """Base of every error this package raises on purpose; its text is one readable line."""


class InvalidInput(BenchError, ValueError):
    """An argument, image array, name or option is not usable."""


class NotFitted(BenchError, RuntimeError):
    """`score`, `anomaly_map` or `save` was called before `fit`."""


class Diverged(BenchError, ArithmeticError):
    """Training produced a loss that is not finite; names the loss and the step."""


class CorruptFile(BenchError, ValueError):
    """A file that this package wrote, or was told to read, is truncated or not of its format."""


class CannotStore(BenchError):
    """A result cannot be written: the disk is full, read-only or gone. What is stored stays as it is."""


#: What a detector or data set may end with that is its own failure; Ctrl-C is not.
FAULTS = (Exception, SystemExit)


def one_line(error: BaseException) -> str:
    """`error` as one line: its type where the text alone would not say what happened, or where it has no text."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # its own `__str__` raises
        text = ""
    if text and isinstance(error, BenchError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_seed(seed: object) -> int:
    """`seed` as an int; raises InvalidInput unless it is a whole number, also one of numpy's, of 32 bits.

    Of a larger one torch's generator on a CPU would take the last 32 bits only, so that two seeds could give one detector.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**32:
        raise InvalidInput(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}.")
    return int(seed)


def check_known(kind: str, name: object, known: Collection[str], *, todo: str = "") -> None:
    """Raise the error of `unknown` unless `name` is text and among `known`."""
    if not isinstance(name, str) or name not in known:
        raise unknown(kind, name, known, todo=todo)


def unknown(kind: str, name: object, known: Iterable[str], *, todo: str = "") -> InvalidInput:
    """The error for a name that is not among `known`, with the nearest known name first."""
    names = sorted(known)
    hint = nearest(name, names)
    rest = f" {todo}" if todo else ""
    parts = str(name).split()
    if len(parts) > 1 and set(parts) <= set(names):
        hint = f" Put commas between names, and no spaces: {','.join(parts)}."
    return InvalidInput(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or '(none)'}.{rest}")


def nearest(name: object, known: Iterable[str]) -> str:
    """` Did you mean 'that'?` with the nearest of `known`, however its letters are written; nothing where none is near."""
    names = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(str(name).casefold(), names, n=1, cutoff=0.5)
    return f" Did you mean {names[near[0]]!r}?" if near else ""
