"""What results, checkpoints and configs cannot make `bench` do: run code, write elsewhere, or speak in another's name."""

from __future__ import annotations

import csv
import io
import json
import pickle
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from test_measures import fill, outcome

from ganomaly_plugin import load_detector, load_results
from ganomaly_plugin.checkpoints import load_authors_checkpoint
from ganomaly_plugin.core import Job, Outcome
from ganomaly_plugin.errors import BenchError, CorruptFile, InvalidInput
from ganomaly_plugin.escape import printable
from ganomaly_plugin.executors.choose import Where
from ganomaly_plugin.hparams import checked_hparams
from ganomaly_plugin.integrity import sealed
from ganomaly_plugin.report.frame import runs_frame
from ganomaly_plugin.report.writers import WRITERS, tables_of, write_tables
from ganomaly_plugin.store import Store
from ganomaly_plugin.trust import on_command_line

RAN = Path("ran")


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (RAN,)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_bomb(path: Path) -> None:
    """An .npz whose every array is a pickle that runs code."""
    member = io.BytesIO()
    np.lib.format.write_array(member, np.array([Bomb()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("score", "is_anomaly", "test_index", "reference_score"):
            archive.writestr(f"{name}.npy", member.getvalue())


def test_bombs_go_off_where_pickles_are_read(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb()))
    assert RAN.exists()


@pytest.mark.parametrize("form", ["npz", "npy", "pickle"])
def test_no_pickle_is_read_from_a_results_folder(tmp_path: Path, bench, form: str) -> None:
    store = fill(tmp_path / "out", [outcome("a"), outcome("b")])
    job = outcome("a").record.job
    path = store.scores_path(job)
    if form == "npz":
        with_bomb(path)
    elif form == "npy":
        with path.open("wb") as file:
            np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps({"score": Bomb()}))
    record = json.loads(store.record_path(job).read_bytes())
    for digest in (record["files"]["scores"], None):  # one that its record knows, and one that looks quite right
        content = {**record, "files": {} if digest is None else {"scores": digest}}
        store.record_path(job).write_bytes(sealed({k: v for k, v in content.items() if k != "checksum"}))
        for words in (
            ["tables", "out", "--metrics", "f1"],
            ["stats", "out"],
            ["diff", "out", "out"],
            ["tables", "out", "--report"],
        ):
            code, _, stderr = bench(*words)
            assert code == 2 and path.name in stderr, stderr
        with pytest.raises(CorruptFile):
            _ = load_results("out").scores
    store.record_path(job).write_bytes(pickle.dumps(Bomb()))
    assert bench("tables", "out")[0] == 2 and not RAN.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickle_is_read_from_a_checkpoint(tmp_path: Path, bench) -> None:
    content = {"ganomaly_plugin": 1, "name": "pca", "hparams": {}, "image_shape": [1, 16, 16], "state": Bomb()}
    torch.save(content, "detector.pt")
    torch.save({"epoch": 1, "state_dict": {"encoder1.main.x": Bomb()}}, "netG.pth")
    Path("raw.pt").write_bytes(pickle.dumps(Bomb()))
    with_bomb(Path("recording.npz"))
    for path in ("detector.pt", "raw.pt"):
        with pytest.raises(BenchError, match="not a readable detector file"):
            load_detector(path)
    for path in ("netG.pth", "raw.pt"):
        with pytest.raises(BenchError, match="not a checkpoint"):
            load_authors_checkpoint(path)
    assert bench("verify", "recording.npz")[0] == 2 and not RAN.exists()


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module that can be imported and leaves a file behind when it is."""
    (tmp_path / "hostile_module.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\n"
        "def load(*, root, image_size: int = 16): ...\n"
        "class Thing:\n    def fit(self): ...\n    def score(self): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("hostile_module", None)


def test_a_record_imports_nothing(tmp_path: Path, bench, hostile) -> None:
    made = outcome("hostile_module:Thing", dataset="hostile_module:load", data={"image_size": 32, "x": "hostile_module:load"})
    store = fill(tmp_path / "out", [made, outcome("b", dataset="hostile_module:load", data={"image_size": 32})])
    for words in (
        ["tables", "out"],
        ["tables", "out", "--metrics", "eer"],
        ["tables", "out", "--report"],
        ["stats", "out"],
        ["diff", "out", "out"],
        ["merge", "out", "out2", "--out", "both"],
    ):
        if "out2" in words:
            fill(tmp_path / "out2", [made])
        assert bench(*words)[0] == 0, words
    assert "hostile_module:load" in load_results(store.folder)._repr_html_()
    torch.save(
        {"ganomaly_plugin": 1, "name": "hostile_module:Thing", "hparams": {}, "image_shape": [1, 2, 2], "state": {}}, "d.pt"
    )
    with pytest.raises(InvalidInput, match="not registered"):
        load_detector("d.pt")
    assert not RAN.exists()


@pytest.mark.parametrize(
    "text",
    [
        "models: ['hostile_module:Thing']",
        "models: [{name: 'hostile_module:Thing'}]",
        "models: [{class_path: hostile_module.Thing}]",
        "models: hostile_module:Thing",
        "models: [pca]\ndatasets: ['hostile_module:load']",
        "models: [pca]\ndatasets: [{class_path: hostile_module.load}]",
        "models: ['hostile_module:Thing']\ntrust: [hostile_module]",
        "models: [{name: pca, options: {n_components: {class_path: hostile_module.Thing}}}]",
    ],
)
def test_a_config_imports_nothing_by_itself(bench, hostile, text: str) -> None:
    Path("sweep.yaml").write_text(text)
    code, _, stderr = bench("run", "--config", "sweep.yaml", "--dry-run")
    assert code == 2 and stderr.count("\n") == 1 and not RAN.exists(), stderr
    assert any(word in stderr for word in ("--trust", "class path")), stderr


def test_the_command_line_is_the_users_own_word(bench, hostile) -> None:
    Path("sweep.yaml").write_text("models: ['hostile_module:Thing', pca]")
    run = ("run", "--config", "sweep.yaml", "--datasets", "digits", "--classes", "0", "--dry-run")
    assert bench(*run)[0] == 2 and not RAN.exists()
    assert bench(*run, "--trust", "hostile")[0] == 2 and not RAN.exists()  # a module, not the start of a name
    assert bench(*run, "--models", "my.hostile_module:Thing", "--limit", 1)[0] == 2 and not RAN.exists()  # nor its end
    assert bench(*run, "--trust", "hostile_module")[0] == 0 and RAN.exists()
    RAN.unlink()
    sys.modules.pop("hostile_module")
    assert bench("run", "--models", "hostile_module:Thing", "--classes", "0", "--dry-run")[0] == 0 and RAN.exists()


def test_hyperparameters_import_nothing(hostile) -> None:
    class Detector:
        def __init__(self, net: torch.nn.Module | str = "small", size: int = 1) -> None: ...

    assert checked_hparams("it", Detector, {"net": "hostile_module.Thing"}) == {"net": "hostile_module.Thing"}
    for hparams in ({"net": {"class_path": "hostile_module.Thing"}}, {"size": {"class_path": "hostile_module.Thing"}}):
        with pytest.raises(InvalidInput, match="class path"):
            checked_hparams("it", Detector, hparams)
    assert not RAN.exists()


@pytest.mark.parametrize("out", ["../escaped", "a/../../escaped", "/tmp/escaped-from-a-config", "~/escaped", "..", "."])
def test_a_config_writes_nowhere_else(tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = tmp_path / "configs" / "sweep.yaml"
    config.write_text(f"models: [mean_intensity]\nclasses: ['0']\nout: {out}\n")
    code, _, stderr = bench("run", "--config", config)
    assert code == 2 and "Give --out on the command line" in stderr and stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["configs", "here", "sweep.yaml"]
    assert bench("run", "--config", config, "--out", "../mine", "--dry-run")[0] == 0
    assert on_command_line("--slurm-folder", ["run", "--slurm_folder=x"]) and not on_command_line("--out", ["--outer", "out"])
    for folder in ("/elsewhere", "~/elsewhere"):
        config.write_text(f"models: [pca]\ndatasets: [digits]\nslurm_folder: {folder}\n")
        code, _, stderr = bench("run", "--config", config, "--dry-run")
        assert code == 2 and f"The config's slurm_folder is '{folder}'" in stderr
    assert "The config's" not in bench("run", "--config", config, "--slurm_folder", "/elsewhere", "--dry-run")[2]


@pytest.mark.parametrize(
    ("name", "value"), [("address", "127.0.0.1:1"), ("sbatch", "account=x"), ("sbatch", "'comment=\"x\\ntouch ran #\"'")]
)
def test_what_sbatch_is_told_and_which_host_is_dialled_is_for_the_command_line(bench, name: str, value: str) -> None:
    executor = {"address": "ray", "sbatch": "slurm"}[name]
    Path("sweep.yaml").write_text(f"models: [mean_intensity]\nexecutor: {executor}\n{name}: {value}\n")
    code, _, stderr = bench("run", "--config", "sweep.yaml", "--dry-run")
    assert code == 2 and f"Give --{name} on the command line" in stderr and stderr.count("\n") == 1, stderr
    if "touch" not in value:
        assert bench("run", "--config", "sweep.yaml", f"--{name}", value, "--executor", executor, "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("partition", "x\nid"), ("memory", "1G\nid"), ("slurm_folder", "s\nid"), ("sbatch", "a=x\nid"), ("sbatch", 'a="x\\nid"')],
)
def test_no_option_of_slurm_writes_a_line_of_its_script(name: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=f"--{name.replace('_', '-')} .*control character.* got .*id") as error:
        Where(executor="slurm", **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", "", "a\0b", "é" * 300, "CON", "-rf", "a\nb"])
def test_names_stay_in_the_results_folder(tmp_path: Path, name: str) -> None:
    made = outcome("a")
    job = replace(made.record.job, detector=name, dataset=name, category=name, label=name)
    store = fill(tmp_path / "out", [Outcome(replace(made.record, job=job), made.arrays)])
    assert store.records()[0].job == job
    for path in (store.record_path(job), store.scores_path(job), store.images_path(job)):
        assert path.resolve().parent.parent == store.folder.resolve() and len(path.name) < 200
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


EVIL = '=cmd|" /C calc"!A0 <script>alert(1)</script> \\input{/etc/passwd} $x$ & % # _ | [red]\x1b[31mred\x1b[0m‮\a'


def test_names_are_data_in_every_format(tmp_path: Path, bench) -> None:
    made = outcome("a", category="=1+1")
    named = replace(made.record.job, label=EVIL, dataset="@SUM(1)", category="=1+1", data={"image_size": 8, "x": EVIL})
    other = replace(outcome("b").record.job, label="-2+3", dataset="@SUM(1)", category="＝1", data=named.data)
    store = fill(tmp_path / "out", [Outcome(replace(made.record, job=job), made.arrays) for job in (named, other)])
    failed = replace(made.record, job=replace(named, seed=1), status="failed", error=f"{EVIL}\nerror", metrics={})
    store.put(Outcome(failed))
    write_tables(store)
    for name in ("runs.csv", "auc.csv"):
        for row in csv.reader(io.StringIO((store.folder / name).read_text())):
            for cell in row:
                assert not cell.startswith(("=", "@", "+", "\t", "\r", "＝")), cell
                assert not cell.startswith("-") or float(cell) < 0, cell
    tables = tables_of(runs_frame(store.records()))
    html, latex = load_results(store.folder)._repr_html_(), WRITERS["latex"](tables)
    assert "<script>" not in html and "<script>" not in latex and "\\input{" not in latex and "$x$" not in latex
    for name in ("auc.md", "cost.md"):
        assert "<script>" not in (store.folder / name).read_text()
    for words in (
        ["tables", "out"],
        ["tables", "out", "--report"],
        ["stats", "out"],
        ["diff", "out", "out"],
        ["tables", "out", "--format", "md"],
        ["tables", "out", "--format", "csv"],
        ["tables", "out", "--format", "json"],
        ["tables", "out", "--format", "latex"],
    ):
        code, stdout, stderr = bench(*words)
        assert code == 0 and not set(stdout + stderr) & set("\x1b\a‮"), words
    assert bench("report", "out", "--out", "page.html")[0] == 0
    page = Path("page.html").read_text()
    code, stdout, stderr = bench("plot", "bars", "out", "--out", "bars.svg")
    assert code == 0 and not set(stdout + stderr) & set("\x1b\a‮") and ElementTree.parse("bars.svg")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and not set(page) & set("\x1b\a")
    for each in json.loads(WRITERS["json"](tables)):
        assert each["dataset"].startswith("@SUM(1)")


def test_terminal_output_of_a_sweep_is_printable(tmp_path: Path, bench) -> None:
    for words in (
        ["run", "--models", "\x1b[31mganomaly"],
        ["run", "--models", "pca", "--datasets", "\x1b]0;title\a"],
        ["ls", "\x1b[2J"],
    ):
        code, stdout, stderr = bench(*words)
        assert code == 2 and "\x1b" not in stdout + stderr and "\a" not in stdout + stderr
    assert printable("a\x1b[31m\u202e\x9bb\n") == "a?[31m??b?"


def test_store_is_told_by_its_marker_alone(tmp_path: Path) -> None:
    """A link inside a results folder is replaced by a file of ours, never written through."""
    store = Store(tmp_path / "out", create=True)
    target = tmp_path / "precious"
    target.write_text("mine")
    made = outcome("a")
    store.record_path(made.record.job).symlink_to(target)
    store.put(made)
    assert target.read_text() == "mine" and isinstance(store.get(made.record.job).job, Job)  # type: ignore[union-attr]
