"""The anomalib modules: parity with the plain trainer, anomalib's registry and command line, checkpoints, exports.

The tests of the real `anomalib` command take minutes and are run by `pytest -m anomalib_cli`; the others share one
import of anomalib and one short training.
"""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs
from PIL import Image

import ganomaly_plugin
from ganomaly_plugin.errors import Diverged, InvalidInput
from ganomaly_plugin.registry import anomalib_modules, make_detector
from ganomaly_plugin.training.plain import PlainTrainer, build_networks, epoch_batches, train

CONFIGS = Path(__file__).parents[1] / "benchmark_configs" / "anomalib"
CPU = torch.device("cpu")
MODULES = sorted(anomalib_modules())


def small(name: str, **options: Any) -> Any:
    """A cheap module."""
    cls = getattr(ganomaly_plugin, name)
    hparams = {key: value for key, value in cls.recipe_class.conformance_hparams.items() if key != "batch_size"}
    return cls(**{"image_size": 16, "visualizer": False, **hparams, **options})


def weights(networks: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": v for name, net in networks.items() for key, v in net.state_dict().items()}


def test_importing_the_package_imports_neither_torch_nor_anomalib() -> None:
    code = "import sys, ganomaly_plugin, ganomaly_plugin.anomalib; assert not {'torch', 'anomalib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", MODULES)
def test_the_same_batches_give_the_same_weights_as_the_plain_trainer(name: str) -> None:
    from ganomaly_plugin.training.lightning_replay import fit_batches

    module = small(name, channels=1, seed=3, pre_processor=False)
    recipe, images = module.recipe, torch.from_numpy(blobs(20))
    batches = [images[:8], images[8:16], images[16:]]  # the last is short, and to be left out
    plain = PlainTrainer(recipe, build_networks(recipe, (1, 16, 16), 3), seed=3, device=CPU)
    for stage in recipe.stages:
        plain.begin(stage)
        for batch in batches[:2] * 2:
            plain.step(batch)
    fit_batches(module, batches, CPU, epochs=2 * len(recipe.stages))
    ours, theirs = weights(module.model.scoring_networks()), weights(plain.scoring_networks())
    assert ours.keys() == theirs.keys()
    trained = [key for key in ours if not key.startswith("calibration.")]  # fitted after training, which a bare step is not
    assert all(torch.equal(ours[key], theirs[key]) for key in trained)


@pytest.mark.parametrize("name", ["Egbad", "Alad"])  # which average, and normalise spectrally
def test_a_copy_trains_as_its_original(name: str) -> None:
    from ganomaly_plugin.training.lightning_replay import fit_batches

    module, batches = small(name, channels=1, pre_processor=False), list(torch.from_numpy(blobs(16)).split(8))
    modules = copy.deepcopy(module), module
    for each in modules:
        fit_batches(each, batches, CPU)
    copied, original = (weights(each.model.scoring_networks()) for each in modules)
    assert copied.keys() == original.keys() and all(torch.equal(copied[key], original[key]) for key in original)


def test_an_exported_module_that_lacks_what_trains_it_is_not_trained() -> None:
    from ganomaly_plugin.training.lightning_replay import fit_batches

    batches, options = torch.from_numpy(blobs(8)).split(8), {"channels": 1, "pre_processor": False}
    fit_batches(pickle.loads(pickle.dumps(small("Vae", **options))), batches, CPU)
    for module in (small("Egbad", **options), small("GanomalyPlus", spectral=True, **options)):
        with pytest.raises(InvalidInput, match="comes from an export or a pickle"):
            fit_batches(pickle.loads(pickle.dumps(module)), batches, CPU)
        fit_batches(module, batches, CPU)


def test_a_loss_that_is_no_number_is_told_with_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from ganomaly_plugin.training.lightning_replay import fit_batches

    def step(trainer: PlainTrainer, images: torch.Tensor) -> dict[str, torch.Tensor]:
        trainer.steps += 1
        return {"reconstruction": torch.tensor(torch.nan if trainer.steps == 5 else 1.0)}

    monkeypatch.setattr(PlainTrainer, "step", step)
    module = small("Autoencoder", channels=1, pre_processor=False)
    with pytest.raises(Diverged, match=r"'reconstruction' of stage 'train' is nan at step 5\."):
        fit_batches(module, torch.from_numpy(blobs(12)).split(4), CPU, epochs=2)  # three batches each


