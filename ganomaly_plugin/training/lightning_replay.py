"""Given batches through anomalib's Engine: how the Lightning modules are held to the plain trainer and the recordings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ganomaly_plugin.detectors.anomalib_data import make_engine
from ganomaly_plugin.detectors.anomalib_models import quiet
from ganomaly_plugin.recipe import Networks, Recipe
from ganomaly_plugin.training.lightning import HIDDEN, RecipeModule
from ganomaly_plugin.training.lightning_classes import module_class


class _Losses(Callback):
    """Keeps the losses of every training step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:
            self.steps.append({name: value for name, value in outputs.items() if name != "loss"})


def fit_batches(
    module: RecipeModule, batches: Iterable[Tensor], device: torch.device, *, epochs: int = 1, **trainer: Any
) -> list[dict[str, Tensor]]:
    """Train `module` on `batches`, each `(b, c, h, w)` in [-1, 1], through anomalib's Engine; returns each step's losses.

    Args:
        module: Without a pre-processor.
        batches: Those of one epoch.
        device: Where.
        epochs: How often to go through the batches.
        **trainer: More arguments of Lightning's trainer.
    """
    items = [ImageBatch(image=batch.expand(-1, 3, -1, -1)) for batch in batches]  # anomalib knows 3 channels only
    loader: Any = DataLoader(items, batch_size=None, collate_fn=_same)  # type: ignore[arg-type]
    losses = _Losses()
    with quiet(), tempfile.TemporaryDirectory() as folder:
        make_engine(device, folder, [losses], max_epochs=epochs, **trainer).fit(module, train_dataloaders=loader)
    return losses.steps


def _same(batch: ImageBatch) -> ImageBatch:
    return batch


def replay(
    recipe: Recipe, networks: Networks, batches: Tensor, device: torch.device
) -> tuple[list[dict[str, Tensor]], Networks]:
    """Train from the weights in `networks` on `batches` `(steps, b, c, h, w)`: each step's losses, the trained networks."""
    channels, side = batches.shape[2:4]
    hparams = {name: value for name, value in asdict(recipe).items() if name not in HIDDEN}
    module = module_class(type(recipe))(image_size=side, channels=channels, pre_processor=False, visualizer=False, **hparams)
    module.model.networks.load_state_dict(nn.ModuleDict(dict(networks)).state_dict())
    losses = fit_batches(module, batches, device)
    return losses, {name: network.to(device) for name, network in module.model.networks.items()}
