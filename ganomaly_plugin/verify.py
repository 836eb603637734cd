"""Replay a recording of the authors' GANomaly and compare every number it holds.

A recording (`.npz`) has the configuration, initial weights, batches, the losses of each step, the final weights and
test scores. `tests/golden/README.md` describes the keys.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganomaly_plugin.detectors.base import resolve_device
from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.errors import CorruptFile, InvalidInput, check_known, one_line
from ganomaly_plugin.files import as_path
from ganomaly_plugin.recipe import Networks
from ganomaly_plugin.training.captured import record_on
from ganomaly_plugin.training.plain import PlainTrainer
from ganomaly_plugin.training.scoring import scoring_mode
from ganomaly_plugin.training.stack import WAYS, How, check_how, default_how, make_stack

Replay = tuple[np.ndarray, Networks]
LOSSES = ("adversarial", "contextual", "encoder", "generator", "discriminator")
_NETWORKS = {"g": "generator", "d": "discriminator"}
_CONFIG = {"image_size", "channels", "latent_dim", "features", "extra_layers", "batch_size", "lr", "betas"}
_WEIGHTS = {"w_adv", "w_con", "w_enc"}
_NUMBERS = ("init/", "final/", "batches", "losses", "test_")  # how the names of all that is compared or trained on begin


@dataclass(frozen=True)
class Difference:
    """The largest difference of one kind of number, and what is allowed."""

    kind: str
    largest: float
    tolerance: float
    relative: bool
    where: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within tolerance; NaN is not."""
        return self.largest <= self.tolerance


def _plain(recipe: GanomalyRecipe, networks: dict[str, torch.nn.Module], batches: Tensor, device: torch.device) -> Replay:
    trainer = PlainTrainer(recipe, networks, seed=0, device=device)
    losses = [trainer.step(batch) for batch in batches]
    return _table(losses), trainer.networks


def _stacked(
    recipe: GanomalyRecipe,
    networks: dict[str, torch.nn.Module],
    batches: Tensor,
    device: torch.device,
    how: How | None = None,
) -> Replay:
    """The recorded training as the second of three models, mapped if `how` does not say; its neighbours see other images."""
    how = how or ("grouped" if device.type == "cpu" else default_how(device))
    stack = make_stack(recipe, [networks] * 3, seeds=[0, 1, 2], device=device, how=how, record=record_on(device))
    losses = [stack.step(torch.stack([batch.flip(0) * 0.5, batch, -batch])) for batch in batches]
    return _table([{name: value[1] for name, value in step.items()} for step in losses]), dict(stack.scoring_networks(1))


def _lightning(recipe: GanomalyRecipe, networks: dict[str, torch.nn.Module], batches: Tensor, device: torch.device) -> Replay:
    try:
        from ganomaly_plugin.training.lightning_replay import replay  # anomalib takes seconds to import
    except ImportError as error:
        raise InvalidInput(f"The trainer lightning needs anomalib: {one_line(error)}. Run pip install anomalib.") from error
    losses, trained = replay(recipe, networks, batches, device)
    return _table(losses), trained


def _table(losses: list[dict[str, Tensor]]) -> np.ndarray:
    """The losses of each step, `(steps, 5)`."""
    return np.array([[float(step[name]) for name in LOSSES] for step in losses])


Replayer = Callable[[GanomalyRecipe, dict[str, torch.nn.Module], Tensor, torch.device], Replay]
#: A trainer by name: (recipe, networks at their initial weights, batches, device) → (losses (steps, 5), networks).
TRAINERS: Mapping[str, Replayer] = {
    "plain": _plain,
    "stacked": _stacked,
    **{name: functools.partial(_stacked, how=how) for name, how in WAYS.items()},
    "lightning": _lightning,
}


def verify(path: str | os.PathLike[str], *, trainer: str = "plain", device: str = "cpu") -> list[Difference]:
    """Replay the recording at `path` and return the largest difference of each kind.

    Args:
        path: The recording.
        trainer: Which trainer replays it.
        device: Where: "cpu", "cuda", ...

    Raises:
        InvalidInput: There is no such file, trainer or device, or the trainer is none for this device.
        CorruptFile: The file is not a complete recording.
    """
    check_known("trainer", trainer, TRAINERS)
    target = resolve_device(device)
    if trainer in WAYS:
        check_how(WAYS[trainer], target)
    recording = _read(as_path(path))
    with _usable(path):
        prepared = _prepare(recording)
    with _usable(path, passed=() if target.type == "cpu" else (RuntimeError,)):  # a GPU's troubles say nothing of the file
        return _compare(recording, *prepared, TRAINERS[trainer], target)