def test_calibration_remembers_no_more_images_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ganomaly_plugin.training import lightning
    from ganomaly_plugin.training.lightning_replay import fit_batches

    monkeypatch.setattr(lightning, "CALIBRATION_LIMIT", 6)
    module = small("Ganomaly", channels=1, pre_processor=False, score_by="combined")
    fit_batches(module, torch.from_numpy(blobs(20)).split(4), CPU)
    assert [len(each) for each in module._seen] == [4, 4]


def test_lightning_averages_the_weights_of_a_copy(tmp_path: Path, parts: Any) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = small("Alad")
    engine(tmp_path / "a", max_epochs=1, callbacks=[EMAWeightAveraging()]).fit(module, datamodule=parts)
    assert module(torch.rand(2, 3, 20, 20)).pred_score.isfinite().all()
    with pytest.raises(InvalidInput, match="weights in training, which EMAWeightAveraging exchanges afterwards"):
        engine(tmp_path / "b", max_epochs=1, callbacks=[EMAWeightAveraging()]).fit(small("GanomalyPlus"), datamodule=parts)


def test_an_epoch_of_the_plain_loop_is_an_epoch_of_the_engine() -> None:
    from ganomaly_plugin.training.lightning_replay import fit_batches

    module, images = small("Ganomaly", channels=1, pre_processor=False), torch.from_numpy(blobs(30))
    recipe = type(module.recipe)(**{**module.recipe.__dict__, "batch_size": 8})
    history: list[dict[str, float]] = []
    trainer = train(recipe, images, seed=0, epochs=1, device=CPU, after_epoch=lambda e, t, losses: history.append(losses))
    order = torch.Generator().manual_seed(1)
    steps = fit_batches(module, [images[index] for index in epoch_batches(30, 8, order)], CPU)
    assert len(steps) == 3
    assert np.mean([float(step["generator"]) for step in steps]) == pytest.approx(history[0]["generator"], abs=1e-6)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(trainer.networks).values(), weights(module.model.networks).values(), strict=True)
    )


def test_recordings_pass_with_the_lightning_trainer(golden: list[Path], bench) -> None:
    code, out, _ = bench("verify", "--trainer", "lightning", *golden)
    assert code == 0 and out.count(": ok") == 12 and out.endswith("verified\n")


def test_anomalibs_names_stay_its_own_and_ours_are_opt_in() -> None:
    from anomalib.models import AnomalibModule, UnknownModelError, get_model
    from jsonargparse import ArgumentParser

    import ganomaly_plugin.anomalib as ours

    small("Ganomaly")
    assert type(get_model("ganomaly")).__module__.startswith("anomalib.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AnomalibModule, "model", fail_untyped=False)
    assert parser.parse_args(["--model", "Ganomaly"]).model.class_path == "anomalib.models.Ganomaly"
    init_args = {"features": 2, "image_size": 16, "betas": [0.5, 0.9]}  # of which get_model makes lists of OmegaConf's
    path = {"class_path": "ganomaly_plugin.Autoencoder", "init_args": init_args}
    import anomalib.models as models

    if "ganomaly_plugin" not in models.ALLOWED_MODULES:
        with pytest.raises(UnknownModelError):
            get_model(path)
    assert "ganomaly_plugin.Autoencoder" in ours.register()
    recipe = get_model(path).recipe
    assert recipe.features == 2 and recipe.betas == (0.5, 0.9)


def test_init_arguments_are_the_recipes_fields_with_types_and_defaults() -> None:
    signature = inspect.signature(ganomaly_plugin.Ganomaly)
    assert signature.parameters["lr"].default == 2e-4 and signature.parameters["features"].annotation is int
    assert "batch_size" not in signature.parameters and signature.parameters["image_size"].default == 32
    assert ganomaly_plugin.Ganomaly.__module__ == "ganomaly_plugin"
    with pytest.raises(AttributeError, match="Ganomoly"):
        _ = ganomaly_plugin.Ganomoly


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 33}, "multiple of 16"),
        ({"channels": 2}, "channels must be 1"),
        ({"features": 1}, "features must be at least 2"),
        ({"features": "wide"}, "features must be int"),
        ({"batchnorm": "Running"}, "batchnorm must be"),
        ({"latent": 3}, "Unknown argument of Ganomaly 'latent'. Did you mean 'latent_dim'"),
        ({"precision": "bf16"}, "Unknown argument of Ganomaly 'precision'"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**32}, "seed must be a whole number"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ganomaly_plugin.Ganomaly(**options)


