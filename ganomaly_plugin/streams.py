"""Standard streams that end no command: what cannot be printed costs its line, not the work that it tells of."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import Any


class Lenient:
    """A text stream that drops what its reader, or the disk below it, does not take; all else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` if that can be done."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: somebody closed it
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Likewise each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush if that can be done."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mend_streams() -> None:
    """Let no text fail for want of a place on stderr, nor on stdout unless its reader goes or its disk fills up.

    A stream may be closed, or have an encoding that lacks a character.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - open as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, Lenient):
        sys.stderr = Lenient(sys.stderr)


def print_file(text: str) -> None:
    """Print what a file is to hold: in UTF-8, whatever the terminal's encoding."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")
    print(text, end="")
