"""Progress: status files of running jobs, the estimate of what is left, and the picture on terminals of several sizes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ganomaly_plugin.core import Job, RunRecord
from ganomaly_plugin.estimate import clock, job_left, sweep_left
from ganomaly_plugin.live import LiveView, shortened
from ganomaly_plugin.progress import describe, status_folder
from ganomaly_plugin.runner import Plan, Settings, run_chunk
from ganomaly_plugin.status import Board, JobStatus, Status, here
from ganomaly_plugin.store import Store

HERE = here()


def job(detector: str, category: str = "0", seed: int = 0, dataset: str = "digits", epochs: int | None = 4) -> Job:
    return Job(detector, {}, dataset, {"image_size": 16}, "one-anomalous/strict-v1", category, seed, epochs)


def done(its: Job, auroc: float = 0.9, seconds: float = 10.0) -> RunRecord:
    return RunRecord(its, "done", metrics={"auroc": auroc, "auprc": 0.5}, seconds={"fit": seconds})


def at_work(started: float, done: int, losses: dict[str, float] | None = None) -> Status:
    return Status(started, HERE, os.getpid(), done, 4, losses=losses or {}, images_per_second=812.3)


def picture(
    jobs: list[Job], records: list[RunRecord], running: dict[str, Status], folder: Path, width: int, height: int, **more: object
) -> list[str]:
    """The lines of the live view 100 s after the start, on a terminal of that size."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system=None, **more)  # type: ignore[arg-type]
    view = LiveView(Plan(jobs, jobs, [], [], []), Board(folder), console)
    took = [(r.job, sum(r.seconds.values())) for r in records if r.status == "done"]
    view.began, view.workers = 1000.0, 2
    console.print(view.picture({r.job.slug: r for r in records}, running, took, now=1100.0))
    lines = file.getvalue().splitlines()
    assert len(lines) < height and max(len(line.rstrip()) for line in lines) <= width, lines
    return [line.rstrip() for line in lines]


def test_cells_fill_up(tmp_path: Path) -> None:
    jobs = [job(d, c) for d in ("ganomaly", "pca") for c in ("0", "1", "2")]
    records = [done(jobs[0], 0.951), RunRecord(jobs[3], "failed", error="no luck"), done(jobs[4], 0.7, seconds=2)]
    losses = {"contextual": 0.123456, "generator": 25.41, "discriminator": 0.35}
    running = {jobs[1].slug: at_work(1090, 1, losses)}
    lines = picture(jobs, records, running, tmp_path, 140, 30)
    assert "3/6 jobs  1 running  1 failed  1:40 so far  0:30 left" in lines[0]  # ganomaly: 30 s more; 10 + 2 for two workers
    assert lines[1:3] == ["digits 16×16, one-anomalous/strict-v1", "AUROC         0      1      2"]
    assert lines[3:5] == ["ganomaly  0.951    25%      ·", "pca           ✗  0.700      ·"]
    assert "epochs  images/s  so far  left  losses" in lines[5]
    assert re.search(
        r"ganomaly · digits · 1 · s0 +1/4 +812 +0:10 +0:30  generator 25.4  discriminator 0.35  contextual 0.123", lines[6]
    )
    narrow = picture(jobs, records, running, tmp_path, 80, 24)
    assert "generator 25.4" in narrow[6] and "discriminator" not in narrow[6]
    assert picture(jobs, records, running, tmp_path, 40, 24)[0].count("jobs") <= 1


@pytest.mark.parametrize(
    ("fallbacks", "said"),
    [(["no validation set"], "; no validation set"), (3, ""), ("some", ""), ([1], ""), (None, ""), ({"a": "b"}, "")],
)
def test_only_fallbacks_in_words_are_said(fallbacks: object, said: str) -> None:
    record = replace(done(job("pca")), notes={"describe": {"fallbacks": fallbacks}})
    assert describe(record) == f"pca · digits · class 0 · seed 0: AUROC 0.900 (10.0 s){said}"


