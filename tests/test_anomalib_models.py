"""Any anomalib model as a detector: seeds, raw scores, files, YAML forms, and what is said when weights are missing."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs

from ganomaly_plugin import load_detector, make_detector
from ganomaly_plugin.config import Experiment, expand
from ganomaly_plugin.detectors.anomalib_models import _is_model, failed_download
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.seeding import seeded
from ganomaly_plugin.selection import Selection, parse_selection
from ganomaly_plugin.training.plain import PlainTrainer, build_networks

PADIM: dict[str, Any] = {"pre_trained": False, "image_size": 32, "layers": ["layer1"], "n_features": 8}
DFKDE: dict[str, Any] = {"pre_trained": False, "image_size": 32, "layers": ["layer1"], "n_pca_components": 4}
GANOMALY: dict[str, Any] = {"n_features": 4, "image_size": 32, "batch_size": 8, "input_range": (-1.0, 1.0)}


@pytest.mark.parametrize(("name", "hparams"), [("Padim", PADIM), ("Ganomaly", GANOMALY), ("Dfkde", DFKDE)])
def test_a_seed_gives_one_detector_which_a_file_keeps(name: str, hparams: dict[str, Any], tmp_path: Path) -> None:
    images, before = blobs(16), torch.get_rng_state()
    first, second, other = (make_detector(f"anomalib:{name}", **hparams).fit(images, seed=s, epochs=1) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    scores = first.score(images)
    assert scores.shape == (16,) and scores.dtype == np.float64
    np.testing.assert_array_equal(scores, second.score(images))
    assert not np.array_equal(scores, other.score(images))
    first.save(tmp_path / "model.pt")
    again = load_detector(tmp_path / "model.pt")
    np.testing.assert_allclose(scores, again.score(images), rtol=1e-6)
    assert again.hparams == first.hparams and first.describe()["class_path"] == f"anomalib.models.{name}"


def test_a_model_that_too_few_images_leave_untrained_is_told() -> None:
    with pytest.raises(InvalidInput, match="anomalib:Dfkde failed in anomalib: RuntimeError: The size of tensor a"):
        make_detector("anomalib:Dfkde", **{**DFKDE, "n_pca_components": 16}).fit(blobs(12))


def test_every_model_can_be_made_from_its_own_hyperparameters() -> None:
    """As jobs and saved files do; nothing is built yet, so that no weights are wanted."""
    import anomalib.models as models

    for name in (name for name in models.__all__ if _is_model(getattr(models.image, name, None), models.AnomalibModule)):
        again = make_detector(f"anomalib:{name}", **make_detector(f"anomalib:{name}").hparams)  # "./x" has become a path
        assert make_detector(f"anomalib:{name}", **again.hparams).hparams == again.hparams


def test_the_switches_of_the_ablation_reach_from_our_model_to_the_step_of_anomalibs(monkeypatch: pytest.MonkeyPatch) -> None:
    from anomalib.models.image.ganomaly.loss import DiscriminatorLoss, GeneratorLoss
    from anomalib.models.image.ganomaly.torch_model import GanomalyModel

    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmark_configs" / "anomalib")
    import ablation

    images, small = blobs(16), {"features": 4, "batch_size": 8}
    ours, off = (
        make_detector(name, **small).fit(images, seed=1, epochs=1) for name in ("ganomaly", "ablation:AblatedGanomaly")
    )
    np.testing.assert_array_equal(ours.score(images), off.score(images))

    switches = dict.fromkeys(("loss_adv", "loss_enc", "init", "padding", "channels"), "anomalib")
    recipe = ablation.AblatedGanomaly(**small, **switches, redraw_below=0)
    networks = build_networks(recipe, (1, 32, 32), seed=0)
    theirs = GanomalyModel(input_size=(32, 32), num_input_channels=3, n_features=4, latent_vec_size=100).train()
    with torch.no_grad():
        for name, network in networks.items():
            for weight, their in zip(network.parameters(), theirs.get_submodule(name).parameters(), strict=True):
                weight.copy_(their)
    trainer = PlainTrainer(recipe, networks, seed=0, device=torch.device("cpu"))
    adam = [torch.optim.Adam(theirs.get_submodule(name).parameters(), 2e-4, (0.5, 0.999)) for name in networks]
    for batch in torch.from_numpy(blobs(24, side=32)).split(8):
        losses = trainer.step(batch)
        x, x_hat, z, z_hat = theirs(batch.expand(-1, 3, -1, -1))
        real, fake = (theirs.discriminator(each)[0] for each in (x, x_hat))
        generator = GeneratorLoss(wadv=1, wcon=50, wenc=1)(z, z_hat, x, x_hat, real, fake)
        generator.backward(retain_graph=True)
        adam[0].step()
        theirs.zero_grad()
        discriminator = DiscriminatorLoss()(real, theirs.discriminator(x_hat.detach())[0])
        discriminator.backward()
        adam[1].step()
        theirs.zero_grad()
        expected = {"generator": generator.item(), "discriminator": discriminator.item()}
        assert {name: float(losses[name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_scores_are_raw_and_do_not_depend_on_the_other_images() -> None:
    detector = make_detector("anomalib:Ganomaly", **GANOMALY).fit(blobs(16), epochs=1)
    images = blobs(10, seed=3)
    np.testing.assert_allclose(detector.score(images)[4], detector.score(images[4:5])[0], rtol=1e-5)
    with torch.no_grad():
        x = (torch.from_numpy(images).expand(-1, 3, -1, -1) + 1) / 2
        raw = detector.model_.model(detector.model_.pre_processor.transform(x)).pred_score
    np.testing.assert_allclose(detector.score(images), raw.double().numpy(), rtol=1e-5)


def test_scores_that_depend_on_their_batch_are_said() -> None:
    cflow = {"pre_trained": False, "image_size": 32, "backbone": "resnet18", "layers": ["layer1"]}
    for name, hparams, said in (("Cflow", cflow, True), ("Padim", PADIM, False), ("Ganomaly", GANOMALY, False)):
        detector = make_detector(f"anomalib:{name}", **hparams).fit(blobs(12), epochs=1)
        assert ("depends on the others of its batch" in str(detector.describe())) is said, name


def test_an_input_range_is_what_black_and_white_become() -> None:
    detector: Any = make_detector("anomalib:Padim", image_size=16, input_range=(-1.0, 3.0))
    black_and_white = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 20, 20)
    seen = detector._pre_processor(None).transform(black_and_white)
    torch.testing.assert_close(seen, torch.tensor([-1.0, 3.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16))


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 3), (True, 2)])
def test_the_last_short_batch_of_an_epoch_may_be_left_out(drop_last: bool, steps: int) -> None:
    detector: Any = make_detector("anomalib:Ganomaly", **GANOMALY | {"batch_size": 8, "drop_last": drop_last})
    detector.fit(blobs(18), epochs=1)
    moments = [value["step"] for adam in detector.model_.optimizers() for value in adam.state.values()]
    assert {int(taken) for taken in moments} == {steps}
    assert ("drop_last" in detector.hparams) is drop_last  # earlier records do not have it
    if drop_last:
        with pytest.raises(InvalidInput, match="drop_last leaves nothing of 7 images with batch_size=8"):
            detector.fit(blobs(7), epochs=1)


def test_a_model_of_maps_alone_scores_by_the_largest() -> None:
    maps = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]])
    found = SimpleNamespace(pred_score=None, anomaly_map=maps)
    assert make_detector("anomalib:Padim")._of(found, "score", (4, 4)).tolist() == [1.0, 0.5]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "changes"), [("Padim", {"pre_trained": False}), ("Ganomaly", {})])
def test_a_file_is_read_without_a_download(name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    detector: Any = make_detector(f"anomalib:{name}")
    made = []
    monkeypatch.setattr(type(detector), "build_model", lambda self, **given: made.append(given) or torch.nn.Linear(1, 1))
    state = {"model": torch.nn.Linear(1, 1).state_dict(), "has_anomaly_map": True}
    detector._load_state(state, torch.device("cpu"))
    assert made == [changes] and detector.has_anomaly_map


def test_padim_has_maps_of_the_images_size_and_ganomaly_none() -> None:
    images = blobs(8)
    detector = make_detector("anomalib:Padim", **PADIM).fit(images)
    assert detector.anomaly_map(images).shape == (8, 16, 16) and not detector.has_epochs
    with pytest.raises(InvalidInput, match="no anomaly map"):
        make_detector("anomalib:Ganomaly", **GANOMALY).fit(images, epochs=1).anomaly_map(images)


def test_epochs_train_and_are_reported() -> None:
    seen: list[int] = []
    detector = make_detector("anomalib:Ganomaly", **GANOMALY)
    assert detector.has_epochs and detector.default_epochs == 15
    detector.fit(blobs(8), epochs=2, on_epoch=lambda epoch, d: seen.append(epoch * len(d.score(blobs(3)))))
    assert seen == [3, 6] and [sorted(losses) for losses in detector.history_] == [["discriminator_loss", "generator_loss"]] * 2


def test_a_frozen_part_of_a_model_stays_frozen_when_epochs_are_watched() -> None:
    from ganomaly_plugin.detectors.anomalib_data import AfterEpoch

    teacher = torch.nn.Sequential(torch.nn.BatchNorm2d(1)).eval()
    model = torch.nn.Sequential(teacher, torch.nn.BatchNorm2d(1))
    hook: Any = AfterEpoch(SimpleNamespace(history_=[]), lambda epoch, detector: model.eval())  # type: ignore[arg-type]
    hook.on_train_epoch_end(SimpleNamespace(callback_metrics={}, current_epoch=0), model)
    assert [module.training for module in (model, *model, *teacher)] == [True, False, True, False]


@pytest.mark.parametrize("raised", [KeyError("mine"), OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_what_a_callback_raises_stays_what_it_is(raised: BaseException) -> None:
    """Lightning makes an exit of an interrupt, and a want of weights is an OSError too."""

    def stop(epoch: int, detector: Any) -> None:
        raise raised

    with pytest.raises(type(raised)) as caught:
        make_detector("anomalib:Ganomaly", **GANOMALY).fit(blobs(8), epochs=2, on_epoch=stop)
    assert caught.value is raised or isinstance(raised, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("name", "hparams", "message"),
    [
        ("anomalib:", {}, "needs a name or a path after the colon"),
        ("anomalib:Padimm", {}, "Did you mean 'Padim'"),
        ("anomalib:Padim", {"backbon": "resnet18"}, "Did you mean 'backbone'"),
        ("anomalib:Padim", {"n_features": "many"}, "n_features must be"),
        ("anomalib:EfficientAd", {"model_size": 3}, r"must be \S*\.EfficientAdModelSize \| str, got 3"),  # text, not a name
        ("anomalib:CFM", {"lr": "fast"}, "lr must be float"),  # beside a Path that anomalib imports for type checkers only
        ("anomalib:Padim", {"image_size": 0}, "image_size must be at least 1"),
        ("anomalib:Ganomaly", {"batch_size": 0}, "batch_size must be at least 1"),
        ("anomalib:Ganomaly", {"input_range": [1, 0]}, "low < high"),
    ],
)
def test_bad_names_and_arguments(name: str, hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make_detector(name, **hparams)


class Broken:
    """What a server sends whose connection breaks off, or which sends something else."""

    def __init__(self, last: Exception | bytes) -> None:
        self.parts = [b"some", last]

    def info(self) -> dict[str, str]:
        return {}

    def read(self, size: int) -> bytes:
        part = self.parts.pop(0)
        if isinstance(part, Exception):
            raise part
        return part

    def close(self) -> None:
        pass


def offline(*args: Any, **options: Any) -> Any:
    raise urllib.error.URLError("Name or service not known")


@pytest.mark.parametrize(
    ("name", "hparams", "message"),
    [
        ("Padim", {}, r"needs timm/resnet18.* of the Hugging Face hub, .* its .*\(HF_HOME\) here, or set pre_trained=false"),
        ("Cfa", {}, r"needs https://download\.pytorch\.org/.*wide_resnet50_2.*\.pth, .* its .*\(TORCH_HOME\) here\. "),
        ("EfficientAd", {"batch_size": 1}, r"needs https://\S*efficientad\S*\.zip, .* its \S*pre_trained here\. "),
    ],
)
def test_a_failed_download_says_what_belongs_where(
    name: str, hparams: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for where in ("urllib.request.urlopen", "torch.hub.urlopen"):
        monkeypatch.setattr(where, offline)
    with pytest.raises(InvalidInput, match=message):
        make_detector(f"anomalib:{name}", **hparams).fit(blobs(4))


@pytest.mark.parametrize(
    "last", [None, ConnectionResetError("reset by peer"), b""], ids=["offline", "broken off", "another file"]
)
def test_a_failed_download_leaves_no_folder_that_counts_as_the_data_set(
    last: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DRAEM would make its anomalies of an empty one without a word."""
    folder = tmp_path / "dtd"
    monkeypatch.setattr("urllib.request.urlopen", offline if last is None else lambda *_, **__: Broken(last))
    for _ in range(2):
        with pytest.raises(InvalidInput, match=rf"needs https://\S*dtd\S*\.tar\.gz, .* its {folder} here\. "):
            make_detector("anomalib:Draem", dtd_dir=str(folder)).fit(blobs(4))
        assert not folder.exists()