def test_a_pre_processor_of_another_size_is_refused() -> None:
    from ganomaly_plugin.training.pre_processing import GanPreProcessor

    with pytest.raises(InvalidInput, match="48×48, but image_size is 16"):
        small("Ganomaly", pre_processor=GanPreProcessor(48))


def test_the_pre_processor_is_configured_as_anomalibs() -> None:
    module = small("Ganomaly", image_size=48, pre_processor=ganomaly_plugin.Ganomaly.configure_pre_processor((48, 48)))
    white = module.pre_processor.transform(torch.ones(1, 3, 60, 50))
    assert white.shape == (1, 3, 48, 48) and torch.allclose(white, torch.ones(1, 3, 48, 48))
    assert ganomaly_plugin.Ganomaly.configure_pre_processor().transform(torch.ones(1, 3, 60, 50)).shape == (1, 3, 32, 32)
    with pytest.raises(InvalidInput, match="square, got an image_size of 48×32"):
        ganomaly_plugin.Ganomaly.configure_pre_processor((48, 32))


def test_what_lightning_would_do_otherwise_is_refused() -> None:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from ganomaly_plugin.training.lightning_replay import fit_batches

    images = torch.from_numpy(blobs(8))
    with pytest.raises(InvalidInput, match="precision 32-true"):
        fit_batches(small("Ganomaly", pre_processor=False), [images], CPU, precision="bf16-mixed")
    with pytest.raises(InvalidInput, match="image_size must be a whole number"):
        small("Ganomaly", image_size=16.0)
    with pytest.raises(MisconfigurationException, match="gradient accumulation"):
        fit_batches(small("Ganomaly", pre_processor=False), [images], CPU, accumulate_grad_batches=2)
    with pytest.raises(InvalidInput, match="2 stages"):
        fit_batches(small("FAnogan", pre_processor=False), [images], CPU, epochs=1)
    with pytest.raises(InvalidInput, match="expects 16×16"):
        fit_batches(small("Ganomaly", pre_processor=False), [torch.zeros(4, 3, 32, 32)], CPU)
    with pytest.raises(InvalidInput, match="got images of 32×16 and expects 16×16"):  # convolutions would score them
        small("Ganomaly", pre_processor=False).eval()(torch.zeros(4, 3, 32, 16))
    with pytest.raises(Diverged, match="step 1"):
        fit_batches(small("Ganomaly", pre_processor=False), [images * float("nan")], CPU)


@pytest.mark.parametrize("shape", [(100, 70), (28, 28), (8, 8), (32, 32)])
def test_the_exported_resize_is_the_antialiased_one(shape: tuple[int, int]) -> None:
    from ganomaly_plugin.training.pre_processing import GanPreProcessor

    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    pre = GanPreProcessor(32)
    assert torch.allclose(pre(images), pre.transform(images), atol=1e-6)
    assert pre(images).min() >= -1 and pre(images).max() <= 1 and pre(images).shape == (2, 3, 32, 32)


