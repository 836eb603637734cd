"""Detectors that take their process with them, never end or take long: for tests of the executors."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from faulty_detectors import Sound
from torch.utils.data import DataLoader

from ganomaly_plugin.detectors.ae import AutoencoderRecipe
from ganomaly_plugin.images import to_float


class Segfaults(Sound):
    def _fit(self, images, **options):
        os.kill(os.getpid(), signal.SIGSEGV)


class Hangs(Sound):
    def _fit(self, images, **options):
        time.sleep(1000)


class DiesOnce(Sound):
    """Is killed at its first try for each seed; $BENCH_TEST_FOLDER remembers."""

    def _fit(self, images, *, seed, **options):
        mark = Path(os.environ["BENCH_TEST_FOLDER"]) / f"tried-{seed}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super()._fit(images, seed=seed, **options)


class Slow(Sound):
    """Some seconds of work, and a line for each time it was done."""

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__()
        self.seconds = seconds

    @property
    def hparams(self):
        return {"seconds": self.seconds}

    def _fit(self, images, *, seed, **options):
        time.sleep(self.seconds)
        with (Path(os.environ["BENCH_TEST_FOLDER"]) / "fits").open("a") as file:
            file.write(f"{seed}\n")
        super()._fit(images, seed=seed, **options)


class Exits(Sound):
    """Ends its process, or so it thinks."""

    def _fit(self, images, **options):
        sys.exit(0)


class ExitsAfterTraining(AutoencoderRecipe):
    """Likewise, and trains in a stack before."""

    def score(self, networks, images):
        sys.exit(0)


class Unspeakable(Sound):
    """Raises what has no text."""

    def _fit(self, images, **options):
        class Fault(Exception):
            def __str__(self):
                raise RuntimeError("no text")

        raise Fault


class Wanders(Sound):
    """Changes its process for everybody, and prints."""

    def _fit(self, images, **options):
        super()._fit(images, **options)
        os.chdir("/")
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.use_deterministic_algorithms(True)
        np.seterr(divide="raise")
        print("printed by a detector")


class Forks(Sound):
    """Forks, and lets both processes go on."""

    def _fit(self, images, **options):
        super()._fit(images, **options)
        Forks.child = os.fork()


class Interrupts(Sound):
    """Raises what means Ctrl-C, and leaves a thread that never ends."""

    def _fit(self, images, **options):
        threading.Thread(target=time.sleep, args=(1000,)).start()
        raise KeyboardInterrupt("from a detector")


class Describes(Sound):
    """Says something of itself that JSON has no form for."""

    def describe(self):
        return {"loss": float("nan")}


class StartsProcesses(Sound):
    """Loads its images in a process, as a DataLoader may, and ends another that would not end by itself."""

    def _fit(self, images, **options):
        loader = DataLoader(to_float(images), batch_size=1000, num_workers=1, multiprocessing_context="fork")
        super()._fit(torch.cat(list(loader)), **options)
        sleeper = get_context("fork").Process(target=time.sleep, args=(1000,))
        sleeper.start()
        sleeper.terminate()
        sleeper.join(20)
        assert sleeper.exitcode == -signal.SIGTERM, sleeper.exitcode


class SlowToScore(AutoencoderRecipe):
    """Trains quickly, and takes its time to score."""

    def score(self, networks, images):
        time.sleep(0.3)
        return super().score(networks, images)


class SlowAlone(SlowToScore):
    """Likewise, and does not train in a stack."""

    def build(self, chw):
        networks = super().build(chw)
        return {**networks, "encoder": torch.nn.Sequential(torch.nn.Dropout(0.3), networks["encoder"])}


def _broken(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


class BreaksDevice(Sound):
    """Does to its process what an illegal access does on a GPU."""

    def _fit(self, images, **options):
        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, _broken
        torch.set_rng_state = torch.cuda.set_rng_state = _broken  # generators of a GPU are not restored then
        _broken()


class BreaksDeviceAfterScoring(Sound):
    """Does so where samples for the report are made, which is no part of the result."""

    has_anomaly_map = True

    def _anomaly_map(self, images):
        BreaksDevice._fit(self, images)


class NeedsDevice(Sound):
    """Fails where the device is broken."""

    def _fit(self, images, **options):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        super()._fit(images, **options)
