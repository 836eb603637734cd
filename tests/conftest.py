"""Shared fixtures: small images, a tiny results folder, and the `bench` command in this process."""

from __future__ import annotations

import os

# The tests' networks are tiny: a second thread only waits for the first, and on a busy machine both wait long. Set before
# torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for a GPU are carried out here; set before Triton is imported

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ganomaly_plugin.cli import main

# A script's background job inherits an ignored SIGINT and hands it on, and the processes that tests interrupt would not stop.
signal.signal(signal.SIGINT, signal.default_int_handler)

# At the first gradient of a process autograd starts a thread for each GPU, one that fake tensors only pretend included, and no
# fork of it can train from then on, as those of runners in tests do. So let the first gradient come before any fake tensor.
torch.ones(1, requires_grad=True).sum().backward()

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> list[Path]:
    return sorted(GOLDEN.glob("*.npz"))


def blobs(n: int, *, channels: int = 1, side: int = 16, seed: int = 0) -> np.ndarray:
    """Smooth bright blobs with a little noise, float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(-1, 1, side)
    centre = rng.uniform(-0.2, 0.2, (n, 2, 1, 1))
    distance = (axis[None, :, None] - centre[:, 0]) ** 2 + (axis[None, None, :] - centre[:, 1]) ** 2
    images = 1.6 * np.exp(-distance / 0.2)[:, None] - 0.8 + rng.normal(0, 0.03, (n, channels, side, side))
    return np.clip(images, -1, 1).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where crashing detectors remember things, known to this process and to those it starts."""
    monkeypatch.setenv("BENCH_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real SLURM on this machine; gives its $SLURM_CONF."""
    scripts, folder = Path(__file__).parent / "slurm", tmp_path_factory.mktemp("slurm")
    said = subprocess.run([scripts / "start", folder], capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr
    yield said.stdout.strip().partition("=")[2]
    subprocess.run([scripts / "stop", folder], timeout=60, check=True)


@pytest.fixture
def slurm(slurm_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's commands reach the cluster, from here and from processes that are started here."""
    monkeypatch.setenv("SLURM_CONF", slurm_cluster)


@pytest.fixture
def ray_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A real Ray cluster of two nodes with a processor each, all on 127.0.0.1."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's way to say: stay on the loopback address
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]):
    """Run `bench` in this process; returns (exit code, stdout, stderr). Jobs run here too, unless the words say where."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        here = words[:1] == ("run",) and not {"--executor", "--workers", "--devices", "--retries", "--timeout"} & set(
            map(str, words)
        )
        code = main([str(word) for word in (*words, *(("--executor", "inline") if here else ()))])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs data sets, a cluster or minutes, unless `-m` with that marker asks for it."""
    for marker in ("real_data", "fuzz", "anomalib_cli", "loggers", "ray", "slurm", "slow"):
        needing = [item for item in items if item.get_closest_marker(marker)]
        if needing and marker not in (config.option.markexpr or ""):
            config.hook.pytest_deselected(items=needing)
            items[:] = [item for item in items if item not in needing]


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[str], list[list[str]]]:
    """What a script prints that compiles Triton's kernels for a GPU, in a process that does not interpret them, in words."""
    if torch.version.cuda is None:
        pytest.skip("this torch's Triton does not compile for CUDA")

    def run(script: str) -> list[list[str]]:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-W", "error", "-c", script]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr
        return [line.split() for line in said.stdout.splitlines()]

    return run