@contextlib.contextmanager
def _usable(path: str | os.PathLike[str], passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Errors inside, but those `passed` on, say that the recording at `path` cannot be used."""
    try:
        yield
    except passed:
        raise
    except (ArithmeticError, LookupError, RuntimeError, ValueError, TypeError) as error:
        raise CorruptFile(f"{path} is not a usable recording: {one_line(error).rstrip('.')}.") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidInput(f"No recording at {path}. Give a .npz file, such as tests/golden/gray32.npz.")
    if not zipfile.is_zipfile(path):
        raise CorruptFile(f"{path} is no .npz archive. Give a recording, such as tests/golden/gray32.npz.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError) as error:
        raise CorruptFile(f"{path} is not a readable .npz recording ({one_line(error)}). Copy it again.") from error


def _prepare(recording: dict[str, Any]) -> tuple[GanomalyRecipe, dict[str, torch.nn.Module], Tensor]:
    """The recipe, its networks at their initial weights, and the batches `(steps, n, c, h, w)`."""
    for key, value in recording.items():
        if key.startswith(_NUMBERS) and value.dtype.kind not in "fiu":
            raise ValueError(f"{key} holds {value.dtype} instead of real numbers")
    config = json.loads(str(recording["config"]))
    missing = sorted((_CONFIG | _WEIGHTS) - set(config))
    if missing:
        raise ValueError(f"its config lacks {', '.join(missing)}")
    recipe = GanomalyRecipe(
        features=config["features"],
        latent_dim=config["latent_dim"],
        extra_layers=config["extra_layers"],
        batch_size=config["batch_size"],
        lr=config["lr"],
        betas=tuple(config["betas"]),
        **{name: config[name] for name in sorted(_WEIGHTS)},
    )
    chw = (config["channels"], config["image_size"], config["image_size"])
    networks = recipe.build(chw)
    for short, name in _NETWORKS.items():
        networks[name].load_state_dict(_tensors(recording, f"init/{short}/"))
    batches = torch.from_numpy(recording["batches"])
    _check_shape("batches", batches, (len(batches), config["batch_size"], *chw))
    _check_shape("losses", recording["losses"], (len(batches), len(LOSSES)))
    if not len(batches):
        raise ValueError("it has no step")
    return recipe, networks, batches


def _compare(
    recording: dict[str, Any],
    recipe: GanomalyRecipe,
    networks: dict[str, torch.nn.Module],
    batches: Tensor,
    replay: Replayer,
    device: torch.device,
) -> list[Difference]:
    losses, trained = replay(recipe, networks, batches, device)
    test = torch.from_numpy(recording["test_images"]).to(device)
    scores = {}
    for key, mode in (("test_scores_eval", "running"), ("test_scores_batchstats", "batch")):
        with torch.no_grad(), scoring_mode(trained, mode):
            scores[key] = recipe.score(trained, test).cpu().numpy(), recording[key]
    with torch.no_grad(), scoring_mode(trained, "running"):
        fake, wanted = trained["generator"](test)[0].cpu().numpy(), recording["test_fake_eval"]
    brightest = float(np.abs(wanted).max()) or 1.0  # after few steps they are faint: compare to their scale
    steps = {name: (losses[:, k], recording["losses"][:, k]) for k, name in enumerate(LOSSES)}
    return [
        _difference("losses", steps, 1e-5),
        _difference("scores", scores, 1e-4),
        _difference("reconstructions", {"test_fake_eval": (fake / brightest, wanted / brightest)}, 1e-4, relative=False),
        _difference("weights", _final_pairs(recording, trained), 1e-4, relative=False),
    ]


def _final_pairs(recording: dict[str, Any], trained: Networks) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for short, name in _NETWORKS.items():
        final = _tensors(recording, f"final/{short}/")
        state = {key: value for key, value in trained[name].state_dict().items() if short == "g" or not _is_statistic(key)}
        if short == "d":
            final = {key: value for key, value in final.items() if not _is_statistic(key)}
        if final.keys() != state.keys():
            raise ValueError(f"final/{short}/ lacks or adds {', '.join(sorted(final.keys() ^ state.keys())[:3])}")
        pairs |= {f"final/{short}/{key}": (state[key].cpu().numpy(), final[key].numpy()) for key in final}
    return pairs


def _is_statistic(key: str) -> bool:
    return key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def _tensors(recording: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    found = {
        key.removeprefix(prefix): torch.from_numpy(np.asarray(value))
        for key, value in recording.items()
        if key.startswith(prefix)
    }
    if not found:
        raise ValueError(f"it has no {prefix}… weights")
    return found


def _check_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}, its config says {shape}")


def _difference(
    kind: str, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], tolerance: float, relative: bool = True
) -> Difference:
    """The largest difference over named pairs (ours, recorded); NaN anywhere is the largest of all."""
    largest, where = 0.0, ""
    for name, (ours, recorded) in pairs.items():
        if ours.shape != recorded.shape:
            raise ValueError(f"{name} has shape {recorded.shape}, the replay gives {ours.shape}")
        a, b = ours.astype(np.float64), recorded.astype(np.float64)
        gap = np.abs(a - b)
        if relative:
            size = np.abs(b)  # numbers that all but cancel, as (z - ẑ)² may, are held to a hundredth of the largest
            gap = gap / np.maximum(size, max(0.01 * size.max(initial=0.0), np.finfo(np.float32).tiny))
        worst = float("inf") if not np.isfinite(gap).all() else float(gap.max(initial=0.0))
        if worst > largest or not where:
            largest, where = worst, name
    return Difference(kind, largest, tolerance, relative, where)