def test_a_category_is_said() -> None:
    bottle = replace(job("pca"), data={"image_size": 16, "category": "bottle"})
    assert describe(done(bottle)) == "pca · digits · bottle · class 0 · seed 0: AUROC 0.900 (10.0 s)"
    assert bottle.title == "pca · digits · one-anomalous/strict-v1 · bottle · class 0 · seed 0"


def test_seeds_share_a_cell(tmp_path: Path) -> None:
    jobs = [job("ganomaly", c, s) for c in ("0", "1") for s in range(3)]
    records = [done(jobs[0], 0.9), done(jobs[1], 0.8), RunRecord(jobs[2], "failed", error="x"), done(jobs[3], 0.7)]
    lines = picture(jobs, records, {jobs[4].slug: at_work(1090, 2)}, tmp_path, 100, 24)
    assert lines[3].split() == ["ganomaly", "0.850", "2/3✗", "0.700", "1/3▶"]


def test_cells_that_do_not_fit_become_shorter_and_then_rows(tmp_path: Path) -> None:
    jobs = [job("ganomaly", str(c), s) for c in range(10) for s in range(5)]
    records = [done(each, 0.9) for each in jobs[:24]]
    wide, middle, narrow = (picture(jobs, records, {}, tmp_path, width, 24) for width in (140, 80, 60))
    assert wide[2].split() == middle[2].split() == ["AUROC", *map(str, range(10))]
    assert wide[3].split() == ["ganomaly", *["0.900"] * 5, "4/5", *["·"] * 5]
    assert middle[3].split() == ["ganomaly", *["0.900"] * 4, "4/5", *["·"] * 5]
    assert narrow[1].split()[:3] == ["detector", "data", "set"] and narrow[2].split() == [
        "ganomaly",
        "digits",
        "24/50",
        "0.900",
    ]


def test_figures_stay_where_names_are_longer_than_the_terminal(tmp_path: Path) -> None:
    jobs = [job(f"ganomaly_{'x' * 40}", str(c), dataset="folder:a_folder_of_many_pictures") for c in range(12)]
    lines = picture(jobs, [done(each, 0.912) for each in jobs[:3]], {jobs[3].slug: at_work(1090, 2)}, tmp_path, 40, 24)
    (row,) = (line for line in lines if "3/12" in line and "jobs" not in line)
    assert row.split()[-3:] == ["3/12", "1", "0.912"] and row.startswith("ga")
    assert any(line.startswith("gan") and "s0 " in line and "2/4" in line and "812" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 50), (40, 12), (200, 60)])
def test_hundreds_of_cells_become_rows(tmp_path: Path, width: int, height: int) -> None:
    jobs = [
        job(f"detector{k:02}", str(c), s, d)
        for k in range(30)
        for d in ("digits", "mnist")
        for c in range(10)
        for s in range(3)
    ]
    records = [done(each) for each in jobs[:100]]
    running = {each.slug: at_work(1090, 1) for each in jobs[100:112]}
    lines = picture(jobs, records, running, tmp_path, width, height)
    text = "\n".join(lines)
    assert "100/1800 jobs" in text and "more" in text
    if width >= 80:
        assert "30/30" in text or "10/30" in text
        assert re.search(r"\bdetector01 +mnist? +10/30 +12 +0.900", text)  # what is at work comes first


class Told:
    """A board that says what it is told to."""

    running: dict[str, Status] = {}

    def read(self, slugs: object) -> dict[str, Status]:
        return self.running


