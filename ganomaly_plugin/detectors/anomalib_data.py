"""Images in memory as a data module, and a callback after each epoch: what anomalib's Engine needs of us."""

from __future__ import annotations

from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.detectors.anomalib_models import AnomalibDetector, as_photographs


class ImagesInMemory(LightningDataModule):
    """Normal training images; models that look at validation images see the same ones.

    Args:
        images: Checked images `(n, c, h, w)`.
        batch_size: Images in a training step; a last shorter batch is trained on, as in anomalib, unless `drop_last`.
    """

    name = "images"
    category = ""

    def __init__(self, images: Tensor, batch_size: int, *, drop_last: bool = False) -> None:
        super().__init__()
        self.images, self.drop_last = images, drop_last
        self.train_batch_size = self.eval_batch_size = batch_size

    def train_dataloader(self) -> Any:
        """Shuffled batches."""
        return self._loader(shuffle=True)

    def val_dataloader(self) -> Any:
        """The training images in order."""
        return self._loader(shuffle=False)

    def _loader(self, *, shuffle: bool) -> Any:
        rows: Any = range(len(self.images))
        cut = shuffle and self.drop_last
        return DataLoader(rows, self.train_batch_size, shuffle, num_workers=0, collate_fn=self._batch, drop_last=cut)

    def _batch(self, rows: list[int]) -> ImageBatch:
        images = as_photographs(self.images[torch.tensor(rows)])
        return ImageBatch(image=images, gt_label=torch.zeros(len(rows), dtype=torch.long))


def make_engine(device: torch.device, folder: str, callbacks: list[Callback], **options: Any) -> Any:
    """Anomalib's Engine on `device`, writing into `folder`, without validation or output; `options` are the Trainer's."""
    place = {"accelerator": "cpu"} if device.type == "cpu" else {"accelerator": "gpu", "devices": [device.index or 0]}
    return Engine(
        callbacks=callbacks,
        default_root_dir=folder,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **place,
        **options,
    )


class AfterEpoch(Callback):
    """Keeps the losses that the model logs, and lets the runner score after each epoch."""

    def __init__(self, detector: AnomalibDetector, on_epoch: OnEpoch | None) -> None:
        self.detector, self.on_epoch = detector, on_epoch
        self.error: Exception | None = None  # what `on_epoch` raised

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the losses, call the runner, and go on training."""
        metrics = {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        forms = {f"{name}{end}" for name in metrics for end in ("_step", "_epoch")}  # Lightning logs a mean under two names
        self.detector.history_.append({name: float(value) for name, value in metrics.items() if name not in forms})
        if self.on_epoch is not None:
            modes = [(module, module.training) for module in pl_module.modules()]  # some are kept frozen, in evaluation mode
            try:
                self.on_epoch(trainer.current_epoch + 1, self.detector)
            except Exception as error:
                self.error = error
                raise
            for module, training in modes:
                module.training = training
