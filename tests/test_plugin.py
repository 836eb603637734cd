"""A detector of another package: installed with pip, found by its entry point, tested and run like a built-in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import odd_options
import pytest

import ganomaly_plugin
from ganomaly_plugin import list_detectors, load_detector, make_detector
from ganomaly_plugin.config import Experiment, expand
from ganomaly_plugin.core import Job
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.hparams import holds_special
from ganomaly_plugin.selection import Selection
from ganomaly_plugin.store import Store

EXAMPLE = Path(__file__).parent / "example_plugin"

USE = """
import json, sys
import numpy as np
from ganomaly_plugin import list_detectors, load_detector, make_detector
from ganomaly_plugin.conformance import run_checks
from ganomaly_plugin.registry import entries

images = np.random.default_rng(0).integers(0, 256, (9, 1, 16, 16), dtype=np.uint8)
detector = make_detector("median_image", power=2).fit(images)
detector.save("detector.pt")
print(json.dumps({
    "names": list_detectors(),
    "source": entries("detector")["median_image"].source,
    "scores": detector.score(images).tolist(),
    "loaded": load_detector("detector.pt").score(images).tolist(),
    "checks": {r.check: [r.status, r.detail] for r in run_checks("median_image")},
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the example package to, without a network."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))  # building writes there
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_an_installed_package_adds_a_detector(installed: Path, tmp_path: Path):
    ours = Path(ganomaly_plugin.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ours)])}
    command = [sys.executable, "-W", "error::Warning:example_plugin", "-c", USE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "median_image" in found["names"] and "ganomaly" in found["names"]
    assert found["source"] == "ganomaly-example-plugin"
    assert found["scores"] == found["loaded"] and len(found["scores"]) == 9
    assert {check: detail for check, (status, detail) in found["checks"].items() if status == "failed"} == {}
    exempt = {check for check, (status, _) in found["checks"].items() if status == "exempt"}
    assert exempt - {"cuda"} == {"seed_matters", "on_epoch"}


@pytest.mark.slow
def test_bench_runs_and_tests_it(installed: Path, tmp_path: Path):
    ours = Path(ganomaly_plugin.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ours)])}
    for words in (["run", "--models", "median_image", "--datasets", "stripes", "--out", "out"], ["test", "median_image"]):
        command = [sys.executable, "-m", "ganomaly_plugin", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "out" / "records").glob("median_image-stripes-*.json"))) == 2