def test_the_view_counts_workers_and_lets_go_of_what_is_done() -> None:
    jobs, board, file = [job("ganomaly", str(c)) for c in range(4)], Told(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, height=24, color_system=None)
    view = LiveView(Plan(jobs, jobs, [], [], []), board, console)  # type: ignore[arg-type]
    for count in (1, 2, 0):
        board.running = {each.slug: at_work(0, 1) for each in jobs[:count]}
        view.render()
    assert view.workers == 2  # between two jobs a worker is none less
    view.add(RunRecord(jobs[0], "failed", error="no luck", seconds={"total": 9.0}))
    view.add(done(jobs[1], 0.9))
    assert [its for its, _ in view.took] == [jobs[1]]  # a failure says nothing of how long a job takes
    board.running = {jobs[1].slug: at_work(0, 4)}  # its file is not gone yet
    console.print(view.render())
    assert "2/4 jobs" in file.getvalue() and "running" not in file.getvalue()


def test_running_jobs_are_the_oldest_ones(tmp_path: Path) -> None:
    jobs = [job("ganomaly", "0", seed) for seed in range(12)]
    lines = picture(jobs, [], {each.slug: at_work(1000 + each.seed, 1) for each in reversed(jobs)}, tmp_path, 100, 40)
    assert [line.split("s", 2)[2].split()[0] for line in lines if " · s" in line] == list("01234567")
    assert lines[-1].strip() == "… and 4 more"


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    part = {"data": {"image_size": 16, "category": "[b]ottle"}, "category": "anomaly"}
    jobs = [replace(job("vae", dataset="[i]mages"), label=f"vae[latent_dim={k}]", hparams={"k": k}, **part) for k in range(9)]
    endless = replace(at_work(1090, 1), total=None)
    cells = picture(jobs, [], {jobs[0].slug: endless}, tmp_path, 140, 40)
    assert cells[2].split() == ["AUROC", "[b]ottle"] and cells[3].split() == ["vae[latent_dim=0]", "▶"]
    assert cells[-1].split()[:7] == ["vae[latent_dim=0]", "·", "[i]mages", "·", "[b]ottle", "·", "s0"]
    rows = picture(jobs, [], {}, tmp_path, 80, 10)
    assert rows[2].split()[:2] == ["vae[latent_dim=0]", "[i]mages"]
    assert shortened("vae[latent_dim=0]", 3) == "vae[lat…" and shortened("pca", 3) == "pca"


def test_what_is_left_by_hand() -> None:
    a, b = job("a"), job("b")
    assert job_left(at_work(20, 0), 25.0, now=10) == 25 and job_left(at_work(0, 0), 5.0, now=10) == 0  # clocks differ; overdue
    assert job_left(at_work(0, 1), None, now=10) == 30 and job_left(at_work(0, 0), 25.0, now=10) == 15
    assert job_left(at_work(0, 4), 25.0, now=10) == 15  # trained, and scoring
    assert sweep_left([a], [], [], 1, now=0) is None
    assert sweep_left([a, a, b], [], [(a, 10.0), (a, 20.0), (b, 3.0)], 2, now=0) == pytest.approx((15 + 15 + 3) / 2)
    assert sweep_left([a], [(a, at_work(0, 1))], [], 1, now=10) == pytest.approx(40 + 30)  # its pace stands for its kind
    assert sweep_left([], [(a, at_work(0, 1)), (b, at_work(0, 2))], [], 2, now=10) == pytest.approx(30)  # the slowest
    assert [clock(s) for s in (None, 7, 750, 11100)] == ["–", "0:07", "12:30", "3:05:00"]


def test_a_running_job_tells_of_itself_and_then_no_more(tmp_path: Path) -> None:
    its = job("ganomaly")
    with Board(tmp_path / "running") as board:
        with JobStatus(board.folder, its) as status:
            assert board.read({its.slug: 1})[its.slug].done == 0 and board.read({}) == {}
            status.images = 100
            status.epoch(1, object(), 2.0)  # type: ignore[arg-type]
            assert board.read({its.slug: 1})[its.slug].done == 0  # at most one write a second
            status._written = -10.0
            status.epoch(2, object(), 2.0)  # type: ignore[arg-type]
            found = board.read({its.slug: 1})[its.slug]
            assert (found.done, found.total, found.images_per_second, found.pid) == (2, 4, 50.0, os.getpid())
        assert list(board.folder.iterdir()) == []
    assert not (tmp_path / "running").exists()
    with JobStatus(tmp_path / "another disk", its) as status:
        assert status.path is None and status.hook(None) is None and not (tmp_path / "another disk").exists()


