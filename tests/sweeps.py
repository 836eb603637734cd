"""Small sweeps for tests of what runs them: their jobs, `bench` in a process of its own, and waiting for what it does."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ganomaly_plugin.config import expand
from ganomaly_plugin.core import Chunk, Job, Outcome
from ganomaly_plugin.runner import Settings, run_job
from ganomaly_plugin.store import Store


def jobs(*models: str, classes: str = "0") -> list[Job]:
    from ganomaly_plugin.commands import DEFAULTS
    from ganomaly_plugin.config import Experiment
    from ganomaly_plugin.selection import Selection, parse_selection

    options = {**DEFAULTS, "datasets": [Selection("digits", {"image_size": 16})], "classes": classes.split(",")}
    selections = [parse_selection(model, "model") for model in models]
    return expand(Experiment(**{**options, "models": selections, "epochs": 1}))


def alone(chunk: Chunk, settings: Settings) -> Iterator[Outcome]:
    """Run each job of a chunk by itself: any jobs make a chunk then, not just those that train together."""
    for job in chunk:
        yield run_job(job, settings)


def store_in(folder: Path) -> Store:
    return Store(folder / "out", create=True)


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """`bench` in a process of its own."""
    command = [sys.executable, "-m", "ganomaly_plugin", *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
