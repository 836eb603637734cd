"""Scoring in chunks: what a chunk may not change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs

from ganomaly_plugin import make_detector
from ganomaly_plugin.training import scoring
from ganomaly_plugin.training.precision import precision
from ganomaly_plugin.training.room import make_room, out_of_memory
from ganomaly_plugin.training.scoring import scoring_mode

TINY: dict[str, dict[str, Any]] = {
    "ganomaly": {"features": 4, "latent_dim": 8},
    "ganomaly_plus": {"features": 4, "latent_dim": 8},  # passes views of its images together
    "alad": {"features": 4, "latent_dim": 8, "joint_features": 4},  # has BatchNorm of vectors
    "skip_ganomaly": {"features": 4, "latent_dim": 8},
}


@pytest.mark.parametrize("batchnorm", ["running", "batch"])
@pytest.mark.parametrize("name", TINY)
def test_several_batches_at_once_are_scored_as_each_is(name: str, batchnorm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make_detector(name, **TINY[name], batch_size=4, batchnorm=batchnorm).fit(blobs(40), epochs=1, device="cpu")
    images = blobs(31, seed=1)  # seven batches, of which three go together, and a short one
    alone = detector.score(images)
    monkeypatch.setattr(scoring, "_at_once", lambda recipe, images, device: 13)
    together = detector.score(images)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6 * np.abs(alone).max())
    if batchnorm == "batch":
        assert np.abs(detector.score(images[:27]) - alone[:27]).max() > 1e-3 * np.abs(alone).max()  # a batch does matter


@pytest.mark.parametrize(("batchnorm", "fewest"), [("running", 1), ("batch", 4)])
def test_what_does_not_fit_into_memory_is_scored_in_smaller_chunks(
    batchnorm: str, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = make_detector("ganomaly", **TINY["ganomaly"], batch_size=4, batchnorm=batchnorm)
    detector.fit(blobs(40), epochs=1, device="cpu")
    images, score, sizes = blobs(31, seed=1), type(detector.recipe).score, []
    alone = detector.score(images)
    monkeypatch.setattr(scoring, "_at_once", lambda recipe, images, device: 31)

    def narrow(limit: int) -> None:
        def limited(self: Any, networks: Any, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            if len(x) > limit:
                raise torch.OutOfMemoryError("no room for so many")
            return score(self, networks, x)

        monkeypatch.setattr(type(detector.recipe), "score", limited)

    narrow(9)
    np.testing.assert_allclose(detector.score(images), alone, rtol=1e-4, atol=1e-6 * np.abs(alone).max())
    assert max(sizes) > 9 >= sizes[-1]
    narrow(0)
    with pytest.raises(torch.OutOfMemoryError):
        detector.score(images)
    assert sizes[-1] == fewest


def test_threads_that_score_with_batch_statistics_wait_for_each_other() -> None:
    detector = make_detector("ganomaly", **TINY["ganomaly"], batch_size=4, batchnorm="batch")
    detector.fit(blobs(16), epochs=1, device="cpu")
    images = blobs(12, seed=1)
    wanted = detector.score(images)
    with ThreadPoolExecutor(4) as pool:
        assert all((found == wanted).all() for found in pool.map(lambda _: detector.score(images), range(60)))


@pytest.fixture
def switch() -> Iterator[Any]:
    found: Any = torch.backends.cudnn.conv
    before = found.fp32_precision
    found.fp32_precision = "tf32"
    yield found
    found.fp32_precision = before


def test_threads_keep_the_precision_of_a_gpu_to_themselves(switch: Any) -> None:
    """Which is a switch of the process."""

    def inside(_: int) -> str:
        with scoring_mode({}, "running"):
            time.sleep(0.001)
            return switch.fp32_precision

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(inside, range(40))) == {"ieee"}
    assert switch.fp32_precision == "tf32"
    with precision("tf32"):
        assert inside(0) == "ieee" and switch.fp32_precision == "tf32"
    with precision("float32"), precision("tf32"):
        assert switch.fp32_precision == "tf32"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (MemoryError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_how_a_device_says_that_its_memory_does_not_do(error: Exception, is_one: bool) -> None:
    assert out_of_memory(error) is is_one


@pytest.mark.parametrize(
    ("name", "batchnorm", "side", "on_cpu", "on_gpu"),
    [
        ("ganomaly", "running", 32, 256, 2048),
        ("ganomaly", "running", 256, 256, 256),
        ("ganomaly", "batch", 32, 64, 2048),
        ("ganomaly", "batch", 256, 64, 64),
        ("anogan", "running", 32, 256, 256),
        ("anogan", "batch", 32, 64, 64),
    ],
)
def test_how_many_are_scored_at_once(name: str, batchnorm: str, side: int, on_cpu: int, on_gpu: int) -> None:
    recipe = make_detector(name, batchnorm=batchnorm).recipe
    images = torch.zeros(3, 1, side, side, dtype=torch.uint8)
    found = [scoring._at_once(recipe, images, torch.device(device)) for device in ("cpu", "cuda")]
    assert found == [on_cpu, on_gpu]


def test_room_is_made_where_nothing_may_have_a_gradient() -> None:
    with torch.inference_mode():
        make_room()