def write_folder(root: Path) -> Path:
    """Blobs as colour photographs of 40 pixels, and bad ones with a bright corner and a mask of it."""
    for folder, n, bad in (("train/good", 16, False), ("test/good", 6, False), ("test/bad", 6, True)):
        (root / folder).mkdir(parents=True)
        for k, image in enumerate(blobs(n, channels=3, side=40, seed=len(folder) + bad)):
            picture = ((image.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
            if bad:
                picture[:12, :12] = 255
                (root / "masks").mkdir(exist_ok=True)
                Image.fromarray(np.pad(np.full((12, 12), 255, np.uint8), ((0, 28), (0, 28)))).save(root / f"masks/{k}.png")
            Image.fromarray(picture).save(root / folder / f"{k}.png")
    return root


def test_fit_test_predict_and_checkpoint_through_the_engine(tmp_path: Path) -> None:
    from anomalib.data import Folder
    from anomalib.engine import Engine

    root = write_folder(tmp_path / "parts")
    dirs = {"normal_dir": "train/good", "abnormal_dir": "test/bad", "normal_test_dir": "test/good", "mask_dir": "masks"}
    data = Folder(
        name="parts",
        root=root,
        **dirs,
        train_batch_size=8,
        eval_batch_size=4,
        num_workers=0,
        val_split_mode="from_test",
        seed=0,
    )
    module = small("Ganomaly", visualizer=True)
    engine = Engine(default_root_dir=tmp_path / "out", max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    engine.fit(module, datamodule=data)
    (results,) = engine.test(module, datamodule=data)
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= set(results)
    assert list((tmp_path / "out").rglob("images/**/*.png"))
    batch = engine.predict(module, datamodule=data)[0]
    assert batch.pred_label.dtype == torch.bool and batch.anomaly_map.shape[-2:] == (16, 16)
    checkpoint = next((tmp_path / "out").rglob("*.ckpt"))
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"]["features"] == 4 and content["ganomaly_plugin"]["steps"] == 4

    loaded = ganomaly_plugin.Ganomaly.load_from_checkpoint(checkpoint).eval()
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images).pred_score, module.eval()(images).pred_score)
    assert torch.equal(loaded.post_processor.image_threshold, module.post_processor.image_threshold)
    with pytest.raises(InvalidInput, match="holds Ganomaly, not Autoencoder"):
        ganomaly_plugin.Autoencoder.load_from_checkpoint(checkpoint)
    with pytest.raises(InvalidInput, match="features=4 instead of 8"):
        engine.test(small("Ganomaly", features=8), datamodule=data, ckpt_path=checkpoint)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(checkpoint.read_bytes()[:-5000])
    with pytest.raises(Exception, match=r"(?i)corrupt|zip archive|truncated|unexpected"):
        ganomaly_plugin.Ganomaly.load_from_checkpoint(broken)

    longer = Engine(default_root_dir=tmp_path / "more", max_epochs=3, accelerator="cpu", enable_progress_bar=False)
    resumed = small("Ganomaly")
    longer.fit(resumed, datamodule=data, ckpt_path=checkpoint)
    assert torch.load(next((tmp_path / "more").rglob("*.ckpt")), weights_only=True)["ganomaly_plugin"]["steps"] == 6


def engine(folder: Path, **options: Any) -> Any:
    from anomalib.engine import Engine

    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, **options)


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    """A data module of 16 normal training images in batches of 4, and a few to test."""
    from anomalib.data import Folder

    dirs = {"normal_dir": "train/good", "abnormal_dir": "test/bad", "normal_test_dir": "test/good"}
    batches = {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    return Folder(name="parts", root=write_folder(tmp_path / "parts"), **dirs, **batches, val_split_mode="from_test", seed=0)


def test_a_fit_goes_on_with_the_random_numbers_that_come_next(tmp_path: Path, parts: Any) -> None:
    from lightning.pytorch import Callback

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((module._loop.draws.get_state(), module._loop.redraws.get_state()))

    options, seen = {"redraw_below": 1e9}, list[Any]()  # at each step
    engine(tmp_path / "a", max_epochs=1).fit(small("Ganomaly", **options), datamodule=parts)
    checkpoint = next((tmp_path / "a").rglob("*.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)["ganomaly_plugin"]
    assert not torch.equal(saved["redraws"], torch.Generator().manual_seed(0).get_state())
    engine(tmp_path / "b", max_epochs=2, callbacks=[Look()]).fit(
        small("Ganomaly", **options), datamodule=parts, ckpt_path=checkpoint
    )
    assert torch.equal(seen[0][0], saved["draws"]) and torch.equal(seen[0][1], saved["redraws"])


def test_a_fit_goes_on_from_the_end_of_an_epoch_only(tmp_path: Path, parts: Any) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    each = ModelCheckpoint(dirpath=tmp_path / "each", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    engine(tmp_path / "a", max_epochs=2, callbacks=[each]).fit(small("Ganomaly"), datamodule=parts)
    saved = sorted(tmp_path.glob("each/*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    with pytest.raises(InvalidInput, match="from the end of an epoch, and the checkpoint is of the middle"):
        engine(tmp_path / "b", max_epochs=3).fit(small("Ganomaly"), datamodule=parts, ckpt_path=saved[0])


def test_precision_is_that_of_scores_too(tmp_path: Path, parts: Any) -> None:
    module = small("Ganomaly")
    engine(tmp_path / "a", max_epochs=1).fit(module, datamodule=parts)
    for precision in ("bf16-mixed", "64-true"):
        with pytest.raises(InvalidInput, match=f"computes with precision 32-true, got {precision}"):
            engine(tmp_path / "b", precision=precision).test(module, datamodule=parts)


def test_a_checkpoint_of_other_settings_is_said(tmp_path: Path, parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    trained = engine(tmp_path / "a", max_epochs=1)
    trained.fit(small("Ganomaly", score_by="feature", seed=1), datamodule=parts)
    again = ganomaly_plugin.Ganomaly.load_from_checkpoint(trained.best_model_path)
    assert again.recipe.score_by == "feature" and "instead of" not in caplog.text
    engine(tmp_path / "b").test(small("Ganomaly"), datamodule=parts, ckpt_path=trained.best_model_path)
    assert "The checkpoint's Ganomaly has score_by='feature' instead of 'latent'. Set the same" in caplog.text
    with pytest.raises(InvalidInput, match="score_by='feature' instead of 'combined'"):
        engine(tmp_path / "b").test(small("Ganomaly", score_by="combined"), datamodule=parts, ckpt_path=trained.best_model_path)


def test_stages_that_were_not_reached_are_said(tmp_path: Path, parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    from lightning.pytorch.callbacks import EarlyStopping

    stop = EarlyStopping(monitor="critic_loss", mode="max", patience=1, stopping_threshold=-1e9)
    engine(tmp_path / "a", max_epochs=8, callbacks=[stop]).fit(small("FAnogan"), datamodule=parts)
    assert "FAnogan stopped before the stage encoder: its scores mean nothing yet" in caplog.text
    checkpoint = next((tmp_path / "a").rglob("*.ckpt"))
    with pytest.raises(InvalidInput, match="the checkpoint's training had 8, this one has 4"):
        engine(tmp_path / "b", max_epochs=4).fit(small("FAnogan"), datamodule=parts, ckpt_path=checkpoint)


def test_an_epoch_budget_that_looks_unset_is_said(tmp_path: Path, parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = small("Ganomaly")
    engine(tmp_path / "a", max_epochs=1000, limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=parts)
    assert "max_epochs is 1000, as where none is set: training for the published 15 epochs. Ask for 1001" in caplog.text
    assert module._loop.steps == 15


def test_a_budget_in_steps_is_that_of_a_module_too(tmp_path: Path, parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    recipe = ganomaly_plugin.GanomalyPlus.recipe_class
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "default_steps", 6)
        module = small("GanomalyPlus")
        engine(tmp_path / "a", limit_val_batches=0).fit(module, datamodule=parts)  # of four steps an epoch
    assert module._loop.steps == 8 and "training for the method's 6 steps, in whole epochs" in caplog.text
    engine(tmp_path / "b", max_epochs=1, limit_val_batches=0).fit(module, datamodule=parts)
    assert module._loop.steps == 4


@pytest.mark.parametrize("name", ["Egbad", "Anogan", "Alad"])
def test_every_module_can_be_exported_to_torch(name: str, tmp_path: Path) -> None:
    module = small(name).eval()
    path = module.to_torch(tmp_path)
    images = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    again = torch.load(path, weights_only=False)["model"]
    assert torch.allclose(again(images).pred_score, module(images).pred_score)
    module.train()(images)  # and the export leaves the module whole, spectral normalisation included


def test_exports_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="search with gradients"):
        small("Anogan").to_onnx(tmp_path)
    with pytest.raises(InvalidInput, match="depend on their batch"):
        small("Ganomaly", batchnorm="batch").to_onnx(tmp_path)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "Anogan"])
@pytest.mark.filterwarnings("ignore")  # tracing warns of each Python number
def test_a_traced_module_takes_batches_of_any_size(name: str) -> None:
    model, images = (
        small(name).eval().requires_grad_(False).model,
        torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    )
    traced = torch.jit.trace(lambda batch: model(batch).pred_score, images[:2])
    for n in (1, 5):
        assert torch.allclose(traced(images[:n]), model(images[:n]).pred_score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "Anogan"])
@pytest.mark.anomalib_cli
def test_onnx_and_openvino_give_the_scores_of_torch(name: str, tmp_path: Path) -> None:
    """`pytest -m anomalib_cli`; needs pip install ganomaly-plugin[export]."""
    import onnxruntime as ort
    import openvino as ov

    module = small(name).eval()
    module.post_processor.enable_normalization = False
    session = ort.InferenceSession(str(module.to_onnx(tmp_path, input_size=(40, 30))), providers=["CPUExecutionProvider"])
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # the CPU plugin would round to bfloat16 where the processor has it
    compiled = ov.Core().compile_model(str(module.to_openvino(tmp_path, input_size=(40, 30))), "CPU", exact)
    for n in (1, 5):
        images = torch.rand(n, 3, 40, 30, generator=torch.Generator().manual_seed(n))
        wanted = module(images).pred_score.numpy()
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"input": images.numpy()}), strict=True))
        np.testing.assert_allclose(outputs["pred_score"], wanted, rtol=1e-4, atol=1e-4 * wanted.max())
        np.testing.assert_allclose(compiled(images.numpy())["pred_score"], wanted, rtol=1e-4, atol=1e-4 * wanted.max())


def command(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = tuple(map(str, words))
    first = [sys.executable, "-m", *words[1:2]] if words[0] == "-m" else [str(scripts / words[0]), *words[1:2]]
    return subprocess.run([*first, *words[2:]], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.anomalib_cli
def test_the_anomalib_command_trains_tests_predicts_and_exports(tmp_path: Path) -> None:
    """`pytest -m anomalib_cli`: the real command on a made folder, a new process for each."""
    write_folder(tmp_path / "parts")
    data = ["--data.init_args.root", "parts", "--trainer.accelerator", "cpu"]
    config = ["--config", CONFIGS / "ganomaly_folder.yaml", *data, "--model.init_args.features", "4"]
    done = command("anomalib", "train", *config, "--trainer.max_epochs", "1", cwd=tmp_path)
    assert done.returncode == 0 and "image_AUROC" in done.stdout, done.stderr[-2000:]
    checkpoint = next((tmp_path / "results").rglob("v0/**/model.ckpt"))
    model = ["--model", "ganomaly_plugin.Ganomaly", "--model.features", "4", "--ckpt_path", checkpoint]
    assert command("anomalib", "test", *config, "--ckpt_path", checkpoint, cwd=tmp_path).returncode == 0
    assert command("anomalib", "predict", *model, "--data", "parts/test/bad", cwd=tmp_path).returncode == 0
    done = command("anomalib", "export", *model, "--export_type", "torch", cwd=tmp_path)
    assert done.returncode == 0 and list(tmp_path.rglob("model.pt"))
    other = ["--model", "ganomaly_plugin.Autoencoder", "--data", "parts/test/bad", "--ckpt_path", checkpoint]
    for wrong, message in (
        (["train", *config, "--model.init_args.image_size", "33"], "multiple of 16"),
        (["train", *config, "--model.init_args.latent", "3"], "latent"),
        (["train", "--config", CONFIGS / "ganomaly_folder.yaml", "--data.init_args.root", "nowhere"], "nowhere"),
        (["predict", *other], "holds Ganomaly"),
    ):
        done = command("anomalib", *wrong, cwd=tmp_path)
        assert done.returncode != 0 and message in "".join((done.stdout + done.stderr).split("\n")), done.stderr[-2000:]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.anomalib_cli
def test_every_module_goes_through_the_anomalib_command(name: str, tmp_path: Path) -> None:
    """`pytest -m anomalib_cli`: train, test, predict and the three exports, without a config file."""
    write_folder(tmp_path / "parts")
    hparams = {k: v for k, v in getattr(ganomaly_plugin, name).recipe_class.conformance_hparams.items() if k != "batch_size"}
    options = {"image_size": 16, **hparams}
    model = ["--model", f"ganomaly_plugin.{name}", *(w for k, v in options.items() for w in (f"--model.{k}", v))]
    folder = {"name": "parts", "root": "parts", "normal_dir": "train/good", "abnormal_dir": "test/bad"}
    folder |= {"normal_test_dir": "test/good", "train_batch_size": 8, "num_workers": 0}
    data = ["--data", "Folder", *(w for k, v in folder.items() for w in (f"--data.{k}", v))]
    where = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", 2]
    done = command("anomalib", "train", *model, *data, *where, cwd=tmp_path)
    assert done.returncode == 0 and "image_AUROC" in done.stdout, done.stderr[-2000:]
    last = ["--ckpt_path", next((tmp_path / "results").rglob("v0/**/model.ckpt"))]
    done = command("anomalib", "test", *model, *data, *where, *last, cwd=tmp_path)
    assert done.returncode == 0 and "image_AUROC" in done.stdout, done.stderr[-2000:]
    done = command("anomalib", "predict", *model, "--data", "parts/test/bad", *last, cwd=tmp_path)
    assert done.returncode == 0 and list((tmp_path / "results").rglob("images/**/*.png")), done.stderr[-2000:]
    for kind, file in (("torch", "model.pt"), ("onnx", "model.onnx"), ("openvino", "model.xml")):
        done = command("anomalib", "export", *model, "--export_type", kind, *last, cwd=tmp_path)
        if name == "Anogan" and kind != "torch":
            assert done.returncode != 0 and "search with gradients" in " ".join((done.stdout + done.stderr).split())
        else:
            assert done.returncode == 0 and list(tmp_path.rglob(file)), done.stderr[-2000:]


@pytest.mark.anomalib_cli
def test_anomalibs_benchmark_runs_our_modules(tmp_path: Path) -> None:
    """`pytest -m anomalib_cli`: anomalib's own pipeline, its CSV at the end."""
    write_folder(tmp_path / "parts")
    text = (CONFIGS / "benchmark.yaml").read_text().replace("datasets/my_parts", "parts")
    (tmp_path / "benchmark.yaml").write_text(text.replace("image_size: 32", "image_size: 16\n      features: 4"))
    done = command("-m", "ganomaly_plugin.anomalib", "benchmark", "--config", "benchmark.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = next(tmp_path.glob("runs/benchmark/*/results.csv")).read_text()
    assert "ganomaly_plugin.Ganomaly" in table and "image_AUROC" in table
    (tmp_path / "bad.yaml").write_text(text.replace("ganomaly_plugin.Ganomaly", "ganomaly_plugin.Nothing"))
    assert command("-m", "ganomaly_plugin.anomalib", "benchmark", "--config", "bad.yaml", cwd=tmp_path).returncode == 1


def test_the_benchmark_command_refuses_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    from ganomaly_plugin.anomalib import main

    assert main(["bench"]) == 2
    assert main(["benchmark", "--config", "nowhere.yaml"]) == 1
    assert "No benchmark config at nowhere.yaml" in capsys.readouterr().err


def test_the_module_and_bench_start_from_the_same_weights() -> None:
    detector = make_detector("ganomaly", features=4, batch_size=8).fit(blobs(8), epochs=1, seed=5)
    fresh = small("Ganomaly", channels=1, features=4, seed=5, latent_dim=100, lr=2e-4)
    assert weights(fresh.model.networks).keys() == weights(detector.networks_).keys()
    start = build_networks(detector.recipe, (1, 16, 16), 5)
    assert all(torch.equal(a, b) for a, b in zip(weights(start).values(), weights(fresh.model.networks).values(), strict=True))
