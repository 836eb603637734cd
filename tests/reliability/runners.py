"""`bench` in processes of its own, and what a results folder must look like after a sweep, whatever befell it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ganomaly_plugin.cli import main
from ganomaly_plugin.store import Store

HERE = Path(__file__).resolve().parent
TABLES = ("auc.csv", "auc.md", "auc.tex")
#: `bench` on a machine of another name, where claims expire quickly.
ELSEWHERE = (
    "import sys; from ganomaly_plugin import claims; from ganomaly_plugin.cli import main; "
    "claims.this_host = lambda: sys.argv[1]; claims.EXPIRY, claims.HEARTBEAT = 3.0, 0.5; sys.exit(main(sys.argv[2:]))"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        check: What was done.
        times: How often.
        result: What came out.
        wanted: What should.
        passed: Whether it did.
    """

    check: str
    times: int
    result: str
    wanted: str
    passed: bool


def preload() -> None:
    """Import what `bench run` imports, so that forks need not."""
    for module in ("torch", "torch._dynamo", "sklearn.metrics", "sklearn.datasets", "scipy.stats", "jsonargparse"):
        importlib.import_module(module)
    ours = ("commands", "runner", "config", "executors.choose", "report.writers", "report.loggers", "detectors.classical")
    for module in (*ours, "detectors.ae", "datasets.digits"):
        importlib.import_module(f"ganomaly_plugin.{module}")


class Forked:
    """`bench` in a fork of this process, which has imported everything: a process of its own, at once. As `Popen` to use."""

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str]) -> None:
        out, err = os.pipe(), os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._be(words, cwd, env, out[1], err[1])
        os.close(out[1])
        os.close(err[1])
        self.stdout, self.stderr = os.fdopen(out[0]), os.fdopen(err[0])

    def _be(self, words: list[str], cwd: Path, env: dict[str, str], out: int, err: int) -> None:
        code = 70
        try:
            os.setsid()
            os.chdir(cwd)
            os.environ.update(env)
            os.dup2(out, 1)
            os.dup2(err, 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
            sys.argv = ["bench", *words]
            code = main(words)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, "it takes too long"
            time.sleep(0.005)
        return code


class Runner:
    """A `bench` process in a session of its own, whose lines on stderr are read, with their times, as they come."""

    def __init__(self, *words: object, cwd: Path, host: str | None = None, log: Path | None = None, fork: bool = False) -> None:
        code = ["-m", "ganomaly_plugin"] if host is None else ["-c", ELSEWHERE, host]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]), "OMP_NUM_THREADS": "1"}
        environment |= {} if log is None else {"BENCH_RELIABILITY_LOG": str(log)}
        options: dict[str, Any] = {"cwd": cwd, "env": environment}
        if fork:
            self.process: Any = Forked(list(map(str, words)), **options)
        else:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
            self.process = subprocess.Popen([sys.executable, *code, *map(str, words)], **options, **pipes)
        self.began = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self.stdout = ""
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read_stderr, self._read_stdout)]
        for thread in self._threads:
            thread.start()

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        self.stdout = self.process.stdout.read()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def sweeping_since(self) -> float | None:
        """When it said what there is to run; None before."""
        return next((at for at, line in list(self.lines) if re.match(r"\d+ jobs: ", line)), None)

    @property
    def jobs(self) -> list[tuple[float, str]]:
        """When each finished job was told, and its line without its number."""
        return [(at, line.partition("] ")[2]) for at, line in list(self.lines) if re.match(r"\[\d+/\d+\] ", line)]

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def wait(self, seconds: float = 600) -> int:
        code = self.process.wait(seconds)
        for thread in self._threads:
            thread.join(30)
        return code

    def kill(self) -> None:
        """kill -9 to the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def workers(self) -> list[int]:
        """Its worker processes."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                command = (stat.parent / "cmdline").read_bytes()
                if int(fields[1]) == self.process.pid and b"spawn_main" in command and fields[0] not in "ZX":
                    found.append(int(stat.parent.name))
        return sorted(found)

    def cpu(self) -> float:
        """Processor seconds that it and its workers have used."""
        ticks = 0
        for pid in (self.process.pid, *self.workers()):
            with contextlib.suppress(OSError):
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def rss(self) -> float:
        """Its resident memory, MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(*words: object, cwd: Path) -> Runner:
    """`bench` to its end."""
    runner = Runner(*words, cwd=cwd)
    runner.wait()
    return runner


def title(line: str) -> str:
    """The job that a line of progress is about."""
    return line.partition(": ")[0]


def faults(out: Path, calm: Path, runners: Sequence[Runner] = ()) -> list[str]:
    """What is wrong with `out`, the folder of a disturbed sweep, beside `calm`, that of an undisturbed one."""
    found = []
    disturbed, wanted = ({record.job.key: record for record in Store(folder).records()} for folder in (out, calm))
    if disturbed.keys() != wanted.keys():
        found.append(f"{len(disturbed)} of {len(wanted)} jobs are there")
    for key in disturbed.keys() & wanted.keys():
        if _result(disturbed[key]) != _result(wanted[key]):
            found.append(f"{wanted[key].job.slug} has another record")
        elif Store(out).scores_path(wanted[key].job).read_bytes() != Store(calm).scores_path(wanted[key].job).read_bytes():
            found.append(f"{wanted[key].job.slug} has other scores")
    found += [f"{name} differs" for name in TABLES if (out / name).read_bytes() != (calm / name).read_bytes()]
    if (out / "claims").exists():
        found.append("claims are left")
    told = Counter(title(line) for runner in runners for _, line in runner.jobs)
    found += [f"{name} was done {times} times" for name, times in told.items() if times > 1]
    found += [f"a traceback: {runner.text[-400:]}" for runner in runners if "Traceback" in runner.text]
    return found


def _result(record: Any) -> Any:
    return dataclasses.replace(record, seconds={}, environment={}, notes={})
