"""`bench run` and `bench tables` end to end on the digits: resume, failures as rows, bad input before any work."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_measures import fill, outcome

from ganomaly_plugin import provenance
from ganomaly_plugin.cli import COMMANDS, main
from ganomaly_plugin.config import Experiment, expand
from ganomaly_plugin.core import Job, Outcome, RunRecord
from ganomaly_plugin.datasets.base import data_root
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.escape import latex_escape
from ganomaly_plugin.report.costs import cost_frame, cost_markdown
from ganomaly_plugin.report.tables import make_tables
from ganomaly_plugin.report.writers import LATEX_ROWS, runs_frame, to_latex, to_markdown, to_text, write_tables
from ganomaly_plugin.runner import check_unchanged, make_plan
from ganomaly_plugin.selection import Selection, parse_selection
from ganomaly_plugin.store import Store, read_record

TINY = ["--hparams", "features=2,latent_dim=4", "--epochs", 1]
FLOOR = ["run", "--models", "mean_intensity", "--classes", "0,1"]


def records(out: Path) -> list[Path]:
    return sorted((out / "records").glob("*.json"))


def test_a_sweep_and_its_second_start(bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["run", "--models", "ganomaly,ae,mean_intensity", "--classes", "0,3", "--seeds", "0-1", *TINY, "--out", out]
    code, stdout, stderr = bench(*words)
    assert code == 0, stderr
    assert "digits 16×16, one-anomalous/strict-v1: AUROC, last epoch; mean ± std over n = 2 seeds" in stdout
    assert "[12/12]" in stderr and "AUROC" in stderr
    assert len(records(out)) == 12 and len(list((out / "scores").glob("*.npz"))) == 12
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, again, stderr = bench(*words)
    assert code == 0 and again == stdout and "12 done before, 0 failed before, 0 to run" in stderr
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    runs = pd.read_csv(out / "runs.csv")
    assert len(runs) == 12 and set(runs["status"]) == {"done"} and runs["split_digest"].nunique() == 4
    assert {"auroc", "auprc", "hparams.features", "counts.train", "seconds.fit", "environment.versions.torch"} <= set(runs)
    auc = pd.read_csv(out / "auc.csv")
    row = auc[(auc["metric"] == "auroc") & auc["detector"].str.startswith("ganomaly")].iloc[0]
    mine = runs[runs["name"] == "ganomaly"]
    assert row["0"] == pytest.approx(mine[mine["class"] == 0]["auroc"].mean())
    assert row["mean_std"] == pytest.approx(mine.groupby("seed")["auroc"].mean().std())
    record = read_record(records(out)[0])
    arrays = Store(out).scores(record.job)
    assert arrays["score"].dtype == np.float64 and arrays["score"].shape == arrays["is_anomaly"].shape
    assert record.counts["test_anomalous"] == arrays["is_anomaly"].sum() and record.reference == "held-out"


def test_a_job_does_not_depend_on_its_neighbours(bench, tmp_path: Path) -> None:
    alone, among = tmp_path / "alone", tmp_path / "among"
    assert bench("run", "--models", "ganomaly", "--classes", "3", "--seeds", "1", *TINY, "--out", alone)[0] == 0
    assert bench("run", "--models", "ae,ganomaly", "--classes", "3,0", "--seeds", "1,0", *TINY, "--out", among)[0] == 0
    (path,) = records(alone)
    here, there = read_record(path), read_record(among / "records" / path.name)
    assert here.metrics == there.metrics and here.split_digest == there.split_digest and here.history == there.history


def test_paper_protocol_keeps_the_oracle_apart(bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--protocols", "one-anomalous/paper-v1", "--classes", "0", "--hparams", "features=2,latent_dim=4"]
    code, stdout, _ = bench("run", "--models", "ganomaly,mean_intensity", *words, "--epochs", 3, "--out", out)
    assert code == 0 and stdout.count("mean_intensity") == 2  # it has no epochs, so no oracle
    record = read_record(records(out)[0])
    assert record.job.hparams["batchnorm"] == "batch" and record.reference == "train"
    curve = [epoch["oracle_auroc"] for epoch in record.history]
    assert len(curve) == 3 and curve[-1] == record.metrics["auroc"] and max(curve) == record.metrics["auroc_oracle"]
    assert curve.index(max(curve)) + 1 == record.metrics["oracle_epoch"]
    titles = [line for line in stdout.splitlines() if line.startswith("digits")]
    assert len(titles) == 3 and [("ORACLE" in title) for title in titles] == [False, False, True]
    assert record.counts == {"train": 1295, "train_anomalous": 0, "reference": 1295, "test_normal": 324, "test_anomalous": 178}


def test_failures_are_rows_and_the_sweep_goes_on(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text(
        "import numpy as np\n"
        "class Broken:\n"
        "    def __init__(self, how: str = 'raise'): self.how = how\n"
        "    def fit(self, images, **kwargs):\n"
        "        if self.how == 'raise': raise RuntimeError('no luck\\nat all')\n"
        "        return self\n"
        "    def score(self, images):\n"
        "        return {'nan': np.full(len(images), np.nan), 'shape': np.zeros((len(images), 2))}[self.how]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    broken = ",".join(f"broken_package:Broken[how={how}]" for how in ("raise", "nan", "shape"))
    words = ["run", "--models", f"{broken},mean_intensity", "--classes", "0", "--out", out]
    code, stdout, stderr = bench(*words)
    assert code == 1
    assert "RuntimeError: no luck at all" in stderr
    assert "returned 360 scores that are not finite" in stderr or "scores that are not finite" in stderr
    assert "returned scores of shape (" in stderr and "wanted (" in stderr
    assert "–" in stdout and "mean_intensity" in stdout
    runs = pd.read_csv(out / "runs.csv")
    assert sorted(runs["status"]) == ["done", "failed", "failed", "failed"]
    failed = [read_record(path) for path in records(out) if read_record(path).status == "failed"]
    assert any("broken_package.py" in (record.traceback or "") for record in failed)
    assert sum(record.traceback is None for record in failed) == 2  # of scores that are refused, one line says it all
    code, _, stderr = bench(*words)
    assert code == 1 and "1 done before, 3 failed before, 0 to run" in stderr and "--retry-failed" in stderr
    (tmp_path / "broken_package.py").write_text(
        (tmp_path / "broken_package.py").read_text().replace("np.full(len(images), np.nan)", "np.arange(len(images))")
    )
    sys.modules.pop("broken_package")
    code, _, stderr = bench(*words, "--retry-failed")
    assert code == 1 and "3 to run" in stderr
    assert sorted(pd.read_csv(out / "runs.csv")["status"]) == ["done", "done", "failed", "failed"]


def test_what_is_nearer_to_a_model_or_a_data_set_comes_first() -> None:
    experiment = Experiment(
        [Selection("ae", {"latent_dim": 5}), Selection("ganomaly")],
        [Selection("digits", {"image_size": 16}), Selection("digits")],
        ["one-anomalous/strict-v1"],
        ["0"],
        image_size=32,
        hparams={"latent_dim": 4, "features": 3},
        preset={"features": 2, "batch_size": 8, "no_such": 1},
    )
    found = [
        (job.data["image_size"], *(job.hparams[k] for k in ("latent_dim", "features", "batch_size")))
        for job in expand(experiment)
    ]
    assert found == [(16, 5, 3, 8), (16, 4, 3, 8), (32, 5, 3, 8), (32, 4, 3, 8)]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("ae[epochs=1,steps=3]", "ae has a budget of epochs=1 and of steps=3. Give one of them."),
        ("ae[steps=true]", "steps must be a whole number of at least 1, got True."),
        ("ae[epochs=true]", "epochs must be a whole number of at least 1, got True."),
        ("pca[n_components=256]", "pca: n_components must be smaller than the number of pixels, 256"),
    ],
)
def test_a_model_that_cannot_be_is_named(bench, tmp_path: Path, model: str, said: str) -> None:
    words = ["run", "--models", model, "--datasets", "digits", "--image_size", 16, "--classes", "0", "--out", tmp_path / "out"]
    code, _, stderr = bench(*words)
    assert code == 2 and said in stderr and not (tmp_path / "out").exists()


def test_jobs_of_another_share_are_no_change_of_the_data(bench, tmp_path: Path) -> None:
    for share in ((), ("--train-fraction", 0.5)):
        code, _, stderr = bench(*FLOOR, *share, "--out", tmp_path / "out")
        assert code == 0, stderr
    made = fake_outcome("a", "x", 0, 0.5)
    store = fill(tmp_path / "old", [replace(made, record=replace(made.record, split_digest=None))])  # as older records are
    job = replace(made.record.job, detector="b")
    check_unchanged(make_plan([job], store), store, {job.key: "now"})
    store.put(fake_outcome("c", "x", 0, 0.5))
    with pytest.raises(InvalidInput, match="1 of 2 finished jobs are of other images"):
        check_unchanged(make_plan([job], store), store, {job.key: "now"})


def test_bad_images_fail_or_are_skipped(bench, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "parts"
    for kind, level in (("good", 100), ("bad", 200)):
        (folder / kind).mkdir(parents=True)
        for k in range(10):
            Image.fromarray(np.full((20, 20), level + k, np.uint8)).save(folder / kind / f"{k}.png")
    (folder / "good" / "text.png").write_text("no image")
    words = ["run", "--models", "mean_intensity", "--datasets", f"folder:{folder}", "--data-root", tmp_path]
    code, _, stderr = bench(*words, "--out", tmp_path / "a")
    assert code == 2 and "text.png" in stderr and not (tmp_path / "a").exists()
    code, _, stderr = bench(*words, "--on-bad-image", "skip", "--out", tmp_path / "b")
    assert code == 0, stderr
    assert read_record(records(tmp_path / "b")[0]).notes["source"]["skipped"] == 1


def test_dry_run_does_nothing(bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, _ = bench(*FLOOR, "--out", out, "--dry-run")
    assert code == 0 and not out.exists() and "2 jobs: 0 done, 0 failed, 2 missing" in stdout
    assert bench(*FLOOR, "--out", out, "--limit", 1)[0] == 0
    code, stdout, _ = bench(*FLOOR, "--out", out, "--dry-run")
    assert "2 jobs: 1 done, 0 failed, 1 missing" in stdout and len(records(out)) == 1


def test_config_file_with_the_command_line_on_top(bench, tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        "models: [mean_intensity, {name: ae, options: {features: 2, lr: 1e-3}}]\n"
        "datasets: [digits]\nprotocols: [one-normal/strict-v1]\nclasses: [3, 4]\nseeds: 0-1\nepochs: 2\n"
        f"out: {tmp_path / 'out'}\n"
    )
    code, stdout, _ = bench("run", "--config", config, "--classes", "4", "--dry-run")
    assert code == 0 and "4 jobs" in stdout and "class 3" not in stdout
    assert "ae[epochs=2,features=2,lr=0.001]" in stdout and "one-normal/strict-v1" in stdout
    code, stdout, _ = bench("run", "--config", config, "--seeds", "5", "--epochs", "15", "--dry-run")
    assert "seed 5" in stdout and "seed 0" not in stdout and "ae[features=2,lr=0.001]" in stdout
    again = bench("run", "--seeds=5", "--epochs", "15", f"--config={config}", "--dry-run")  # wherever the config stands
    assert again[:2] == (code, stdout)
    more = tmp_path / "more.yaml"
    more.write_text("seeds: 7\n")
    code, stdout, _ = bench("run", "--classes", "4", "--config", config, "--epochs", "15", "--config", more, "--dry-run")
    assert code == 0 and "2 jobs" in stdout and "seed 7" in stdout and "class 3" not in stdout  # of configs the later one
    assert bench("run", "--dry-run", "--config")[0] == 2


def test_two_spellings_of_one_job_share_a_key(bench, tmp_path: Path) -> None:
    keys = set()
    for models in ("ganomaly", "ganomaly[features=64]", "ganomaly[epochs=15,lr=2e-4]"):
        _, stdout, _ = bench(
            "run", "--models", models, "--datasets", "digits", "--classes", "0", "--dry-run", "--out", tmp_path / "o"
        )
        keys.add(stdout.splitlines()[0].rsplit(" ", 1)[1])
    assert len(keys) == 1
    _, stdout, _ = bench("run", "--models", "*e", "--classes", "0", "--dry-run", "--out", tmp_path / "o")
    assert " ae[" in stdout


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["run"], "No models given"),
        (["run", "--models", "ganomoly"], "Did you mean 'ganomaly'"),
        (["run", "--models", "PCA"], "Did you mean 'pca'"),
        (["run", "--models", "zzz*"], "Unknown detector pattern"),
        (["run", "--models", "ganomaly[feature=3]"], "Did you mean 'features'"),
        (["run", "--models", "ganomaly[features=x]"], "features must be"),
        (["run", "--models", "ganomaly[name=x]"], "Unknown hyperparameter of ganomaly 'name'"),
        (["run", "--models", "ganomaly", "--datasets", "digits[name=x]"], "Unknown option of data set digits 'name'"),
        (["run", "--models", "ganomaly", "--datasets", "digits[root=/x]"], "Unknown option of data set digits 'root'"),
        (["run", "--models", "ganomaly[features]"], "Write key=value"),
        (["run", "--models", "ganomaly[features=2,features=4]"], "features is given twice"),
        (["run", "--models", "ganomaly[lr=.inf]"], "ganomaly: lr is inf, which no record can hold"),
        (["run", "--models", "ganomaly[precision=fp8]"], "precision must be one of 'float32', 'tf32', 'bf16', got 'fp8'"),
        (["run", "--models", "ganomaly", "--classes", ""], "classes is empty"),
        (["run", "--models", "ganomaly", "--datasets", "folder:"], "as in folder:PATH"),
        (["run", "--models", "ganomaly", "--datasets", "digit"], "Did you mean 'digits'"),
        (["run", "--models", "ganomaly", "--datasets", "./photos"], "Or give a folder of images, folder:PATH, or a class path"),
        (["run", "--models", "ganomaly", "--datasets", "digits[size=3]"], "Unknown option of data set digits"),
        (["run", "--models", "ganomaly", "--datasets", "digits[image_size=x]"], "image_size"),
        (["run", "--models", "ganomaly", "--protocols", "one-anomalous/strict-v2"], "Did you mean 'one-anomalous/strict-v1'"),
        (["run", "--models", "ganomaly", "--classes", "0,cat"], "Unknown class 'cat'"),
        (["run", "--models", "ganomaly", "--classes", "0-4"], "Write each class, as in 0,1,2: ranges are for seeds."),
        (["run", "--models", "ganomaly", "--image-size", 33], "multiple of 16"),
        (["run", "--models", "ganomaly", "--image-size", 1_000_000], "at most 2048"),
        (["run", "--models", "ganomaly", "--on-bad-image", "keep"], "on_bad_image must be fail or skip"),
        (["run", "--models", "os:path"], "is not a detector"),
        (["run", "--models", "json:dumps"], "is not a detector"),
        (["run", "--models", "collections:OrderedDict"], "is not a detector"),
        (["tables"], "bench tables wants RESULTS: results folder. See bench tables --help."),
        (["data"], "bench data wants ACTION: ls, check or get. See bench data --help."),
        (["plot", "roc", "x"], "bench plot wants --out: file to write: .pdf, .svg or .png. See bench plot --help."),
        (["run", "--models", "ganomaly", "--image-size", 0], "image_size must be at least 1"),
        (["run", "--models", "ganomaly", "--seeds", "2-0"], "runs backwards"),
        (["run", "--models", "ganomaly", "--seeds", "one"], "Cannot read the seeds"),
        (["run", "--models", "ganomaly", "--seeds", "4294967296"], "seed must be a whole number from 0 to 4294967295"),
        (["run", "--models", "ganomaly", "--epochs", 0], "epochs must be at least 1"),
        (["run", "--models", "ganomaly", "--epochs", "many"], "--epochs must be a whole number, got many"),
        (["run", "--models", "ganomaly", "--limit", 0], "limit must be at least 1"),
        (["run", "--models", "ganomaly", "--hparams", "depth=3"], "No selected model has a hyperparameter 'depth'"),
        (["run", "--models", "ae", "--hparams", "fetures=3"], "a hyperparameter 'fetures'. Did you mean 'features'"),
        (["run", "--models", "pca", "--precision", "bf16"], "hyperparameter 'precision'. bench ls NAME shows"),
        (["run", "--models", "pca", "--executor", "SLURM"], "Did you mean 'slurm'"),
        (["run", "--models", "ganomaly", "--device", "cuda:99"], "cuda"),
        (["run", "--modles", "ganomaly"], "Did you mean 'models'"),
        (["run", "--model", "ganomaly"], "Did you mean 'models'"),
        (["run", "--models", "ganomaly", "ae,", "vae"], "cannot place 'ae,'. Put commas, and no spaces,"),
        (["run", "--models", "ganomaly", "ae,", "vae"], "the values of an option: --models ganomaly,ae,vae."),
        (["run", "--seeds", 1, "--classes", 0, 1], "the values of an option: --classes 0,1."),
        (["run", "--data_root", "my", "data"], "one that has spaces: --data_root 'my data'."),
        (["run", "--models", "ae[features=4 lr=1]"], "features must be int, got '4 lr=1'. Put a comma between two options."),
        (["run", "ganomaly"], "cannot place 'ganomaly'. Write options as --NAME VALUE"),
        (["run", "sweep.yaml", "--dry-run"], "A config stands behind --config: bench run --config sweep.yaml."),
        (["run", "--dry-run", "ganomaly"], "cannot place 'ganomaly'. Write options as --NAME VALUE"),
        (["run", "--models", "ganomaly ae"], "Put commas between names, and no spaces: ganomaly,ae."),
        (["run", "--models", "pca", "--datasets", "folder:a [b]"], 'stands in double quotes: "folder:a [b]".'),
        (["run", "--models", "nowhere:Boom"], "Put the folder that it is in on PYTHONPATH"),
        (["run", "--config", "no.yaml"], "no.yaml. Give the path of a YAML file"),
        (["run", "--config", "models: ae\nclasses: 0" + 300 * " "], "No config file at models: ae classes: 0"),
        (["tables", "no_folder"], "not a results folder"),
        (["run", "--models", "ae", "--select", "last"], "go into brackets, as ganomaly[features=16]; bench ls ganomaly shows"),
        (["ls", "nothing*"], "Nothing is called"),
        (["ls", "folder"], "Did you mean 'folder:'"),
        (["verify", "none.npz"], "No recording at none.npz"),
        (["speed", "--repeats", 2], "repeats must be at least 5"),
        (["rum"], "invalid choice"),
        ([], "bench --help"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(bench, tmp_path: Path, words: list, wanted: str) -> None:
    out = ["--out", tmp_path / "out"] if words[:1] == ["run"] else []
    code, stdout, stderr = bench(*words, *out)
    assert code == 2 and stdout == ""
    assert stderr.startswith("bench: error: ") and stderr.count("\n") == 1
    assert wanted in stderr and not (tmp_path / "out").exists()


def test_unknown_config_key(bench, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    for text, wanted in (
        ("model: [ae]\n", "Did you mean 'models'"),
        ("models: [ae\n", "bench run --help"),
        ("models: [{nam: ae}]\n", "A model is name"),
        ("models: [{name: ae, options: {1: 2}}]\n", "The model ae has an option 1, which is no text"),
        ("models: [ae]\ndatasets: [{name: digits, options: {true: 2}}]\n", "The data set digits has an option True"),
        ("models: [ae]\nhparams: {1: 2, depth: 3}\n", "No selected model has a hyperparameter 1"),
        ("models: &a [ae]\nclasses: *a\n", "c.yaml has the alias *a. Write out what it stands for"),
        ("models: [&a [*a]]\n", "c.yaml has the alias *a"),
        ("".join(f"{n}: &{n} [{','.join([f'*{n - 1}'] * 9 if n else ['ae'])}]\n" for n in range(40)), "has the alias *0"),
        ("models: [ae]\ntime: 1:30:00\n", "--time must be text, got 5400. Put it in quotes: YAML reads 1:30:00 as a number"),
        ("models: [ae]\nhparams: 3\n", "hparams must be name: value pairs"),
        ("- models\n", "sets no option"),
        ("# nothing yet\n", "sets no option"),
        ("models:\n", "sets no option"),
        ("models:\tpca\n", "is no YAML: ScannerError: while scanning for the next token found character '\\t'"),
        ("run:\n  models: ae\n", "has its options below run:. Put them at the top level"),
        ("model:\n  class_path: anomalib.models.Ganomaly\ndata: {}\n", "is for anomalib train. For bench run write models:"),
        ("models: pca\ndry_run: 'false'\n", "--dry_run must be true or false, got 'false'"),
        ("models: pca\nfail_fast: 3\n", "--fail_fast must be true or false, got 3"),
        ("models: pca\nclasses: ['0,1']\n", "Unknown class '0,1'"),
        ("models: [ae]\nclasses: []\n", "classes is empty"),
        ("models: [ae]\ntrain-fraction: 0.5\n", "Write train_fraction"),
        ("models: [ae]\nseeds: 1\nseeds: 2\n", "sets 'seeds' twice"),
        ("models: [{name: ae, options: {features: 2, features: 4}}]\n", "sets 'features' twice"),
        ("models: [ae]\nseeds: 1:30\n", "has 1:30, which is another number to YAML"),
        ("models: [ae]\nclasses: [1, 010]\n", "has 010, which is another number to YAML"),
        ("models: [ae]\nconfig: other.yaml\n", "c.yaml names another one. Give both on the command line"),
    ):
        config.write_text(text)
        code, _, stderr = bench("run", "--config", config, "--out", tmp_path / "out")
        assert code == 2 and wanted in stderr and stderr.count("\n") == 1, stderr
    config.write_bytes("models: é".encode("latin-1"))
    code, _, stderr = bench("run", "--config", config)
    assert code == 2 and "c.yaml is no text in UTF-8" in stderr


def test_no_sweep_starts_in_a_worker_that_imports_the_script_of_its_runner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    assert main(["run", "--models", "mean_intensity", "--dry-run"]) == 2
    assert 'Put the call below if __name__ == "__main__":' in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_written(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and not any(each in text for each in ("<function", ": null", "SUPPRESS", "(required"))
    assert text.count("(default: ") == len(re.findall(r"\(default: [^()]+\)", text))
    if command == "run":
        assert "anomalies, [0, 0.5]" in text and "(default: digits," in text
    if command == "speed":
        assert "(default: training,scoring)" in text and "(default: 1000)" in text


def test_nowhere_to_print_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as it is in a process that was started without one
    monkeypatch.setattr(sys, "stdout", None)
    assert main([*FLOOR, "--out", str(tmp_path / "out"), "--executor", "inline"]) == 0
    assert len(records(tmp_path / "out")) == 2
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ganomaly", ["detectors:\n  ganomaly  GANomaly", "epochs=15\n", "betas=[0.5, 0.999]\n      Adam's", "select=last\n"]),
        ("f_anogan", ["features=64\n      Channels"]),
        ("ganomaly_plus", ["epochs=None\n", "steps=200\n", "lr=0.0002\n      As GANomaly's."]),
        ("anomalib:Padim", ["options, as in anomalib:Padim[image_size=…]:", "backbone=resnet18\n"]),
        ("folder:", ["options, as in folder:NAME[image_size=…]:", "fit=crop\n", "rest black."]),
        ("odd_options:Required", ["size, which has no default"]),
    ],
)
def test_ls_shows_the_options_of_one_name(bench, name: str, words: list[str]) -> None:
    code, out, _ = bench("ls", name)
    assert code == 0 and all(word in out for word in words) and out.count("options, as in") == 1, out
    for each in re.findall(r"^  (\w+=\S.*)$", out, re.MULTILINE):  # as they can be given
        assert ":" in name or parse_selection(f"{name}[{each}]", "model").options


def test_an_encoding_without_our_signs_is_no_failure() -> None:
    words = [sys.executable, "-m", "ganomaly_plugin", "ls", "mnist"]
    said = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60)
    assert said.returncode == 0 and rb"28\xd728" in said.stdout and said.stderr == b""


def test_what_is_for_files_is_utf8_in_every_encoding(tmp_path: Path) -> None:
    store = fill(tmp_path / "out", [outcome("a")])
    words = [sys.executable, "-m", "ganomaly_plugin", "tables", str(store.folder), "--format", "json"]
    said = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60)
    assert json.loads(said.stdout.decode())[0]["dataset"] == "cifar10 32×32"


def test_output_folders_that_cannot_be_used(bench, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    code, _, stderr = bench(*FLOOR, "--out", foreign)
    assert code == 2 and "not a results folder" in stderr and [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below", "/proc/results"):
        code, _, stderr = bench(*FLOOR, "--out", out)
        assert code == 2 and "Cannot write to the output folder" in stderr and stderr.count("\n") == 1
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "bench.json").write_text('{"ganomaly_plugin_results": 99}')
    assert "format 99" in bench(*FLOOR, "--out", newer)[2]
    (newer / "bench.json").write_text("{")
    assert "damaged" in bench(*FLOOR, "--out", newer)[2]


def test_damaged_records_stop_the_run_and_nothing_is_lost(bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bench(*FLOOR, "--out", out)[0] == 0
    first, second = records(out)
    whole, kept = first.read_bytes(), second.read_bytes()
    edited = json.loads(whole)
    edited["job"]["seed"] = 7
    wrong = json.loads(whole)
    wrong["metrics"]["auroc"] = 9.5
    lacking = {k: v for k, v in json.loads(whole).items() if k != "job"}
    for damage in (whole[:200], b"", b"[]", b"null", *(json.dumps(c).encode() for c in (edited, wrong, lacking))):
        first.write_bytes(damage)
        for words in ([*FLOOR, "--out", out], ["tables", out]):
            code, _, stderr = bench(*words)
            assert code == 2 and first.name in stderr and "Delete it" in stderr and stderr.count("\n") == 1
    assert first.read_bytes() == damage and second.read_bytes() == kept
    first.unlink()
    assert bench(*FLOOR, "--out", out)[0] == 0
    assert json.loads(first.read_bytes())["metrics"] == json.loads(whole)["metrics"]
    scores = next((out / "scores").glob("*.npz"))
    scores.write_bytes(scores.read_bytes()[:100])
    code, _, stderr = bench(*FLOOR, "--out", out)
    assert code == 2 and "damaged" in stderr and "Delete" in stderr


def fake_outcome(detector: str, category: str, seed: int, auroc: float | None, digest: str = "d") -> Outcome:
    job = Job(detector, {}, "toy_set", {"image_size": 16}, "one-anomalous/strict-v1", category, seed, 1, label=detector)
    if auroc is None:
        return Outcome(RunRecord(job, "failed", error="out of luck"))
    metrics = {"auroc": auroc, "auprc": auroc / 2}
    arrays = {"score": np.arange(4.0), "is_anomaly": np.array([0, 0, 1, 1], bool), "reference_score": np.arange(20.0)}
    return Outcome(
        RunRecord(job, "done", metrics=metrics, split_digest=f"{digest}{category}{seed}", reference="held-out"), arrays
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "made", create=True)
    values = {"a_1": (0.9, 0.8, 0.7, 0.6), "b": (0.8, 0.8, 0.9, None), "c&%": (0.5, 0.5, 0.5, 0.5)}
    for detector, (c0s0, c0s1, c1s0, c1s1) in values.items():
        for category, seed, value in (("x", 0, c0s0), ("x", 1, c0s1), ("y", 0, c1s0), ("y", 1, c1s1)):
            made.put(fake_outcome(detector, category, seed, value))
    return made


def test_cells_by_hand(store: Store) -> None:
    table = make_tables(runs_frame(store.records()))[0]
    a, b = table.cells["a_1"], table.cells["b"]
    assert (a["x"].mean, a["x"].std, a["x"].n) == (pytest.approx(0.85), pytest.approx(0.1 / 2**0.5), 2)
    assert a["mean"].mean == pytest.approx(0.75) and a["mean"].std == pytest.approx(0.1 / 2**0.5)  # of 0.8 and 0.7
    assert (b["y"].n, b["y"].wanted, b["mean"].n) == (1, 2, 1) and b["mean"].mean == pytest.approx(0.85)
    assert table.ranks("x") == ({"a_1"}, {"b"})
    assert table.ranks("y") == ({"a_1"}, {"c&%"})  # b lacks a seed there, and does not compete
    assert table.ranks("mean") == ({"a_1"}, {"c&%"})
    alone = make_tables(runs_frame([each for each in store.records() if each.job.detector != "c&%"]))[0]
    assert alone.ranks("x") == ({"a_1"}, {"b"}) and alone.ranks("y") == (set(), set())  # there a_1 has nobody to beat
    assert to_markdown([alone]).count("**0.") == 1 and to_latex([alone]).count(r"\textbf") == 1
    assert to_text([alone]).count("*") == 1


def test_costs_by_hand() -> None:
    frame = pd.DataFrame(
        {
            **{name: ["x", "x", "x"] for name in ("dataset", "protocol")},
            "data": ['{"image_size": 32, "subset": "poly"}'] * 3,
            "sampling": ["{}"] * 3,
            "detector": ["a", "a", "b"],
            "status": ["done", "done", "failed"],
            "counts.train": [100, 200, 0],
            "counts.test_normal": [30, 30, 0],
            "counts.test_anomalous": [20, 20, 0],
            "seconds.fit": [1.0, 3.0, 9.0],
            "seconds.score": [0.1, 0.2, 9.0],
            "notes.describe.parameters": [7, 7, 7],
        }
    )
    (row,) = cost_frame(frame).to_dict("records")
    assert (row["detector"], row["jobs"], row["train_images"], row["parameters"], row["fit_s"]) == ("a", 2, 150, 7, 2.0)
    assert row["score_ms_per_image"] == pytest.approx(3.0) and pd.isna(row["steps"])
    assert "| x 32×32 subset=poly | x | a | 2 | 150 |  |  | 7 | 2 | 3 |" in cost_markdown(cost_frame(frame))


def test_tables_as_text(store: Store) -> None:
    tables = make_tables(runs_frame(store.records()))
    latex, markdown = to_latex(tables), to_markdown(tables)
    assert r"a\_1 & \textbf{0.850 $\pm$ 0.071} & \textbf{0.650" in latex and r"c\&\% &" in latex
    assert r"\underline{0.800 $\pm$ 0.000}" in latex and "0.900 (1/2)" in latex and r"toy\_set" in latex
    assert "| **0.850 ± 0.071** |" in markdown and "<u>0.800 ± 0.000</u>" in markdown


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine: the LaTeX table was not compiled")
def test_latex_compiles(store: Store, tmp_path: Path) -> None:
    store.put(fake_outcome("ugly_^~\\{}$#<>|éßŁčőñÅç裂\n[k=1,b=true]", "x", 0, 0.3))
    for k in range(60):
        store.put(fake_outcome(f"d{k}", "x", 0, 0.5))
    write_tables(store)
    body = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{auc.tex}\end{document}"
    (store.folder / "paper.tex").write_text(body)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(words, cwd=store.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "too large" not in done.stdout  # a table of which no page shows the end
    assert (store.folder / "paper.pdf").stat().st_size > 1000


def test_long_tables_are_several_in_latex(tmp_path: Path) -> None:
    made = Store(tmp_path / "made", create=True)
    for k in range(LATEX_ROWS + 1):
        made.put(fake_outcome(f"d{k}", "x", 0, 0.5))
    (table,) = make_tables(runs_frame(made.records()), ["auroc"])
    first, second = to_latex([table]).split(r"\end{table}")[:2]
    assert first.count("{0.500}") == 2 * LATEX_ROWS and second.count("{0.500}") == 2
    assert "continued" not in first and "n = 1" not in second and r"1 seed, continued}" in second
    assert all(part.count(r"\toprule") == part.count(r"\bottomrule") == 1 for part in (first, second))


def test_a_class_called_mean_is_beside_the_mean(tmp_path: Path) -> None:
    made = Store(tmp_path / "made", create=True)
    for detector in ("a", "b"):
        for name, value in (("mean", 0.5), ("x", 0.7)):
            made.put(fake_outcome(detector, name, 0, value))
    (table,) = make_tables(runs_frame(made.records()), ["auroc"])
    assert table.columns == ("class mean", "x", "mean")
    assert [table.cells["a"][column].mean for column in table.columns] == pytest.approx([0.5, 0.7, 0.6])


def test_captions_say_where_epochs_were_chosen(tmp_path: Path) -> None:
    made = Store(tmp_path / "made", create=True)
    plain = fake_outcome("a", "x", 0, 0.5)
    made.put(plain)
    assert "AUROC, last epoch;" in to_text(make_tables(runs_frame(made.records())))
    job = replace(plain.record.job, hparams={"select": "normal-val"}, label="a[select=normal-val]")
    made.put(replace(plain, record=replace(plain.record, job=job)))
    assert "AUROC, last epoch, or that which select=normal-val kept;" in to_text(make_tables(runs_frame(made.records())))


def test_classes_may_be_called_as_other_columns(tmp_path: Path) -> None:
    made = Store(tmp_path / "made", create=True)
    for k, name in enumerate(("detector", "scratch", "scratch_n", "seeds", "average_rank")):
        for detector in ("a", "b"):
            made.put(fake_outcome(detector, name, 0, 0.5 + k / 10))
    write_tables(made)
    auc = pd.read_csv(made.folder / "auc.csv").query("metric == 'auroc'")
    assert list(auc["detector"]) == ["a", "b"] and list(auc["seeds"]) == [1, 1]
    shown = ["class detector", "scratch", "class scratch_n", "class seeds", "class average_rank"]
    assert [list(auc[name]) for name in shown] == [[0.5 + k / 10] * 2 for k in range(5)]
    assert list(auc["scratch_n"]) == [1, 1] and list(auc["class scratch_n_n"]) == [1, 1]


def test_latin_letters_are_those_of_latex_and_others_differ() -> None:
    assert latex_escape("größe, Öl, é, Ł") == r"gr\"{o}{\ss}e, \"{O}l, \'{e}, {\L}"
    assert latex_escape("裂纹") == "U+88C2U+7EB9" != latex_escape("划痕") and latex_escape("a\x07") == "a?"


def test_rows_from_other_splits_are_refused(store: Store, bench) -> None:
    store.put(fake_outcome("d", "x", 0, 0.7, digest="other"))
    code, _, stderr = bench("tables", store.folder)
    assert code == 2 and "different splits of the data" in stderr


def test_formulas_stay_text_in_spreadsheets(tmp_path: Path) -> None:
    made = Store(tmp_path / "made", create=True)
    made.put(fake_outcome("=cmd|' /C calc'!A0", "x", 0, 0.5))
    write_tables(made)
    for name in ("runs.csv", "auc.csv"):
        text = (made.folder / name).read_text()
        assert "'=cmd" in text and "\n=cmd" not in text and ",=cmd" not in text and '"=cmd' not in text


def test_classification_report_by_hand(store: Store, bench) -> None:
    code, out, _ = bench("tables", store.folder, "--report", "--fpr", "0.5")
    assert code == 0 and "recall" in out and "macro avg" in out and "weighted avg" in out
    # Reference scores 0..19: at a rate of 1/2 the threshold is the 11th smallest, 10; no test score (0..3) is above it.
    assert "held-out normal images" in out and ": 10 to 10, one for each of 4 jobs" in out
    assert bench("tables", store.folder, "--report", "--fpr", "1.5")[0] == 2
    for words, wanted in (
        (["--report", "--format", "json"], "--report prints text only"),
        (["--per-class"], "Add --report"),
        (["--metrics", ""], "No metric is given"),
    ):
        code, out, err = bench("tables", store.folder, *words)
        assert code == 2 and out == "" and wanted in err and err.count("\n") == 1
    code, out, _ = bench("tables", store.folder, "--report", "--per-class")
    assert out.count("weighted avg") == 11


@pytest.mark.parametrize("form", ["text", "md", "csv", "latex"])
def test_tables_come_from_records_alone(store: Store, bench, form: str) -> None:
    code, out, _ = bench("tables", store.folder, "--format", form)
    assert code == 0 and "0.85" in out
    assert bench("tables", store.folder, "--format", "word")[0] == 2


@pytest.mark.slow
def test_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    """A real SIGINT to a real process: exit 130, finished records stay, and the next start goes on from there."""
    import signal

    out = tmp_path / "out"
    words = [
        sys.executable,
        "-m",
        "ganomaly_plugin",
        "run",
        "--models",
        "mean_intensity,ganomaly[epochs=3000]",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [*words, "--classes", "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "[1/2]" in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "mean_intensity" in stdout
    (path,) = records(out)
    assert read_record(path).status == "done" and (out / "auc.csv").is_file()


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/home/anna/data", "…/data"),
        ("--data-root=/home/anna/data", "--data-root=…/data"),
        ("folder:/srv/cells", "folder:…/cells"),
        ("elpv[root=/srv/a b,subset=mono]", "elpv[root=…/a b,subset=mono]"),
        ("ray://10.0.0.1:6379", "ray://10.0.0.1:6379"),
        ("results/mine", "results/mine"),
    ],
)
def test_a_record_names_no_folders_of_its_machine(word: str, kept: str) -> None:
    assert provenance.without_folders(word) == kept
    assert provenance.without_folders(str(Path.cwd() / "out" / "x")) == "out/x"


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("run", "--models=pca", "--datasets=digits", "--classes=0")
    assert bench(*words, "--out=~/out")[0] == bench("report", "~/out", "--out=~/page.html")[0] == 0
    assert data_root("~/data") == tmp_path / "data" and {"out", "page.html"} <= {path.name for path in tmp_path.iterdir()}
    code, _, stderr = bench(*words, "--out=~nouser/out")
    assert code == 2 and "There is no home folder ~nouser for ~nouser/out. Write the folder out." in stderr


def test_a_folder_whose_name_is_no_utf8_takes_results(tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", "--models", "pca", "--datasets", "digits", "--classes", "0", "--out", str(tmp_path / "out\udcff")]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    assert bench(*words)[0] == 0
    assert Store(words[-1]).records()[0].environment["command"][-1] == "…/out\\udcff"
    assert bench("report", words[-1])[0] == 0


def test_a_record_tells_of_an_edited_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ganomaly_plugin"
    package.mkdir()
    (package / "provenance.py").write_text("as committed\n")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "One")):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    (tmp_path / "README.md").write_text("beside the package\n")
    assert provenance.git_state.__wrapped__()["dirty"] is False
    (package / "provenance.py").write_text("edited\n")
    assert provenance.git_state.__wrapped__()["dirty"] is True
    (tmp_path / "site-packages" / "ganomaly_plugin").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "ganomaly_plugin" / "provenance.py"))
    assert provenance.git_state.__wrapped__() == {}  # of somebody else's repository nothing is told


class Broken(io.StringIO):
    """A stream whose reader has gone, or whose disk is full."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_sweep_goes_on_when_nobody_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    words = [*map(str, FLOOR), "--device", "cpu", "--executor", "inline", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "stderr", Broken(number))
    monkeypatch.setattr(sys, "stdout", Broken(number))
    assert main(words) == 0
    assert len(records(tmp_path / "out")) == 2 and (tmp_path / "out" / "auc.md").is_file()
    words[words.index("mean_intensity")] = "faulty_detectors:NanScores"
    monkeypatch.setattr(sys, "stdout", Broken(number))
    assert main(words) == 1 and len(records(tmp_path / "out")) == 4


def test_a_sweep_whose_reader_goes_ends_as_its_jobs_do(tmp_path: Path) -> None:
    words = [*FLOOR, "--device", "cpu", "--executor", "inline", "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "ganomaly_plugin", *map(str, words)]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert runner.stdout is not None
    runner.stdout.close()
    assert runner.wait(timeout=120) == 0 and (tmp_path / "out" / "auc.md").is_file()