def claim(folder: Path, package: str, name: str, target: str) -> None:
    """What pip leaves of `package`: metadata that claims a detector name."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ganomaly_plugin.detectors]\n{name} = {target}\n")


def test_two_packages_with_one_name_are_an_error_that_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claim(tmp_path, "first-pack", "median_image", "first:Median")
    claim(tmp_path, "second-pack", "median_image", "second:Median")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInput, match="'median_image' is claimed twice") as caught:
        list_detectors()
    text = str(caught.value)
    assert "first-pack (first:Median)" in text and "second-pack (second:Median)" in text and "\n" not in text


@pytest.mark.parametrize("target", ["mine:Autoencoder", "ganomaly_plugin.detectors.ae:AutoencoderRecipe"])
def test_a_package_cannot_take_a_built_in_name(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claim(tmp_path, "greedy-pack", "ae", target)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInput, match="'ae' is claimed twice") as caught:
        make_detector("ae")
    assert "ganomaly-plugin (ganomaly_plugin.detectors.ae" in str(caught.value) and "greedy-pack" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("1 +", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("exit()", "SystemExit"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named(code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claim(tmp_path, "broken-pack", "broken_one", "broken_module:Detector")
    (tmp_path / "broken_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert "broken_one" in list_detectors("broken*")  # listing imports nothing
    with pytest.raises(InvalidInput, match="Cannot import detector 'broken_one'") as caught:
        make_detector("broken_one")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert "anew" not in str(caught.value)
    with pytest.raises(InvalidInput, match="Cannot import") as caught:  # nor is the folder missing on PYTHONPATH
        make_detector("broken_module:Detector")
    assert "PYTHONPATH" not in str(caught.value)


def test_a_package_that_is_gone_is_to_be_installed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claim(tmp_path, "gone-pack", "gone_one", "gone_package.module:Detector")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInput, match=r"No module named 'gone_package'.*Install gone-pack anew"):
        make_detector("gone_one")


def test_an_entry_point_may_name_a_class_inside_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claim(tmp_path, "inner-pack", "inner_one", "odd_options:Outer.Inner")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(make_detector("inner_one"), odd_options.Outer.Inner)


def test_bench_ls_says_why_the_options_of_a_name_cannot_be_told(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claim(tmp_path, "gone-pack", "gone_one", "gone_package.module:Detector")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = bench("ls", "gone_one")
    assert code == 0 and "from gone-pack" in out and "cannot be told" in out and "No module named 'gone_package'" in out


def jobs(name: str, **options):
    models = [Selection(f"odd_options:{name}", options)]
    return expand(Experiment(models, [Selection("digits")], ["one-anomalous/strict-v1"], ["0"], image_size=16))


@pytest.mark.parametrize(
    ("name", "given", "recorded", "label"),
    [
        ("Named", {}, {"norm": "FLAT", "weights": "none"}, ""),
        ("Named", {"norm": "ROUND", "weights": "a/b"}, {"norm": "ROUND", "weights": "a/b"}, "[norm=ROUND,weights=a/b]"),
        ("Named", {"norm": odd_options.Norm.ROUND, "weights": Path("a")}, {"norm": "ROUND"}, "[norm=ROUND,weights=a]"),
        ("Named", {"norm": "FLAT"}, {"norm": "FLAT"}, ""),
        ("Bare", {"norm": "ROUND"}, {"norm": "ROUND", "weights": "none"}, "[norm=ROUND]"),
        ("Told", {"norm": "ROUND", "weights": "a"}, {"norm": "ROUND", "weights": "a"}, "[norm=ROUND,weights=a]"),
        ("Mixed", {}, {"kind": "good", "also": "good", "named": "GOOD"}, ""),
        (
            "Mixed",
            {"kind": "bad", "also": "bad", "named": "BAD"},
            {"kind": "bad", "also": "bad"},
            "[also=bad,kind=bad,named=BAD]",
        ),
    ],
)
def test_members_of_an_enum_and_paths_are_recorded(name: str, given: dict, recorded: dict, label: str):
    (job,) = jobs(name, **given)
    assert recorded.items() <= job.hparams.items() and job.label == f"odd_options:{name}{label}"
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))).key == job.key
    again = make_detector(job.detector, **job.hparams)
    if name != "Mixed":
        assert isinstance(getattr(again, "recipe", again).norm, odd_options.Norm)
        assert isinstance(getattr(again, "recipe", again).weights, Path)


@pytest.mark.parametrize(
    "given", [{}, {"net": {"width": 3}, "more": [{"norm": "ROUND"}], "norm": "ROUND", "place": "b/c"}], ids=["default", "given"]
)
def test_dataclasses_enums_and_paths_are_recorded_and_saved(given: dict, tmp_path: Path):
    detector = make_detector("odd_options:Nested", **given)
    (job,) = jobs("Nested", **given)
    assert make_detector("odd_options:Nested", **job.hparams).hparams == detector.hparams
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 16, 16), dtype=np.uint8)
    detector.fit(images).save(tmp_path / "detector.pt")
    loaded = load_detector(tmp_path / "detector.pt", name="odd_options:Nested")
    assert loaded.hparams == detector.hparams and np.array_equal(loaded.score(images), detector.score(images))
    if given:
        net, (more,) = detector.told["net"], detector.told["more"]
        assert net == odd_options.Plain(3) and more == odd_options.Plain(norm=odd_options.Norm.ROUND)
        assert job.hparams["net"] == {"width": 3, "norm": "FLAT"} and "net={'width': 3}" in job.label


def test_a_recipe_is_saved_with_members_of_an_enum_and_paths(tmp_path: Path):
    detector = make_detector("odd_options:Named", norm="ROUND", features=2)
    detector.fit(np.zeros((4, 1, 16, 16), np.uint8), epochs=1).save(tmp_path / "detector.pt")
    assert load_detector(tmp_path / "detector.pt", name="odd_options:Named").hparams == detector.hparams


def test_a_recipe_may_name_types_for_type_checkers_only():
    detector = make_detector("odd_options:Unchecked", features=2, sides=[3, 5])
    assert list(detector.hparams["sides"]) == [3, 5]
    with pytest.raises(InvalidInput, match="select must be"):
        make_detector("odd_options:Unchecked", select="frist")


def test_a_detector_with_an_enum_runs(bench, tmp_path: Path):
    models = "odd_options:Bare[norm=ROUND],odd_options:Told,odd_options:Named[norm=ROUND,features=2,epochs=1]"
    words = ("--datasets", "digits", "--classes", "0", "--image_size", "16", "--out", tmp_path / "out")
    code, out, err = bench("run", "--models", models, *words)
    assert code == 0 and "odd_options:Bare[norm=ROUND]" in out, err


def test_an_option_may_be_called_name(bench, tmp_path: Path):
    words = ("--datasets", "digits", "--classes", "0", "--image_size", "16", "--out", tmp_path)
    code, out, err = bench("run", "--models", "odd_options:HasName[name=median],odd_options:HasName", *words)
    assert code == 0 and "odd_options:HasName[name=median]" in out, err
    assert sorted(record.job.hparams["name"] for record in Store(tmp_path).records()) == ["mean", "median"]


def test_a_dataclass_may_make_its_defaults(bench, tmp_path: Path):
    words = ("--datasets", "digits", "--classes", "0", "--image_size", "16", "--out", tmp_path)
    code, out, err = bench("run", "--models", "odd_options:Built,odd_options:Built[weights=[3.0]]", *words)
    assert code == 0 and "odd_options:Built[weights=[3.0]]" in out, err
    hparams = [record.job.hparams["weights"] for record in Store(tmp_path).records()]
    assert sorted(hparams) == [[1.0, 2.0], [3.0]]
    with pytest.raises(InvalidInput, match="Unknown hyperparameter of odd_options:Built 'fitted'"):
        make_detector("odd_options:Built", fitted=True)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("Unsaid", "", "norm is <Norm.FLAT: 'l1'>, which a record holds as text that does not make it again. Annotate norm"),
        ("Named", "norm=l1", "norm must be odd_options.Norm (FLAT, ROUND), got 'l1'"),
        ("Forgets", "sign=2", "does not return the option sign in its hparams as 2, and would be run without it; add it there"),
        ("Forgets", "betas=[0.1,0.9]", "does not return the option betas in its hparams as [0.1, 0.9]"),
        ("Forgets", "power=-3", "does not return the option power in its hparams as -3.0, but 3.0; return it there"),
        ("TellsMore", "", "has 'norm' in its hparams, which its constructor does not name. Have both agree."),
        ("Calls", "net={act: os.getcwd}", "net is {'act': 'os.getcwd'}, and a class path is imported nowhere here"),
        ("Calls", "nets={a: os.getcwd}", "nets is {'a': 'os.getcwd'}, and a class path is imported nowhere here"),
        ("Nested", "net={wdth: 3}", "net must be odd_options.Plain, got {'wdth': 3}"),
        ("InArrays", "weights=[1.0,3.0]", "its hparams as [1.0, 3.0], but array([1., 3.]); return it there"),
        ("Method", "", "its hparams is a method, not a dict. Make it a property that returns one"),
        ("Raises", "", "its hparams cannot be read: AttributeError: 'Raises' object has no attribute 'no_such_thing'"),
        ("LeavesLater", "", "its hparams cannot be read: SystemExit: 0"),
        ("Leaves", "", "Cannot make detector 'odd_options:Leaves': SystemExit"),
    ],
)
def test_options_that_a_detector_does_not_tell_are_an_error(bench, name: str, given: str, said: str):
    words = ("--datasets", "no_such_set", "--classes", "0", "--dry-run")  # before data are looked for
    code, _, err = bench("run", "--models", f"odd_options:{name}[{given}]", *words)
    assert code == 2 and f"odd_options:{name}" in err and said in err and err.count("\n") == 1, err


def test_options_at_their_defaults_need_not_be_told():
    (plain,) = jobs("Forgets")
    for given in ({"sign": 1}, {"betas": [0.5, 0.9]}, {"betas": (0.5, 0.9)}, {"power": 2}):
        assert [job.key for job in jobs("Forgets", **given)] == [plain.key]
    assert jobs("Forgets", power=3)[0].hparams == {"power": 3.0}


def test_paths_and_members_are_found_inside_lists() -> None:
    assert holds_special([1, ("x", [Path("y")])]) and holds_special((odd_options.Kind.GOOD,))
    assert not holds_special([1, ("x", [2.0]), None])
