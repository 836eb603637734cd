"""Where a number comes from: versions, hardware, commit and command line."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ganomaly_plugin import __version__
from ganomaly_plugin.escape import storable

_PACKAGES = ("torch", "torchvision", "lightning", "anomalib", "scikit-learn", "numpy", "pandas", "jsonargparse")
#: For bug reports only: no result is theirs.
_EXTRAS = ("scipy", "matplotlib", "ray", "submitit", "onnx", "openvino", "mlflow", "tensorboard", "wandb")


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of this package and those it stands on; a missing package is left out."""
    found = {"ganomaly-plugin": __version__, "python": platform.python_version()}
    return found | {name: version for name in _PACKAGES if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this package runs from; empty when it is not one."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.parent:
            return {}  # installed inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {}


@functools.cache
def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def available_cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_folders(word: str) -> str:
    """A command-line word as it may be published: absolute paths relative to the working directory, or their last name.

    `--data-root=/home/anna/data` becomes `--data-root=…/data`: a record names no machine's folders and no person.
    """

    def shorten(match: re.Match[str]) -> str:
        path = Path(match[2])
        with contextlib.suppress(ValueError, OSError):  # it lies elsewhere, or somebody has removed that directory
            return match[1] + str(path.relative_to(Path.cwd()))
        return f"{match[1]}…/{path.name}"

    return storable(re.sub(r"(^|[=:,\[])(/(?!/)[^,\]]*)", shorten, word))


def environment(device: str) -> dict[str, Any]:
    """Everything a record says of where it was made; `device` is the torch device that the job ran on."""
    import torch

    return {
        "versions": versions(),
        "git": git_state(),
        **_machine(),
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "command": ["bench", *(without_folders(word) for word in sys.argv[1:])],
    }


def _machine() -> dict[str, Any]:
    import torch

    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def system_info() -> dict[str, Any]:
    """What `environment` says of every device here, flat, by readable names."""
    import torch

    git = git_state()
    extras = {name: version for name in _EXTRAS if (version := _version(name))}
    commit = f"{git['commit']}{' (changed)' if git['dirty'] else ''}" if git else "not a checkout"
    found = {**versions(), **extras, "commit": commit, **_machine()}
    found["cuda"], found["cudnn"] = torch.version.cuda or "none", torch.backends.cudnn.version() or "none"
    found["gpus"] = ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none"
    return found