def test_what_the_dead_left_behind_disturbs_nobody(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    sound = {"started": 1.0, "host": HERE, "pid": os.getpid()}
    contents = {
        "sound": json.dumps(sound),
        "dead": json.dumps({**sound, "pid": dead.pid}),
        "cut": json.dumps(sound)[:20],
        "list": "[]",
        "alien": json.dumps({**sound, "mood": "good"}),
        "nan": json.dumps({**sound, "losses": {"generator": float("nan")}}),
        "huge": json.dumps({**sound, "pid": 10**30}),
        "empty": "",
        "old-elsewhere": json.dumps({**sound, "host": "another"}),
        "new-elsewhere": json.dumps({**sound, "host": "another"}),
    }
    for name, text in contents.items():
        (tmp_path / f"{name}.json").write_text(text)
    os.utime(tmp_path / "old-elsewhere.json", (time.time() - 60,) * 2)
    board = Board(tmp_path)
    with board:
        os.utime(tmp_path / "new-elsewhere.json", (time.time() + 1,) * 2)
        assert set(board.read(contents)) == {"sound", "new-elsewhere"}
    assert {path.stem for path in tmp_path.iterdir()} == {"sound", "new-elsewhere"}


@pytest.mark.parametrize("model", ["ganomaly", "ganomaly_plus"])
def test_being_watched_changes_no_result(tmp_path: Path, model: str) -> None:
    from test_executors import jobs

    (its,) = jobs(f"{model}[features=2,latent_dim=4]")
    (alone,) = run_chunk((its,), Settings(device="cpu"))
    with Board(tmp_path / "running") as board:
        (watched,) = run_chunk((its,), Settings(device="cpu", status=str(board.folder)))
    assert watched.record.metrics == alone.record.metrics and watched.record.history == alone.record.history


def on_a_terminal(words: list[str], folder: Path) -> tuple[int, int]:
    """`bench` with a terminal of 80 × 24 for stderr: its pid and the terminal's other end."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ganomaly_plugin", *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
    )
    os.close(theirs)
    return process, ours  # type: ignore[return-value]


def read_all(end: int) -> str:
    """What was written to a terminal until it was closed."""
    parts = []
    while True:
        try:
            part = os.read(end, 65536)
        except OSError:  # Linux says EIO when the other end is closed
            part = b""
        if not part:
            return b"".join(parts).decode()
        parts.append(part)


@pytest.mark.slow
def test_on_a_terminal_and_killed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    words = ["run", "--datasets", "digits", "--classes", "0", "--device", "cpu", "--out", "out"]
    words += ["--models", "crashing_detectors:Slow,pca", "--seeds", "0-1"]
    process, end = on_a_terminal(words, tmp_path)
    running = tmp_path / "out" / "running"
    limit = time.monotonic() + 60
    while not list(running.glob("*.json")):
        assert time.monotonic() < limit, "no status file"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    read_all(end)
    os.close(end)
    process, end = on_a_terminal(words, tmp_path)
    text = read_all(end)
    assert process.wait() == 0, text
    os.close(end)
    assert "4/4 jobs" in text and "\x1b[?25l" in text and not re.search(r"\x1b\[3\d", text), text  # drawn, and without colours
    assert not running.exists() and len(Store(tmp_path / "out").records()) == 4


def test_logs_and_dumb_terminals_get_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("FORCE_COLOR", "1")  # as continuous integration sets it
    assert status_folder(tmp_path, io.StringIO()) is None
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert status_folder(tmp_path, Terminal()) is None
    monkeypatch.setenv("TERM", "xterm")
    assert status_folder(tmp_path, Terminal()) == tmp_path.resolve() / "running"
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    assert status_folder(tmp_path, Terminal()) is None
