"""Ray: addresses that cannot be, and a real cluster of two nodes, one of which is removed in mid-sweep.

The second half runs with `pytest -m ray tests/test_ray.py tests/test_executors.py`.
"""

from __future__ import annotations

import io
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sweeps import start, wait_for

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.executors.ray_cluster import check_address, connect, work
from ganomaly_plugin.store import Store


@pytest.mark.parametrize("address", ["head", "ray://10.0.0.1:10001", "10.0.0.1:", ":6379", "head:port"])
def test_addresses_that_cannot_be(address: str) -> None:
    with pytest.raises(InvalidInput, match="--address must be auto or host:port of the head"):
        check_address(address)


def test_an_address_where_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(InvalidInput, match=r"No Ray cluster answers at 127\.0\.0\.1:.*ray start --head"):
            check_address(f"127.0.0.1:{free.getsockname()[1]}")


def test_what_a_task_prints_does_not_fail_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    printed = work(lambda chunk: [print("\udcff", file=sys.stderr)], (), str(tmp_path), [])
    assert list(printed) == [None, None]


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidInput, match=r"needs Ray: pip install 'ganomaly-plugin\[ray\]'"):
        connect(None)


def words(seeds: str, *more: object) -> tuple[object, ...]:
    what = ("--models", "crashing_detectors:Slow[seconds=2]", "--datasets", "digits", "--classes", "0", "--device", "cpu")
    return ("run", *what, "--seeds", seeds, "--executor", "ray", *more, "--out", "out")


def records(folder: Path) -> list[Path]:
    return sorted((folder / "out" / "records").glob("*.json"))


@pytest.mark.ray
def test_a_node_is_removed_in_mid_sweep(folder: Path, ray_cluster: Any) -> None:
    runner = start(*words("0-7", "--address", ray_cluster.address), cwd=folder)
    wait_for(lambda: len(records(folder)) >= 2, 200)
    ray_cluster.remove_node(next(iter(ray_cluster.worker_nodes)), allow_graceful=False)
    kept = {path: path.read_bytes() for path in records(folder)}
    stdout, stderr = runner.communicate(timeout=300)
    assert runner.returncode == 0 and "[8/8]" in stderr and "FAILED" not in stderr, stderr
    assert stdout.startswith("digits 16") and "raylet" not in stdout
    assert sorted(record.job.seed for record in Store(folder / "out").records()) == list(range(8))
    assert all(path.read_bytes() == content for path, content in kept.items())
    fits = (folder / "fits").read_text().split()
    assert set(fits) == set(map(str, range(8)))


@pytest.mark.ray
def test_ctrl_c_ends_the_tasks_and_an_unmet_wish_is_told(folder: Path, ray_cluster: Any) -> None:
    runner = start(*words("0-40", "--address", ray_cluster.address), cwd=folder)
    wait_for(lambda: len(records(folder)) >= 1, 200)
    runner.send_signal(signal.SIGINT)
    stdout, stderr = runner.communicate(timeout=60)
    assert runner.returncode == 130 and "interrupted: finished jobs are kept" in stderr and "AUROC" in stdout, stderr
    time.sleep(1)
    fits = (folder / "fits").read_text()
    time.sleep(3)
    assert (folder / "fits").read_text() == fits
    waiting = start(*words("41", "--address", ray_cluster.address, "--gpus-per-job", 0.5), cwd=folder)
    assert waiting.stderr is not None
    said = next(line for line in waiting.stderr if "no node" in line)
    assert "1 CPUs and 0.5 GPUs; waiting for one" in said
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=60)
    assert waiting.returncode == 130
