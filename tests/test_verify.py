"""The plain trainer against the authors' recordings, and the verifier against altered ones."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.errors import CorruptFile, InvalidInput
from ganomaly_plugin.speed.authors import AuthorsStep
from ganomaly_plugin.training.plain import build_networks
from ganomaly_plugin.training.scoring import scoring_mode
from ganomaly_plugin.verify import LOSSES, verify


@pytest.mark.parametrize("trainer", ["plain", "stacked", "stacked-matmul"])
def test_every_recording_passes(golden: list[Path], bench, trainer: str) -> None:
    assert len(golden) == 3
    code, out, _ = bench("verify", *golden, "--trainer", trainer)
    assert code == 0, out
    assert out.count(": ok") == 12 and out.endswith("verified\n")


def altered(source: Path, target: Path, key: str, index: tuple[int, ...], factor: float) -> Path:
    with np.load(source) as archive:
        content = {name: archive[name] for name in archive.files}
    if key == "config":
        config = json.loads(str(content["config"]))
        config["w_con"] *= factor
        content["config"] = np.array(json.dumps(config))
    else:
        content[key] = content[key].copy()
        content[key][index] = content[key][index] * factor + (1 if content[key].dtype.kind == "i" else 0)
    np.savez(target, **content)
    return target


@pytest.mark.parametrize(
    ("key", "index", "factor"),
    [
        ("losses", (2, 0), 1.0001),
        ("losses", (4, 4), 0.9998),
        ("losses", (0, 2), np.nan),
        ("test_scores_eval", (7,), 1.001),
        ("test_scores_batchstats", (0,), 0.999),
        ("test_fake_eval", (3, 0, 16, 16), 1.5),
        ("final/g/decoder.main.final-4-1-convt.weight", (0, 0, 1, 1), 1.1),
        ("final/g/encoder1.main.pyramid-8-batchnorm.running_var", (3,), 1.01),
        ("final/g/encoder1.main.pyramid-8-batchnorm.num_batches_tracked", (), 1),
        ("final/d/classifier.0.weight", (0, 3, 1, 1), -1.0),
        ("init/g/encoder2.main.initial-conv-1-4.weight", (0, 0, 2, 2), -1.0),
        ("init/d/features.2.weight", (1, 1, 0, 0), 2.0),
        ("batches", (1, 4, 0, 9, 9), -1.0),
        ("test_images", (5, 0, 9, 9), -1.0),
        ("config", (), 1.001),
    ],
)
def test_one_altered_number_fails(golden: list[Path], tmp_path: Path, bench, key, index, factor) -> None:
    path = altered(golden[0], tmp_path / "altered.npz", key, index, factor)
    code, out, _ = bench("verify", path)
    assert code == 1 and "EXCEEDED" in out and "NOT verified" in out


def record(path: Path, config: dict) -> Path:
    """A recording by the step in the authors' form (four passes of D), which shares no step code with the trainer."""
    sizes = {name: config[name] for name in ("features", "latent_dim", "extra_layers", "batch_size", "lr")}
    weights = {name: config[name] for name in ("w_adv", "w_con", "w_enc")}
    recipe = GanomalyRecipe(**sizes, **weights, betas=tuple(config["betas"]))
    chw = (config["channels"], config["image_size"], config["image_size"])
    step = AuthorsStep(recipe, chw, torch.device("cpu"))
    start = build_networks(recipe, chw, seed=0)
    rng = torch.Generator().manual_seed(1)
    batches = torch.rand(3, config["batch_size"], *chw, generator=rng) * 2 - 1
    steps = [step(batch) for batch in batches]
    losses = np.array([[float(losses[name]) for name in LOSSES] for losses in steps])
    test = torch.rand(13, *chw, generator=rng) * 2 - 1
    networks = {"generator": step.generator, "discriminator": step.discriminator}
    content = {
        "config": np.array(json.dumps(config)),
        "batches": batches.numpy(),
        "losses": losses,
        "test_images": test.numpy(),
    }
    for short, name in (("g", "generator"), ("d", "discriminator")):
        content |= {f"init/{short}/{k}": v.numpy() for k, v in start[name].state_dict().items()}
        content |= {f"final/{short}/{k}": v.numpy().copy() for k, v in networks[name].state_dict().items()}
    for mode, key in (("running", "test_scores_eval"), ("batch", "test_scores_batchstats")):
        with torch.no_grad(), scoring_mode(networks, mode):
            content[key] = recipe.score(networks, test).numpy()
            if mode == "running":
                content["test_fake_eval"] = networks["generator"](test)[0].numpy()
    np.savez(path, **content)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 16, "channels": 3, "features": 3},
        {"image_size": 16, "batch_size": 1},
        {"image_size": 32, "extra_layers": 2, "lr": 1e-3, "betas": [0.0, 0.9]},
        {"image_size": 32, "w_adv": 5.0, "w_con": 0.5, "w_enc": 10.0},
        {"image_size": 64, "channels": 2, "latent_dim": 1},
        {"image_size": 128, "batch_size": 2},
        {"image_size": 48},
    ],
)
def test_configurations_of_the_format(tmp_path: Path, change: dict) -> None:
    """In float64: where gradients are near zero, Adam makes whole steps of the signs that rounding gives them."""
    config = {"image_size": 32, "channels": 1, "latent_dim": 6, "features": 2, "extra_layers": 0, "batch_size": 5}
    config |= {"w_adv": 1, "w_con": 50, "w_enc": 1, "lr": 2e-4, "betas": [0.5, 0.999]} | change
    torch.set_default_dtype(torch.float64)
    try:
        differences = verify(record(tmp_path / "made.npz", config))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(d.largest < 1e-9 for d in differences), differences


