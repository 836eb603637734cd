"""Full and read-only disks, damaged and exchanged files, claims of the living, the dead and other machines."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_measures import fill, outcome

from ganomaly_plugin import claims, files
from ganomaly_plugin.claims import Claims, is_alive, started
from ganomaly_plugin.core import Job, Outcome
from ganomaly_plugin.errors import CannotStore, CorruptFile, InvalidInput
from ganomaly_plugin.integrity import check_against_scores, check_storable
from ganomaly_plugin.runner import Settings, run_job
from ganomaly_plugin.store import Store, read_record

FLOOR = ("run", "--models", "mean_intensity", "--classes", "0,1,2", "--device", "cpu", "--executor", "inline")
PUBLISHED = Path(__file__).parent.parent / "results"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From the `n`th sync on, the disk is full."""

    def fill_up(n: int) -> None:
        left, sync = [n], os.fsync

        def fsync(handle: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(handle)

        monkeypatch.setattr(files.os, "fsync", fsync)

    return fill_up


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, bench, full_disk, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert bench(*FLOOR, "--limit", 1, "--out", out)[0] == 0
    kept = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    full_disk(2 + 2)  # the folder's check and the next job's scores go through, its record does not
    code, _, stderr = bench(*FLOOR, "--out", out)
    assert code == 1 and stderr.count("bench: error") == 1 and "Cannot store the result of mean_intensity" in stderr
    assert "No space left on device. Finished records are kept" in stderr
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert not list(out.rglob("*.tmp")) and not (out / "claims").exists()
    monkeypatch.undo()
    code, _, stderr = bench(*FLOOR, "--out", out)
    assert code == 0 and "1 done before" in stderr and len(Store(out).records()) == 3


def test_tables_of_a_read_only_folder_are_shown(tmp_path: Path, bench, full_disk) -> None:
    store = fill(tmp_path / "out", [outcome("a"), outcome("b")])
    full_disk(0)
    code, stdout, stderr = bench("tables", store.folder)
    assert code == 0 and "AUROC" in stdout and "Cannot write tables" in stderr and stderr.count("\n") == 1


def test_a_claim_that_cannot_be_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = outcome("a").record.job

    def dump(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Claims(tmp_path / "claims") as mine:
        monkeypatch.setattr(claims.json, "dump", dump)
        with pytest.raises(CannotStore, match="No space left"):
            mine.take(job)
        monkeypatch.undo()
        assert mine.take(job)


def test_what_json_cannot_hold_is_a_failed_job() -> None:
    record = run_job(Job("crashing_detectors:Describes", {}, "digits", {"image_size": 16}, *STRICT), Settings("cpu")).record
    assert record.status == "failed" and "describe() or history_" in str(record.error)


def test_what_no_reader_takes_is_not_stored(tmp_path: Path) -> None:
    record = outcome("a").record
    check_storable(record)
    with pytest.raises(InvalidInput, match=r"would not be readable: ValueError: metric 'aupro' is not a number in \[0, 1\]"):
        check_storable(replace(record, metrics={**record.metrics, "aupro": 1.0000001}))


STRICT = ("one-anomalous/strict-v1", "0", 0, None)


# Records and scores


def edited(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is to delete what a wrong permission or a network keeps from being read."""
    store = fill(tmp_path / "out", [outcome("a")])
    record, read = outcome("a").record, Path.read_bytes

    def refuse(ending: str) -> None:
        def reading(path: Path) -> bytes:
            if path.suffix == ending:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", reading)

    refuse(".npz")
    with pytest.raises(CorruptFile, match=r"The scores .*\.npz cannot be read \(Permission denied\)\. Mend its perm") as caught:
        store.scores(record.job)
    assert "Delete" not in str(caught.value)
    refuse(".json")
    with pytest.raises(
        CorruptFile, match=r"The record .*\.json cannot be read \(Permission denied\)\. Mend its perm"
    ) as caught:
        read_record(store.record_path(record.job))
    assert "Delete" not in str(caught.value)


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*page\.html'"):
        files.atomic_write(tmp_path / "page.html", b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["metrics"].update(auroc=0.5), "checksum"),
        (lambda c: c["seconds"].update(fit=0.1), "checksum"),
        (lambda c: c["job"].update(label="b"), "checksum"),
        (lambda c: c.pop("checksum"), "checksum"),
        (lambda c: (c.update(format=1), c["metrics"].update(auroc=0.5)), "format 1 has none"),
        (lambda c: c.update(format=3), "this version reads 1 and 2"),
    ],
)
def test_an_edited_record_is_refused(tmp_path: Path, change, reason: str) -> None:
    job = outcome("a").record.job
    store = fill(tmp_path / "out", [outcome("a")])
    path = store.record_path(job)
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=4).replace("\n", "\r\n"))
    assert store.records()[0].metrics == outcome("a").record.metrics  # indented anew it says the same
    edited(path, change)
    with pytest.raises(CorruptFile, match=reason):
        store.records()


def test_files_that_changed_places_are_refused(tmp_path: Path, bench) -> None:
    a, b = outcome("a"), outcome("b")
    store = fill(tmp_path / "out", [a, b])
    first, second = store.scores_path(a.record.job), store.scores_path(b.record.job)
    second.write_bytes(first.read_bytes())
    code, _, stderr = bench("tables", store.folder, "--metrics", "eer")
    assert code == 2 and "not those of their record" in stderr and stderr.count("\n") == 1
    assert bench("tables", store.folder)[0] == 0  # the record's own numbers are sound
    copy = store.record_path(a.record.job).with_name("copy.json")
    copy.write_bytes(store.record_path(a.record.job).read_bytes())
    assert "renamed or copied" in bench("tables", store.folder)[2]


def test_missing_scores_of_one_job_and_of_all(tmp_path: Path) -> None:
    a, b = outcome("a"), outcome("b")
    store = fill(tmp_path, [a, b])
    store.scores_path(a.record.job).unlink()
    with pytest.raises(CorruptFile, match=r"are missing\. Delete .*json and run again"):
        store.scores(a.record.job)
    store.scores_path(b.record.job).unlink()
    with pytest.raises(CorruptFile, match=r"None are kept there: for more than tables .* with another --out"):
        store.scores(a.record.job)


def test_records_of_format_1_are_held_to_their_scores() -> None:
    folder = PUBLISHED / "mnist_vae"
    path = sorted((folder / "records").glob("*.json"))[0]
    record, arrays = read_record(path), Store(folder).scores(read_record(path).job)
    assert json.loads(path.read_bytes())["format"] == 1
    for field, wrong in (
        ("metrics", {**record.metrics, "auroc": record.metrics["auroc"] + 1e-6}),
        ("counts", {**record.counts, "test_normal": 1}),
        ("history", [{"oracle_auroc": 0.7}]),
    ):
        with pytest.raises(ValueError, match=r"its scores|it counts|auroc_oracle"):
            check_against_scores(replace(record, **{field: wrong}), arrays)
    with pytest.raises(ValueError, match="its label says latent_dim=2"):
        label = record.job.label.replace("latent_dim=32", "latent_dim=2")
        check_against_scores(
            record.__class__(**{**vars(record), "job": Job(**{**record.job.to_dict(), "label": label})}), arrays
        )
    with pytest.raises(ValueError, match="not one for each"):
        check_against_scores(record, {**arrays, "is_anomaly": np.zeros(3, bool)})


def test_a_done_job_is_never_stored_again(tmp_path: Path) -> None:
    done = outcome("a")
    store = fill(tmp_path / "out", [done])
    before = store.record_path(done.record.job).read_bytes()
    later = Outcome(outcome("a").record, {**done.arrays, "score": np.zeros(60)})
    assert store.settle(later).metrics == done.record.metrics
    assert store.record_path(done.record.job).read_bytes() == before
    np.testing.assert_array_equal(store.scores(done.record.job)["score"], done.arrays["score"])


def test_two_machines_that_store_a_job_at_once_leave_one_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = outcome("a")
    theirs = Outcome(mine.record, {**mine.arrays, "score": mine.arrays["score"] + 1e-12})
    store, write, met = Store(tmp_path / "out", create=True), files.atomic_write, []

    def interrupted(path: Path, content: bytes) -> None:
        if path.parent.name == "records" and not met:
            met.append(path)
            store.put(theirs)
        write(path, content)

    monkeypatch.setattr("ganomaly_plugin.store.atomic_write", interrupted)
    store.put(mine)
    np.testing.assert_array_equal(store.scores(mine.record.job)["score"], mine.arrays["score"])


def test_several_make_the_folder_at_once(tmp_path: Path) -> None:
    """Each in a moment when the others have made a part of it."""
    for turn in range(20):
        together = threading.Barrier(6)

        def make(folder: Path = tmp_path / str(turn), together: threading.Barrier = together) -> Store:
            together.wait()
            return Store(folder, create=True)

        with ThreadPoolExecutor(6) as pool:
            made = [future.result() for future in [pool.submit(make) for _ in range(6)]]
        assert all(store.records() == [] for store in made)


def test_parts_of_files_are_swept_out_when_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "out", create=True)
    old, new = (store.records_dir / f".{name}.json.0123abcd.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (time.time() - 7200,) * 2)
    later = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: later)  # this machine's clock, by which no file's age is measured
    assert Store(tmp_path / "out", create=True).records() == [] and not old.exists() and new.exists()


# Claims

TAKER = """
import sys
from pathlib import Path
from ganomaly_plugin import claims
from ganomaly_plugin.core import Job
host, folder, ready = sys.argv[1:]
claims.this_host = lambda: host
claims.EXPIRY, claims.HEARTBEAT = 1.0, 0.2
job = Job("a", {}, "d", {}, "p", "0", 0, None)
with claims.Claims(Path(folder)) as mine:
    Path(ready).touch()
    while not (Path(folder).parent / "go").exists():
        pass
    print(sum(mine.take(job) for _ in range(50)), flush=True)
    sys.stdin.read()
"""


def takers(folder: Path, hosts: list[str]) -> tuple[list[int], list[subprocess.Popen[str]]]:
    """How often each of several processes, one for each host, got the claim when all tried at once; all still hold on."""
    started = []
    for k, host in enumerate(hosts):
        words = [sys.executable, "-c", TAKER, host, str(folder / "claims"), str(folder / f"ready-{k}")]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    while not all((folder / f"ready-{k}").exists() for k in range(len(hosts))):
        assert all(process.poll() is None for process in started)
        time.sleep(0.01)
    (folder / "go").touch()
    got = []
    for process in started:
        assert process.stdout is not None
        got.append(int(process.stdout.readline()))
    return got, started


JOB = Job("a", {}, "d", {}, "p", "0", 0, None)


def test_a_dead_runner_has_one_heir(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder.mkdir()
    (folder / f"{JOB.slug}.json").write_text(json.dumps({"host": claims.this_host(), "pid": dead.pid}))
    got, processes = takers(tmp_path, [claims.this_host()] * 4)
    assert sorted(got) == [0, 0, 0, 1]
    for process in processes:
        process.communicate()
    assert not folder.exists()


def test_another_machine_inherits_when_signs_of_life_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (got,), (holder,) = takers(tmp_path, ["another"])
    monkeypatch.setattr(claims, "EXPIRY", 1.0)
    with Claims(tmp_path / "claims") as mine:
        time.sleep(1.5)  # longer than a claim lasts without signs of life, which this one shows
        assert got == 1 and not mine.take(JOB)
        holder.kill()
        holder.communicate()
        deadline = time.monotonic() + 30
        while not mine.take(JOB):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (path,) = (tmp_path / "claims").glob("*.json")
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_who_is_alive() -> None:
    me = os.getpid()
    assert is_alive(me) and is_alive(me, started(me)) and not is_alive(me, 1) and not is_alive(2**40)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(gone.pid)  # ended, though nobody has taken notice
    gone.wait()


def test_a_claim_of_another_container_is_not_judged_by_its_process_number(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    with Claims(folder) as mine:
        (folder / f"{JOB.slug}.json").write_text(json.dumps({"host": claims.this_host(), "system": "other", "pid": 2**22 + 1}))
        assert not mine.take(JOB)


def test_a_claim_that_was_copied_with_its_folder_is_void(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as mine:
        assert mine.take(JOB)
        shutil.copytree(tmp_path / "claims", tmp_path / "copy")
        with Claims(tmp_path / "copy") as yours:
            assert yours.take(JOB)
        with Claims(tmp_path / "claims") as yours:
            assert not yours.take(JOB)
    assert not (tmp_path / "copy").exists() and not (tmp_path / "claims").exists()


@pytest.mark.parametrize(
    ("content", "age", "void"), [("claim", 60, False), ("claim", 180, True), ("", 5, False), ("", 60, True)]
)
def test_a_claim_of_another_machine_is_void_when_old(tmp_path: Path, content: str, age: float, void: bool) -> None:
    with Claims(tmp_path / "claims") as mine:
        path = tmp_path / "claims" / f"{JOB.slug}.json"
        path.write_text(json.dumps({"host": "another", "pid": 1}) if content else "")  # or written in part, by whoever
        os.utime(path, (time.time() - age,) * 2)
        assert mine.take(JOB) is void


def test_the_age_of_a_claim_is_by_the_clock_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Claims(tmp_path / "claims") as mine:
        (tmp_path / "claims" / f"{JOB.slug}.json").write_text(json.dumps({"host": "another", "pid": 1}))
        later = time.time() + 86400
        monkeypatch.setattr(time, "time", lambda: later)  # this machine's
        assert not mine.take(JOB)


def test_an_heir_that_was_too_slow_gives_the_claim_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Claims(tmp_path / "claims") as mine:
        path = tmp_path / "claims" / f"{JOB.slug}.json"
        path.write_text(json.dumps({"host": "another", "pid": 1}))
        os.utime(path, (time.time() - 180,) * 2)
        theirs, rename = json.dumps({"host": "a third", "pid": 2}), Path.rename

        def after_theirs(self: Path, target: Path) -> Path:  # it comes between our look and our move
            path.write_text(theirs)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", after_theirs)
        assert not mine.take(JOB)
        assert path.read_text() == theirs and [each.name for each in path.parent.iterdir()] == [path.name]


def test_claims_of_dead_runners_are_buried_at_the_end_and_parts_of_files_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    folder.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (folder / "of-this-machine.json").write_text(json.dumps({"host": claims.this_host(), "pid": dead.pid}))
    grave = folder / ".x.json.0123abcd.tmp"
    grave.write_text("{")
    os.utime(grave, (time.time() - 7200,) * 2)
    with Claims(folder):
        assert not grave.exists()
    assert not folder.exists()


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(claims.os, "kill", refuse)
    assert is_alive(os.getpid())


def test_reading_records_leaves_the_collector_as_it_was(tmp_path: Path) -> None:
    store = fill(tmp_path / "out", [outcome("a")])
    try:
        for enabled in (False, True):
            (gc.enable if enabled else gc.disable)()
            assert len(store.records()) == 1 and gc.isenabled() is enabled
    finally:
        gc.enable()


def test_a_release_leaves_the_heirs_claim_alone(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as mine:
        assert mine.take(JOB)
        (path,) = (tmp_path / "claims").glob("*.json")
        heir = json.dumps({"host": "another", "pid": 1, "token": "x"})
        path.write_text(heir)
        mine.release(JOB)
        assert path.read_text() == heir


def test_arrays_are_stored_under_their_own_names_alone(tmp_path: Path) -> None:
    made = outcome("a")
    with np.load(fill(tmp_path, [made]).scores_path(made.record.job)) as stored:  # as any version of NumPy writes it
        assert stored.files == list(made.arrays)
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        fill(tmp_path, [Outcome(made.record, {"score": np.array([object()])})])


def test_a_folder_written_with_an_older_numpy_is_merged(tmp_path: Path, bench) -> None:
    """There `np.savez(..., allow_pickle=False)` stored an array of that name."""
    made = outcome("a")
    stray = {"allow_pickle": np.array(False), **made.arrays}
    store = fill(tmp_path / "old", [Outcome(made.record, stray)])
    with np.load(store.scores_path(made.record.job)) as stored:
        assert "allow_pickle" in stored.files
    fill(tmp_path / "other", [outcome("b")])
    code, _, stderr = bench("merge", tmp_path / "old", tmp_path / "other", "--out", tmp_path / "new")
    assert code == 0, stderr
    merged = Store(tmp_path / "new").scores(made.record.job)
    assert merged.keys() == made.arrays.keys() and np.array_equal(merged["score"], made.arrays["score"])


def test_files_that_a_system_hides_beside_records_are_passed_over(tmp_path: Path, bench) -> None:
    """Such as `._NAME` of macOS, on disks of other systems."""
    store = fill(tmp_path, [outcome("a")])
    path = store.record_path(outcome("a").record.job)
    path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    assert len(store.records()) == 1 and bench("tables", tmp_path)[0] == 0
