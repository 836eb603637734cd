"""What SLURM says of our tasks, with and without its accounting."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

_PATIENCE = 60.0  # seconds for one answer of SLURM's controller


@dataclass(frozen=True)
class Queued:
    """A task that SLURM has not finished: its id as `scancel` takes it, and the name it was submitted under."""

    task: str
    name: str


def queue() -> list[Queued] | None:
    """Our unfinished tasks; None when SLURM does not answer, which says nothing about them."""
    text = _ask("squeue", "--noheader", "--array", "--me", "--format=%F|%K|%j")
    if text is None:
        return None
    found = []
    for line in text.splitlines():
        array, index, name = line.strip().split("|", 2)
        found.append(Queued(array if index == "N/A" else f"{array}_{index}", name))
    return found


def how_it_ended(task: str) -> tuple[str, str]:
    """SLURM's state of a finished task, such as "TIMEOUT", and its exit code "status:signal"; "UNKNOWN" when forgotten."""
    text = _ask("sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", f"--jobs={task}")
    if text and text.strip():
        state, code = text.strip().splitlines()[-1].split("|")
        return state.split()[0], code  # "CANCELLED by 1000"
    text = _ask("scontrol", "--oneliner", "show", "job", task) or ""
    state_found, code_found = re.search(r"\bJobState=(\w+)", text), re.search(r"\bExitCode=([\d:]+)", text)
    return state_found[1] if state_found else "UNKNOWN", code_found[1] if code_found else "?"


def was_taken_out(task: str) -> bool:
    """Whether SLURM knows the array of `task`, which it does not know: of one cancelled before it began it keeps nothing."""
    array, is_part, _ = task.partition("_")
    return bool(is_part) and bool(_ask("scontrol", "--oneliner", "show", "job", array))


def largest_array() -> int:
    """How many tasks one array may have here."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config") or "")
    return max(1, int(found[1]) - 1) if found else 1000


def _ask(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
