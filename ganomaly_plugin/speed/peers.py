"""Other people's GANomaly, at the same sizes and on the same images: the authors' form, and anomalib's."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from typing import Any

import torch

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.images import to_float
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.seeding import seeded
from ganomaly_plugin.speed.authors import AuthorsStep
from ganomaly_plugin.speed.timing import Samples, Stopwatch, Task, Timing
from ganomaly_plugin.speed.trainers import Prepared, Setting, indices
from ganomaly_plugin.training.plain import resident
from ganomaly_plugin.training.precision import precision

#: Peers, and what tables call them.
PEERS = {"authors": "authors' form", "anomalib": "anomalib Engine"}


def authors(recipe: GanomalyRecipe, setting: Setting) -> Prepared:
    """The step in the authors' form, on the batches that the plain trainer gets."""
    step = AuthorsStep(recipe, setting.chw, setting.device)
    data = resident(setting.images, setting.device)
    order = indices(len(data), recipe.batch_size)

    def train() -> None:
        step(to_float(data[next(order).to(data.device)].to(setting.device)))

    return Prepared(train, images=min(recipe.batch_size, len(setting.images)))


class AnomalibEngine:
    """anomalib's own Ganomaly, trained by its own Engine on images in memory; a `Host`.

    What is timed is the whole loop from one batch's end to the next: Lightning's and anomalib's work, and the loading of
    the batch from memory in the same process, without workers. Images have three channels, since anomalib knows no others.
    Validation is off.
    """

    def __init__(self, recipe: GanomalyRecipe, setting: Setting) -> None:
        self.setting, self.batch_size = setting, min(recipe.batch_size, len(setting.images))
        self.precision = recipe.precision
        sizes = {"n_features": recipe.features, "latent_vec_size": recipe.latent_dim, "extra_layers": recipe.extra_layers}
        self.options = {"image_size": setting.chw[1], "batch_size": self.batch_size, **sizes}

    @property
    def remark(self) -> str | None:
        """What to say of the comparison; None when both train networks of one size."""
        side = self.setting.chw[1]
        if side & (side - 1) == 0:
            return None
        return f"anomalib's Ganomaly has at {side} pixels the network of {1 << side.bit_length()}: more work than GANomaly's"

    def run(self, repeats: int, turn: Task) -> Timing:
        """Time `repeats` turns of the Engine's steps, and call `turn` after each."""
        measure = _callback(self.setting.device, repeats, turn)
        self.fit(measure)
        return measure.samples.timing()

    def steps(self, count: int) -> Any:
        """Set up and train for `count` steps, for counting work; returns the model."""
        return self.fit(limit_train_batches=count, max_epochs=1)

    def fit(self, *callbacks: Any, **limits: Any) -> Any:
        """Run the Engine and return the model; without limits until a callback says stop."""
        detector: Any = make_detector("anomalib:Ganomaly", **self.options)  # imports anomalib, without its remarks
        from ganomaly_plugin.detectors.anomalib_data import ImagesInMemory, make_engine
        from ganomaly_plugin.detectors.anomalib_models import quiet

        with seeded(0), quiet(), tempfile.TemporaryDirectory() as folder, detector.readable_errors(), ExitStack() as training:
            model = detector.build_model()
            budget = {"max_epochs": -1, **limits}
            arithmetic = _at_start(lambda: training.enter_context(precision(self.precision)))
            engine = make_engine(self.setting.device, folder, [arithmetic, *callbacks], min_epochs=0, **budget)
            data: Any = ImagesInMemory(self.setting.images, self.batch_size, drop_last=True)
            engine.fit(model, datamodule=data)
        return model


def _at_start(what: Task) -> Any:
    """A callback that does something when training starts: what Lightning asks of the device at its own start is over then."""
    from lightning.pytorch.callbacks import LambdaCallback

    return LambdaCallback(on_train_start=lambda trainer, module: what())


def _callback(device: torch.device, repeats: int, turn: Task) -> Any:
    from lightning.pytorch import Callback

    class Measure(Callback):
        """Takes the time of bursts of steps, and lets others have their turn in between."""

        def __init__(self) -> None:
            self.samples, self.watch, self.steps = Samples(), Stopwatch(device), 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.watch.start()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.steps += 1
            if self.steps < self.samples.burst:
                return
            counts = self.samples.warm
            self.samples.add(self.watch.stop())
            trainer.should_stop = len(self.samples.seconds) == repeats
            if counts:
                turn()
            self.steps = 0
            self.watch.start()

    return Measure()
