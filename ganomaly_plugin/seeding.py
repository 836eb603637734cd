"""The global random generators, which other packages' code and some detectors draw from."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

_TURNS = threading.RLock()  # of threads: the generators are the process's


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - other packages read the global state
    torch.manual_seed(seed)


def global_states() -> dict[str, Any]:
    """The states of the global generators, that of torch for the CPU, by library, as values that compare with `==`."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    numpy = (legacy[1].tobytes(), *legacy[2:])
    return {"torch": torch.get_rng_state().numpy().tobytes(), "numpy": numpy, "random": random.getstate()}


@contextlib.contextmanager
def kept(devices: Sequence[Any] | None = None) -> Iterator[None]:
    """All of the global generators outside as before, whatever is drawn inside; of GPUs `devices`, or all."""
    with torch.random.fork_rng(devices):
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def seeded(seed: int, devices: Sequence[str] | None = None) -> Iterator[None]:
    """All of the global generators as `seed_all` leaves them inside, and as before outside; of GPUs `devices`, or all.

    Threads wait for each other.
    """
    with _TURNS, kept(devices):
        seed_all(seed)
        yield


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """The CPU generator of torch at `seed` inside, and as before outside. Threads wait for each other."""
    with _TURNS, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs too
        yield