def test_unusable_recordings_are_one_line_errors(golden: list[Path], tmp_path: Path, bench) -> None:
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes(golden[0].read_bytes()[:5000])
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    with np.load(golden[0]) as archive:
        content = {name: archive[name] for name in archive.files}
    lacking = tmp_path / "lacking.npz"
    np.savez(lacking, **{name: value for name, value in content.items() if name != "losses"})
    shape = tmp_path / "shape.npz"
    np.savez(shape, **{**content, "batches": content["batches"][:, :4]})
    config = json.loads(str(content["config"]))
    odd = {
        "one_beta": {"config": np.array(json.dumps({**config, "betas": [0.5]}))},
        "endless": {"config": np.array(json.dumps({**config, "image_size": math.inf}))},
        "fast": {"config": np.array(json.dumps({**config, "lr": 10**400}))},
        "no_step": {name: content[name][:0] for name in ("batches", "losses")},
        "complex": {"losses": content["losses"].astype(complex)},
    }
    for name, values in odd.items():
        np.savez(tmp_path / f"{name}.npz", **{**content, **values})
    for path in (truncated, text, lacking, shape, tmp_path / "nothing.npz", *(tmp_path / f"{name}.npz" for name in odd)):
        code, out, err = bench("verify", path)
        assert code == 2 and err.count("\n") == 1 and str(path) in err and "verified" not in out
    with pytest.raises(CorruptFile):
        verify(lacking)


def test_unknown_trainer_and_device(golden: list[Path]) -> None:
    with pytest.raises(InvalidInput, match=r"Unknown trainer 'plan'\. Did you mean 'plain'"):
        verify(golden[0], trainer="plan")
    with pytest.raises(InvalidInput, match="Unknown device"):
        verify(golden[0], device="gpu")


def test_the_anomalib_module_needs_anomalib(golden: list[Path], bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ganomaly_plugin.training.lightning_replay", None)
    code, _, stderr = bench("verify", golden[0], "--trainer", "lightning")
    assert code == 2 and "needs anomalib" in stderr and stderr.count("\n") == 1
