"""Disturb sweeps on real clusters, and write what became of them to results/reliability/executors.md.

    python tests/reliability/clusters.py ray 5        # a node is killed in each sweep; wants .[ray]
    python tests/reliability/clusters.py slurm 3      # tasks cancelled and requeued, the runner killed; wants tests/slurm/start

Each line of the table is added by the run that measured it; what was there for the same disturbance is replaced.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ganomaly_plugin.provenance import cpu_name
from ganomaly_plugin.store import Store

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "results" / "reliability" / "executors.md"
HEAD = """# Sweeps disturbed on real clusters

A Ray cluster of two nodes and a SLURM of one, all on the loopback address of one machine (`tests/reliability/clusters.py`).
"Lost" are jobs without a record at the end, "twice" those with two, "changed" records that were finished before the
disturbance and are not byte for byte the same after it, "other tables" sweeps whose `auc.csv` is not byte for byte that of an
undisturbed run inline, "trained twice" jobs whose training had ended when their node or task did, and was done again.

| disturbance | sweeps | jobs | disturbances | lost | twice | changed | other tables | trained twice |
|---|---|---|---|---|---|---|---|---|
"""


def sweep(folder: Path, jobs: int, *where: object) -> subprocess.Popen[str]:
    what = ("--models", "crashing_detectors:Slow[seconds=2]", "--datasets", "digits", "--classes", "0", "--device", "cpu")
    words = ("run", *what, "--seeds", f"0-{jobs - 1}", *where, "--out", "out")
    command = [sys.executable, "-m", "ganomaly_plugin", *map(str, words)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (folder / "out").glob("records/*.json")}


def wait(condition: Callable[[], object], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


class Tally:
    """What went wrong in the sweeps of one line."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.sweeps, self.disturbed = jobs, 0, 0
        self.lost = self.twice = self.changed = self.tables = self.anew = 0

    def judge(self, folder: Path, calm: Path, kept: dict[Path, bytes]) -> None:
        records = Store(folder / "out").records()
        seeds = [record.job.seed for record in records if record.status == "done"]
        self.sweeps += 1
        self.lost += self.jobs - len(set(seeds))
        self.twice += len(seeds) - len(set(seeds))
        self.changed += sum(path.read_bytes() != content for path, content in kept.items())
        self.tables += (folder / "out" / "auc.csv").read_bytes() != (calm / "out" / "auc.csv").read_bytes()
        self.anew += len((folder / "fits").read_text().split()) - self.jobs

    def line(self, what: str) -> str:
        counts = (self.lost, self.twice, self.changed, self.tables, self.anew)
        return f"| {what} | {self.sweeps} | {self.sweeps * self.jobs} | {self.disturbed} | {' | '.join(map(str, counts))} |\n"


def undisturbed(folder: Path, jobs: int) -> Path:
    folder.mkdir()
    os.environ["BENCH_TEST_FOLDER"] = str(folder)
    done = sweep(folder, jobs, "--executor", "inline")
    text, _ = done.communicate()
    assert done.returncode == 0, text
    return folder


def on_ray(work: Path, sweeps: int, rng: random.Random, jobs: int = 10) -> Tally:
    """The second node is killed at a random moment of each sweep, a new one takes its place for the next."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    from ray.cluster_utils import Cluster

    tally, calm = Tally(jobs), undisturbed(work / "calm", jobs)
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100_000_000}
    for turn in range(sweeps):
        folder = work / str(turn)
        folder.mkdir()
        os.environ["BENCH_TEST_FOLDER"] = str(folder)
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        victim = cluster.add_node(**node)
        runner = sweep(folder, jobs, "--executor", "ray", "--address", cluster.address)
        wait(lambda folder=folder: finished(folder))
        time.sleep(rng.uniform(0, jobs))
        kept = finished(folder)
        cluster.remove_node(victim, allow_graceful=False)
        tally.disturbed += 1
        text, _ = runner.communicate(timeout=400)
        cluster.shutdown()
        assert runner.returncode == 0, text
        tally.judge(folder, calm, kept)
    return tally


def on_slurm(work: Path, sweeps: int, rng: random.Random, jobs: int = 6) -> Tally:
    """At random moments a running task is requeued, another cancelled, and the runner killed; then the same command again."""
    scripts = HERE.parent / "slurm"
    said = subprocess.run([scripts / "start", work / "slurm"], capture_output=True, text=True, check=True).stdout
    os.environ["SLURM_CONF"] = said.strip().partition("=")[2]
    tally, calm = Tally(jobs), undisturbed(work / "calm", jobs)

    def disturb(*command: str) -> None:
        running: list[str] = []

        def look() -> list[str]:
            asked = subprocess.run(["squeue", "-h", "-r", "-t", "running", "-o", "%F_%K"], capture_output=True, text=True)
            running[:] = asked.stdout.split()
            return running

        wait(look)
        time.sleep(rng.uniform(0, 10))
        if look():
            tally.disturbed += subprocess.run([*command, rng.choice(running)], capture_output=True).returncode == 0

    try:
        for turn in range(sweeps):
            folder = work / str(turn)
            folder.mkdir()
            os.environ["BENCH_TEST_FOLDER"] = str(folder)
            where = ("--executor", "slurm", "--cpus-per-job", 1, "--slurm-folder", work / "private")
            runner = sweep(folder, jobs, *where)
            disturb("scontrol", "requeue")
            disturb("scancel")
            kept = {path: content for path, content in finished(folder).items() if b'"status": "done"' in content}
            runner.kill()
            tally.disturbed += 1
            runner.communicate()
            for _ in range(2):  # what was cancelled while the runner looked on has failed; it is asked for again
                runner = sweep(folder, jobs, *where, "--retry-failed")
                text, _ = runner.communicate(timeout=550)
                print(text, file=sys.stderr)
            assert runner.returncode == 0, text
            tally.judge(folder, calm, kept)
    finally:
        subprocess.run([scripts / "stop", work / "slurm"], check=True)
    return tally


KINDS = {
    "ray": (on_ray, "Ray: `kill -9` of one of two nodes"),
    "slurm": (on_slurm, "SLURM: a task requeued, one cancelled, `kill -9` of the runner; the same command again"),
}


def main(kind: str, sweeps: int) -> None:
    """Measure, and put the line into the table."""
    measure, what = KINDS[kind]
    tests = str(HERE.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(dir="/tmp") as work:
        line = measure(Path(work), sweeps, random.Random(0)).line(what)
    before = TABLE.read_text() if TABLE.exists() else HEAD
    lines = [each for each in before.splitlines(keepends=True) if not each.startswith((f"| {what}", "Processor"))]
    TABLE.write_text("".join(lines).rstrip("\n") + "\n" + line + f"\nProcessor: {cpu_name()}, {os.cpu_count()} cores.\n")
    print(line)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
