"""The public interface: names, hyperparameters, images, saving; each bad input is one clear line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs

import ganomaly_plugin
from ganomaly_plugin import list_detectors, load_authors_checkpoint, load_detector, load_results, make_detector
from ganomaly_plugin.datasets.base import load_dataset
from ganomaly_plugin.datasets.splits import get_protocol
from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.errors import BenchError, CorruptFile, InvalidInput, NotFitted
from ganomaly_plugin.metrics import check_scores
from ganomaly_plugin.registry import DATASETS, DETECTORS, entries, resolve
from ganomaly_plugin.report.figures import figure_kind
from ganomaly_plugin.report.measures import check_metrics
from ganomaly_plugin.verify import verify

SMALL = {"features": 4, "latent_dim": 8}


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_every_registered_name_resolves() -> None:
    assert set(ganomaly_plugin.__all__) <= set(dir(ganomaly_plugin))  # what a notebook completes
    assert {"ganomaly", "ae", "mean_intensity"} <= set(list_detectors())
    assert list_detectors("gano*") == ["ganomaly", "ganomaly_plus"]
    members = {
        "detector": {"anomalib:": "anomalib:Padim"},
        "data set": {"anomalib:": "anomalib:MVTecAD", "folder:": "folder:x"},
    }
    for kind, table in (("detector", DETECTORS), ("data set", DATASETS)):
        assert set(entries(kind)) >= {entry.name for entry in table}
        for entry in table:
            assert callable(resolve(kind, members[kind].get(entry.name, entry.name)))


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(InvalidInput) as error:
        make_detector("ganomoly")
    assert "Unknown detector 'ganomoly'. Did you mean 'ganomaly'? Known: " in message(error)
    with pytest.raises(InvalidInput) as error:
        make_detector("ganomaly[features=32]")
    assert message(error).endswith("is a name with options. Give 'ganomaly', and options as keyword arguments.")
    with pytest.raises(InvalidInput) as error:
        make_detector("ganomaly", latent=3)
    assert "Did you mean 'latent_dim'?" in message(error)
    with pytest.raises(InvalidInput, match=r"Cannot import detector 'no\.such\.module:Class'"):
        make_detector("no.such.module:Class")


@pytest.mark.parametrize("name", [None, 3, b"pca", ["pca"], {}, object])
def test_what_is_no_name_is_unknown(name: Any) -> None:
    for kind, call in {
        "detector": make_detector,
        "data set": load_dataset,
        "protocol": get_protocol,
        "metric": lambda given: check_metrics([given]),
        "figure": figure_kind,
    }.items():
        with pytest.raises(InvalidInput) as error:
            call(name)
        assert message(error).startswith(f"Unknown {kind} {name!r}.")
    with pytest.raises(InvalidInput, match="A pattern must be text"):
        list_detectors(name)


@pytest.mark.parametrize("metrics", ["auroc", None, 3])
def test_metrics_are_a_list(metrics: Any) -> None:
    with pytest.raises(InvalidInput, match=f"metrics must be a list of names, got {metrics!r}"):
        check_metrics(metrics)


@pytest.mark.parametrize("path", [None, 3, b"detector.pt", ["detector.pt"]])
def test_what_is_no_path_is_refused(path: Any) -> None:
    fitted = make_detector("mean_intensity").fit(GOOD)
    for call in (load_detector, load_results, load_authors_checkpoint, fitted.save, verify):
        with pytest.raises(InvalidInput) as error:
            call(path)
        assert message(error) == f"A path must be text or a Path, got {path!r}."


@pytest.mark.parametrize(
    ("hparams", "words"),
    [
        ({"features": "wide"}, "features must be"),
        ({"features": 1}, "features must be at least 2"),
        ({"features": 2.5}, "features must be"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"betas": [0.5, 1.0]}, "betas must be two numbers"),
        ({"betas": [0.5]}, "betas must be"),
        ({"adversarial": "wgan"}, "adversarial must be"),
        ({"batchnorm": "none"}, "batchnorm must be"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"input_range": [1, -1]}, "input_range must be"),
        ({"extra_layers": -1}, "extra_layers must be at least 0"),
        ({"w_con": float("nan")}, "w_con must be at least 0"),
    ],
)
def test_bad_hyperparameters(hparams: dict, words: str) -> None:
    with pytest.raises(InvalidInput) as error:
        make_detector("ganomaly", **hparams)
    assert words in message(error)


def test_hyperparameters_are_what_was_given() -> None:
    detector = make_detector("ganomaly", features=8, lr=1, betas=(0, 0.9))
    assert detector.hparams["features"] == 8 and detector.hparams["lr"] == 1.0 and detector.hparams["betas"] == [0, 0.9]
    assert make_detector("ganomaly", **detector.hparams).hparams == detector.hparams


def test_lists_that_make_no_array_are_refused_in_one_line() -> None:
    square, flat = np.zeros((1, 16, 16), np.uint8), np.zeros((1, 16, 8), np.uint8)
    for images in ([square, flat], [torch.zeros(1, 16, 16, requires_grad=True)] * 2):
        with pytest.raises(InvalidInput, match="Images are a list that makes no array") as error:
            make_detector("pca").fit(images)
        message(error)


def test_recipes_know_their_choices() -> None:
    for options in ({"adversarial": "zzz"}, {"batchnorm": "Running"}, {"score_by": "residuals"}, {"select": "best"}):
        with pytest.raises(InvalidInput, match=f"{next(iter(options))} must be one of .*, got"):
            GanomalyRecipe(**options)


@pytest.mark.parametrize(
    ("name", "hparams"),
    [
        ("ganomaly", {"w_con": np.float64(3), "features": np.int64(4), "latent_dim": np.int32(2), "lr": np.float32(0.5)}),
        ("ae", {"betas": (np.float64(0.5), np.float64(0.9)), "features": 4}),
        ("knn", {"distance": np.str_("mean"), "standardise": np.bool_(True)}),
    ],
)
def test_numpys_numbers_are_numbers(tmp_path: Path, name: str, hparams: dict) -> None:
    detector = make_detector(name, **hparams).fit(blobs(8), epochs=None if name == "knn" else 1)
    detector.save(tmp_path / "detector.pt")
    again = load_detector(tmp_path / "detector.pt")
    np.testing.assert_array_equal(again.score(GOOD), detector.score(GOOD))
    assert not any(isinstance(value, np.generic) for value in again.hparams.values())


GOOD = blobs(4)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (GOOD[0], "shape (1, 16, 16)"),
        (GOOD[:0], "empty"),
        (np.where(np.arange(4)[:, None, None, None] == 2, np.nan, GOOD), "NaN (first in image 2)"),
        (GOOD * 255, "rescale"),
        (GOOD.astype(np.int64), "dtype int64"),
        (GOOD.astype(str), "dtype"),
        (np.zeros((4, 1, 16, 16), dtype=np.uint16), "16-bit"),
        (blobs(4, side=24), "multiple of 16"),
        (np.zeros((4, 1, 16, 32), dtype=np.uint8), "square"),
        ([[1, 2], [3]], ""),
    ],
)
def test_bad_images(images: object, words: str) -> None:
    with pytest.raises((BenchError, ValueError)) as error:
        make_detector("ganomaly", **SMALL).fit(images, epochs=1)
    assert words in message(error)


def test_score_wants_images_like_those_of_fit() -> None:
    detector = make_detector("ae", **SMALL)
    with pytest.raises(NotFitted, match="not fitted"):
        detector.score(GOOD)
    with pytest.raises(NotFitted, match="not fitted"):
        detector.save("nowhere")
    detector.fit(GOOD, epochs=1)
    with pytest.raises(InvalidInput, match=r"3×16×16.*fitted on 1×16×16"):
        detector.score(blobs(4, channels=3))
    with pytest.raises(InvalidInput, match=r"1×32×32.*fitted on 1×16×16"):
        detector.anomaly_map(blobs(4, side=32))


def test_arrays_may_be_read_backwards() -> None:
    detector = make_detector("knn").fit(GOOD[:, ::-1])  # grey images after BGR → RGB
    np.testing.assert_array_equal(detector.score(GOOD[:, ::-1, ::-1]), detector.score(GOOD[:, :, ::-1].copy()))


@pytest.mark.parametrize("first", [True, False])
def test_after_a_failed_fit_a_detector_is_not_fitted(first: bool) -> None:
    detector = make_detector("ganomaly", **SMALL, batch_size=4, select="normal-val", val_share=0.3)
    if not first:
        detector.fit(blobs(12), epochs=1)
    with pytest.raises(InvalidInput, match="val_share"):
        detector.fit(blobs(1), epochs=1)
    for call in (lambda: detector.score(GOOD), lambda: detector.save("detector.pt")):
        with pytest.raises(NotFitted):
            call()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_fit_takes_the_gradients_it_needs(around: Any) -> None:
    detector = make_detector("ae", **SMALL).fit(GOOD, epochs=1)
    with around():
        within = make_detector("ae", **SMALL).fit(GOOD, epochs=np.int64(1))
    np.testing.assert_array_equal(within.score(GOOD), detector.score(GOOD))


def test_scores_that_are_not_finite_are_an_error() -> None:
    detector = make_detector("ganomaly", **SMALL, lr=1e9).fit(GOOD, steps=1)  # the step after it would be noticed in training
    with pytest.raises(InvalidInput, match=r"ganomaly returned \d scores that are not finite"):
        detector.score(GOOD)


def test_complex_scores_are_an_error() -> None:
    for scores in (np.ones(3) * 1j, torch.ones(3) * 1j):
        with pytest.raises(InvalidInput, match="mine returned complex scores; wanted 3 real numbers"):
            check_scores(scores, 3, "mine")


@pytest.mark.parametrize(
    "arguments",
    [{"epochs": 0}, {"epochs": 1.5}, {"seed": -1}, {"seed": "0"}, {"seed": 2**32}]
    + [{"device": device} for device in ("tpu9", "meta", "mps", "cpu:5", 1)],
)
def test_bad_fit_arguments(arguments: dict) -> None:
    with pytest.raises(InvalidInput):
        make_detector("ae", **SMALL).fit(GOOD, **arguments)


def test_epochs_are_reported_and_counted() -> None:
    seen = []
    detector = make_detector("ganomaly", **SMALL, batch_size=4)
    detector.fit(blobs(10), epochs=3, on_epoch=lambda epoch, d: seen.append((epoch, d.score(GOOD).shape)))
    assert seen == [(1, (4,)), (2, (4,)), (3, (4,))]
    assert len(detector.history_) == 3 and set(detector.history_[0]) >= {"generator", "discriminator"}
    assert detector.describe()["steps"] == 6


@pytest.mark.parametrize("name", ["ganomaly", "ae", "mean_intensity"])
def test_save_and_load(tmp_path: Path, name: str) -> None:
    detector = make_detector(name, **(SMALL if name != "mean_intensity" else {"side": "dark"}))
    detector.fit(GOOD, epochs=1)
    detector.save(tmp_path / "detector.pt")
    loaded = load_detector(tmp_path / "detector.pt")
    assert loaded.name == name and loaded.hparams == detector.hparams
    np.testing.assert_array_equal(loaded.score(GOOD), detector.score(GOOD))
    assert [p.name for p in tmp_path.iterdir()] == ["detector.pt"]


def test_files_that_are_no_detectors(tmp_path: Path) -> None:
    path = tmp_path / "detector.pt"
    with pytest.raises(InvalidInput, match="No detector file"):
        load_detector(path)
    make_detector("mean_intensity").fit(GOOD).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match="not a readable detector file"):
        load_detector(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(CorruptFile, match="not written by save"):
        load_detector(path)
    path.write_bytes(whole)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "name": "os:system"}, path)
    with pytest.raises(InvalidInput, match="not registered"):
        load_detector(path)
    torch.save({**content, "state": {}}, path)
    with pytest.raises(CorruptFile, match="not a complete detector file"):
        load_detector(path)
    with pytest.raises(InvalidInput, match="Cannot write"):
        make_detector("mean_intensity").fit(GOOD).save(tmp_path / "no" / "folder.pt")
    with pytest.raises(InvalidInput, match="Cannot write"):
        make_detector("mean_intensity").fit(GOOD).save("")
    with pytest.raises(InvalidInput, match="Cannot write"):
        make_detector("mean_intensity").fit(GOOD).save(path / "in a file.pt")


def test_weights_of_other_networks_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "detector.pt"
    make_detector("ae", features=4, latent_dim=4).fit(GOOD, epochs=1).save(path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "hparams": {**content["hparams"], "features": 8}}, path)
    with pytest.raises(CorruptFile, match=r"do not fit network .* of ae.* or train anew \(.*Missing key.*…\)") as refused:
        load_detector(path)
    assert len(str(refused.value)) < 450 and "\n" not in str(refused.value)


def test_intensity_floor_by_hand() -> None:
    train = np.stack([np.full((1, 16, 16), v, dtype=np.float32) for v in (-0.2, 0.2)])  # mean 0, standard deviation 0.2
    test = np.stack([np.full((1, 16, 16), v, dtype=np.float32) for v in (-0.4, 0.1)])
    for side, wanted in {"both": [2, 0.5], "dark": [2, -0.5], "bright": [-2, 0.5]}.items():
        np.testing.assert_allclose(make_detector("mean_intensity", side=side).fit(train).score(test), wanted, rtol=1e-6)


def test_help_and_ls_do_not_wait_for_torch() -> None:
    code = (
        "import sys; from ganomaly_plugin.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "main(['ls']); heavy = {'torch', 'pandas', 'sklearn', 'anomalib', 'lightning', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_core_runs_without_anomalib_and_lightning() -> None:
    code = (
        "import sys\n"
        "for name in ('anomalib', 'lightning'): sys.modules[name] = None\n"
        "import numpy as np; from ganomaly_plugin import make_detector\n"
        "make_detector('ganomaly', features=2, latent_dim=2).fit(np.zeros((4, 1, 16, 16), np.uint8), epochs=1, device='cpu')\n"
        "from ganomaly_plugin.cli import main\n"
        "assert main(['run', '--models', 'mean_intensity', '--classes', '0', '--dry-run']) == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
