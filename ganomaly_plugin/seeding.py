"""The global random generators, which other packages' code and some detectors draw from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - other packages read the global state
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int, devices: Sequence[str] | None = None) -> Iterator[None]:
    """All of the global generators as `seed_all` leaves them inside, and as before outside; of GPUs `devices`, or all."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
