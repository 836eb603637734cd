"""The GANomaly authors' checkpoint files, `netG.pth` and `netD.pth`: read into a detector, and written from one."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ganomaly_plugin.detectors.base import BaseDetector, resolve_device
from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.errors import CorruptFile, InvalidInput, NotFitted
from ganomaly_plugin.files import as_path, atomic_write
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.training.detector import RecipeDetector
from ganomaly_plugin.training.plain import build_networks

_FILES = {"generator": "netG.pth", "discriminator": "netD.pth"}


def load_authors_checkpoint(
    net_g: str | os.PathLike[str], net_d: str | os.PathLike[str] | None = None, *, device: str = "auto", **hparams: Any
) -> RecipeDetector:
    """A fitted GANomaly detector from the authors' weight files; sizes are read off the weights.

    Args:
        net_g: Their `netG.pth`: a dict with `state_dict` (read without unpickling code).
        net_d: Their `netD.pth`. Only the score "feature" needs it; without it the discriminator is an untrained one, and so
            "feature" among the `named_scores` means nothing.
        device: "auto", "cpu", "cuda" or "cuda:N".
        **hparams: Hyperparameters that weights do not tell, such as `batchnorm` or `input_range`.

    Raises:
        InvalidInput: A file is not there, a hyperparameter is given that the weights tell, or `score_by` needs what is in none
            of the files.
        CorruptFile: A file is damaged, or holds no GANomaly weights.
    """
    generator = _read(as_path(net_g))
    sizes = _sizes(generator, as_path(net_g))
    side = sizes.pop("image_size")
    channels = sizes.pop("channels")
    for key in sizes.keys() & hparams.keys():
        raise InvalidInput(f"{key} is told by the weights: {sizes[key]}. Leave it out.")
    if sum(value.numel() for value in generator.values()) < sizes["features"] * sizes["latent_dim"]:
        raise CorruptFile(f"{net_g} holds no GANomaly generator: its weights are too few for the sizes they tell.")
    detector = make_detector("ganomaly", **sizes, **hparams)
    assert isinstance(detector, RecipeDetector) and isinstance(detector.recipe, GanomalyRecipe)
    score_by = detector.recipe.score_by
    if detector.recipe.calibrates:
        raise InvalidInput(
            f"score_by={score_by} is standardised on held-out normal images, and the authors' files hold nothing of it. "
            "Take another score_by, or fit a detector."
        )
    if score_by == "feature" and net_d is None:
        raise InvalidInput("score_by=feature needs the discriminator. Give netD.pth too, or take another score_by.")
    chw = (channels, side, side)
    states: dict[str, Mapping[str, Tensor]] = {"generator": generator}
    if net_d is not None:
        states["discriminator"] = _read(as_path(net_d))
    else:
        states["discriminator"] = build_networks(detector.recipe, chw, seed=0)["discriminator"].state_dict()
    return detector.set_networks(states, chw, resolve_device(device))


def save_authors_checkpoint(detector: BaseDetector, folder: str | os.PathLike[str]) -> None:
    """Write a fitted GANomaly detector as `netG.pth` and `netD.pth` into `folder`, as the authors' code reads them.

    Raises:
        InvalidInput: The detector is not GANomaly, or the folder does not exist or cannot be written.
        NotFitted: The detector has no weights yet.
    """
    # A recipe made from it scores in a way of its own, which the files do not hold.
    if not isinstance(detector, RecipeDetector) or type(detector.recipe) is not GanomalyRecipe:
        given = getattr(detector, "name", None) or type(detector).__name__
        raise InvalidInput(f"Only ganomaly has the authors' checkpoint format, got {given}.")
    if not hasattr(detector, "networks_"):
        raise NotFitted("ganomaly is not fitted; call fit(images) first.")
    target = as_path(folder)
    if not target.is_dir():
        raise InvalidInput(f"No folder at {target}. Create it first.")
    for name, file in _FILES.items():
        state = {key: value.cpu().contiguous() for key, value in detector.networks_[name].state_dict().items()}
        content = io.BytesIO()
        torch.save({"epoch": len(detector.history_), "state_dict": state}, content)
        try:
            atomic_write(target / file, content.getvalue())
        except OSError as error:
            raise InvalidInput(f"Cannot write {target / file}: {error.strerror or error}. Choose another folder.") from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InvalidInput(f"No checkpoint at {path}. Give the path of the authors' netG.pth or netD.pth.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(content["state_dict"])
        if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
            raise TypeError("not all its weights are tensors with a name")
    except Exception as error:  # torch raises many types for a damaged archive
        raise CorruptFile(f"{path} is not a checkpoint of the authors' code ({type(error).__name__}).") from error
    return {key.removeprefix("module."): value for key, value in state.items()}


def _sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """Image size, channels and GanomalyRecipe's size hyperparameters from a generator's weights."""
    encoder = {
        key.removeprefix("encoder1.main."): value.shape for key, value in state.items() if key.startswith("encoder1.main.")
    }
    first = next((shape for key, shape in encoder.items() if key.startswith("initial-conv")), None)
    last = next((shape for key, shape in encoder.items() if key.startswith("final-")), None)
    if first is None or last is None or len(first) != 4 or len(last) != 4:
        raise CorruptFile(f"{path} holds no GANomaly generator: it has no encoder1.main weights.")
    pyramid = sum(bool(re.fullmatch(r"pyramid-\d+-\d+-conv\.weight", key)) for key in encoder)
    extra = sum(bool(re.fullmatch(r"extra-layers-\d+-\d+-conv\.weight", key)) for key in encoder)
    return {
        "image_size": int(last[-1]) * 2 ** (pyramid + 1),
        "channels": int(first[1]),
        "features": int(first[0]),
        "latent_dim": int(last[0]),
        "extra_layers": extra,
    }