def test_errors_that_are_no_downloads() -> None:
    assert failed_download(ValueError("x")) is None and failed_download(OSError("disk full")) is None


def test_a_class_path_with_init_args_names_the_model() -> None:
    item = {"class_path": "anomalib.models.Padim", "init_args": {"backbone": "resnet18"}}
    assert parse_selection(item, "model") == Selection("anomalib:Padim", {"backbone": "resnet18"})
    assert parse_selection({"class_path": "Patchcore"}, "model") == Selection("anomalib:Patchcore", {})
    assert parse_selection({"class_path": "mine.detectors.Best"}, "model") == Selection("mine.detectors:Best", {})


def test_jobs_of_anomalib_models_hold_every_argument() -> None:
    models = [Selection("anomalib:Padim", PADIM), Selection("anomalib:Ganomaly", GANOMALY)]
    padim, ganomaly = expand(
        Experiment(models, [Selection("digits")], ["one-anomalous/strict-v1"], classes=["0"], epochs=3, image_size=16)
    )
    assert (padim.epochs, ganomaly.epochs) == (None, 3)
    assert padim.hparams["backbone"] == "resnet18" and ganomaly.hparams["input_range"] == [-1.0, 1.0]


def test_a_sweep_puts_them_beside_ours(tmp_path: Path, bench) -> None:
    words = ["--models", "ganomaly[features=2],anomalib:Ganomaly[n_features=2,image_size=32],anomalib:Padim[backbone=none]"]
    options = ["--datasets", "digits", "--classes", "0", "--image-size", "16", "--epochs", "1", "--device", "cpu"]
    code, out, err = bench("run", *words, *options, "--out", tmp_path / "out")
    assert code == 1 and "anomalib:Ganomaly" in out and "none" in err  # a backbone nobody has: a failed record


def test_seeded_restores_the_global_states() -> None:
    with seeded(7):
        a = (torch.rand(1), np.random.rand())  # noqa: NPY002
    with seeded(7):
        b = (torch.rand(1), np.random.rand())  # noqa: NPY002
    assert a == b


def test_a_model_with_a_batch_size_of_its_own_is_recorded_with_ours() -> None:
    detector = make_detector("anomalib:Ganomaly", batch_size=8)
    assert detector.hparams["batch_size"] == 8


@pytest.mark.anomalib_cli
@pytest.mark.parametrize("name", ["anomalib:Ganomaly[n_features=8,latent_vec_size=8]", "anomalib:Padim[pre_trained=false]"])
def test_members_of_the_family_conform(name: str, bench) -> None:
    """`pytest -m anomalib_cli`."""
    code, out, err = bench("test", name)
    assert code == 0 and " 0 failed" in out, out + err
