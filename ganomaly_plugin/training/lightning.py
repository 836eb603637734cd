"""Recipes as anomalib modules: `ganomaly_plugin.Ganomaly` and its kin, for anomalib's command line, API and configs.

Every module is made from a recipe; its training step is the plain trainer's, with Lightning's optimisers in it. The data
module decides on the batches. A last batch that is shorter than the others is left out, as everywhere in this package.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import callbacks
from torch import Tensor

from ganomaly_plugin.errors import InvalidInput, check_known, check_seed
from ganomaly_plugin.hparams import checked_hparams, default_hparams
from ganomaly_plugin.recipe import CALIBRATION_LIMIT, Recipe
from ganomaly_plugin.training.plain import (
    PlainTrainer,
    build_networks,
    epoch_means,
    make_optimiser,
    trained_parameters,
)
from ganomaly_plugin.training.pre_processing import GanPreProcessor
from ganomaly_plugin.training.torch_model import RecipeModel
from ganomaly_plugin.training.validation import calibrate

logger = logging.getLogger(__name__)

PRECISION = "32-true"
DEFAULT_SIZE = 32
_UNSET_EPOCHS = 1000  # what Lightning puts for a max_epochs that nobody set
_OWN_KEY = "ganomaly_plugin"
_AVERAGING = getattr(callbacks, "WeightAveraging", ())  # since lightning 2.6
#: Recipe fields that are no init arguments: the data module decides on the batches, Lightning's callbacks on the epoch,
#: its Trainer on the precision.
HIDDEN = ("batch_size", "select", "val_share", "criterion", "patience", "precision")


class RecipeModule(AnomalibModule):
    """An anomalib module around a recipe; `lightning_classes.module_class` makes one for each.

    Args:
        image_size: Side of the images, a multiple of 16.
        channels: 3, or 1 to train on grey images.
        seed: Determines initial weights and random draws, as in `bench run`; None takes them from torch's global state.
        pre_processor, post_processor, evaluator, visualizer: As of any anomalib model.
        **hparams: The recipe's fields.

    Raises:
        InvalidInput: A value is not allowed.
    """

    def __init__(
        self,
        image_size: int = DEFAULT_SIZE,
        channels: int = 3,
        seed: int | None = 0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        **hparams: Any,
    ) -> None:
        if isinstance(image_size, bool) or not isinstance(image_size, (int, Integral)):
            raise InvalidInput(f"image_size must be a whole number of pixels, the side of square images, got {image_size!r}.")
        image_size = int(image_size)
        if channels not in (1, 3):
            raise InvalidInput(f"channels must be 1 (grey) or 3 (colour), got {channels!r}.")
        name = type(self).__name__
        for key in hparams:
            check_known(f"argument of {name}", key, default_hparams(self.recipe_class).keys() - set(HIDDEN))
        recipe = self.recipe_class(**checked_hparams(name, self.recipe_class, hparams))
        chw = (channels, image_size, image_size)
        recipe.check_shape(chw)
        if seed is None:
            seed = int(torch.randint(2**32, (1,)))
        seed = check_seed(seed)
        super().__init__(
            pre_processor=self.configure_pre_processor(chw[1:]) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        given = self.input_size
        if pre_processor not in (True, False) and given is not None and tuple(given) != chw[1:]:
            raise InvalidInput(
                f"The pre-processor makes images of {given[0]}×{given[1]}, but image_size is {image_size}. Make them agree."
            )
        self.hparams.update({k: v for k, v in asdict(recipe).items() if k not in HIDDEN}, seed=seed)  # defaults too
        self.recipe, self.seed = recipe, seed
        self.automatic_optimization = False
        self.model = RecipeModel(recipe, build_networks(recipe, chw, seed), chw)
        self._loop: PlainTrainer | None = None
        self._stage = -1  # none yet
        self._resumed: dict[str, Any] | None = None
        self._seen: list[Tensor] = []
        self._is_calibrated = False  # since the last step
        self._least_steps: int | None = None  # after which to end the fit, where the method's budget is one in steps

    model: RecipeModel

    @property
    @abstractmethod
    def recipe_class(self) -> type[Recipe]:
        """The recipe that the generated class is for."""

    @classmethod
    def __subclasses__(cls) -> list[type]:
        """None: jsonargparse, which looks models up by short names, is to find anomalib's Ganomaly under `Ganomaly`."""
        return []

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Images of `image_size`, 32×32 by default, in [-1, 1]; anomalib's own are normalised for ImageNet, at 256×256."""
        height, width = image_size or (DEFAULT_SIZE, DEFAULT_SIZE)
        if height != width:
            raise InvalidInput(f"Images must be square, got an image_size of {height}×{width}.")
        return GanPreProcessor(height)

    @property
    def learning_type(self) -> LearningType:
        """Trained on normal images only."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check before training: thresholds of untrained networks mean nothing."""
        return {"num_sanity_val_steps": 0}

    def setup(self, stage: str) -> None:
        """Refuse what would train or score something else than the method; an unset budget becomes the method's own."""
        trainer, stages = self.trainer, len(self.recipe.stages)
        if str(trainer.precision) != PRECISION:  # gradients are taken without Lightning's scaler, and scores are of float32
            raise InvalidInput(
                f"{self.name} computes with precision {PRECISION}, got {trainer.precision}. Leave precision out."
            )
        if stage != "fit":
            return
        if not self.model.is_whole:
            raise InvalidInput(
                f"This {self.name} comes from an export or a pickle, which holds what its scores need and not all that its "
                "training needs. Train one from a checkpoint, or anew."
            )
        if trainer.world_size > 1:
            raise InvalidInput(
                f"{self.name} trains on one device, got {trainer.world_size}. Set trainer.devices to 1, and run seeds or "
                "classes side by side instead."
            )
        present = trainer.callbacks  # type: ignore[attr-defined]
        averaging = [type(each).__name__ for each in present if isinstance(each, _AVERAGING)]
        if averaging and self.recipe.calibrates:
            raise InvalidInput(
                f"{self.name} calibrates its scores on the weights in training, which {averaging[0]} exchanges afterwards. "
                "Leave that callback out."
            )
        self._least_steps = None
        if trainer.max_epochs == _UNSET_EPOCHS:
            self._least_steps = self.recipe.default_steps if stages == 1 else None
            if self._least_steps is None:
                trainer.fit_loop.max_epochs = self.recipe.default_epochs * stages
                budget = f"published {trainer.max_epochs} epochs"
            else:
                trainer.fit_loop.max_epochs = self._least_steps  # an epoch has a step at least
                budget = f"method's {self._least_steps} steps, in whole epochs"
            said = "max_epochs is %d, as where none is set: training for the %s. Ask for %d if you mean as many."
            logger.warning(said, _UNSET_EPOCHS, budget, _UNSET_EPOCHS + 1)
        if stages > 1 and (trainer.max_epochs or 0) < stages:
            raise InvalidInput(
                f"{self.name} trains in {stages} stages that share the epochs: set trainer.max_epochs to at least {stages}, "
                f"got {trainer.max_epochs}."
            )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimiser a phase, of all stages in turn."""
        networks = dict(self.model.networks.items())
        self._loop = PlainTrainer(self.recipe, networks, seed=self.seed, device=self.device, average=self.model.average)
        return [
            make_optimiser(phase.optimiser, trained_parameters(phase, networks))
            for stage in self.recipe.stages
            for phase in stage.phases
        ]

    def on_train_epoch_start(self) -> None:
        """Begin the stage that the epoch belongs to: they share the epochs evenly."""
        loop = self._training()
        stages = self.recipe.stages
        epochs = max(int(self.trainer.max_epochs or 0), 1)
        index = min(self.current_epoch * len(stages) // epochs, len(stages) - 1) if len(stages) > 1 else 0
        if self._stage != index:
            self._stage = index
            first = sum(len(stage.phases) for stage in stages[:index])
            optimisers = self.optimizers(use_pl_optimizer=True)
            optimisers = optimisers if isinstance(optimisers, list) else [optimisers]
            loop.begin(stages[index], optimisers[first : first + len(stages[index].phases)])
        if self._resumed is not None:
            before = self._resumed["max_epochs"]
            if len(stages) > 1 and before not in (None, epochs):
                raise InvalidInput(
                    f"{self.name} shares max_epochs among its {len(stages)} stages: the checkpoint's training had {before}, "
                    f"this one has {epochs}. Set max_epochs to {before}, or train anew."
                )
            loop.steps, loop.stage_steps = self._resumed["steps"], self._resumed["stage_steps"]
            loop.draws.set_state(self._resumed["draws"])
            loop.redraws.set_state(self._resumed["redraws"])
            self._resumed = None
        self._losses: list[dict[str, Tensor]] = []
        self._seen = []

    def on_fit_start(self) -> None:
        """Check that the optimisers are ours, and forget what an earlier fit was at."""
        self._stage = -1
        if self._loop is None:
            raise InvalidInput(f"{self.name} brings its own optimisers. Leave optimizer and lr_scheduler out; set lr instead.")
        if not self.trainer.ckpt_path:
            self._resumed = None

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor] | None:
        """One step of the plain trainer; returns its losses."""
        if self._stage < 0:  # no epoch was begun
            raise InvalidInput(
                f"{self.name} goes on from the end of an epoch, and the checkpoint is of the middle of one. Take one that was "
                "saved after an epoch, as ModelCheckpoint does with every_n_epochs."
            )
        images = self.model.inputs(batch.image)  # type: ignore[arg-type]
        if batch_idx == 0:
            self._full_batch = len(images)
        elif len(images) < self._full_batch:
            return None
        if self.recipe.calibrates and sum(map(len, self._seen)) < CALIBRATION_LIMIT:
            self._seen.append(images.detach().cpu())
        losses = self._training().step(images)
        self._is_calibrated = False
        self._losses.append(losses)
        return dict(losses)

    def on_validation_start(self) -> None:
        """Calibrate before scores are looked at."""
        self._calibrate()

    def on_train_end(self) -> None:
        """Calibrate the scores of the trained networks, for methods that do, and say so when a stage was never reached."""
        self._calibrate()
        missed = [stage.name for stage in self.recipe.stages[self._stage + 1 :]]
        if missed and self._stage >= 0:
            logger.warning("%s stopped before the stage %s: its scores mean nothing yet.", self.name, ", ".join(missed))

    def _calibrate(self) -> None:
        """On images of the last epoch, which were trained on: Lightning's data module decides what is held out."""
        if self.recipe.calibrates and self._seen and not self._is_calibrated:
            networks, images = self.model.scoring_networks(), torch.cat(self._seen)
            with torch.inference_mode(False):
                calibrate(self.recipe, networks, images, None, seed=self.seed, device=self.device)
            self._is_calibrated = True

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean losses, and end a fit whose steps are done; raises Diverged when a loss is not finite."""
        loop = self._training()
        means = epoch_means(self._losses, self.recipe.stages[self._stage], first_step=loop.steps - len(self._losses) + 1)
        self.log_dict({f"{name}_loss": value for name, value in means.items()}, prog_bar=True)
        if self._least_steps is not None and loop.steps >= self._least_steps:
            self.trainer.should_stop = True

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:  # type: ignore[override]
        """Score a batch; the post-processor takes its thresholds from these."""
        return batch.update(**self.model(batch.image)._asdict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store, as plain values, whose checkpoint it is and where the random draws stand; calibrate if nothing has yet."""
        self._calibrate()  # in place, and the checkpoint's state holds the same tensors
        super().on_save_checkpoint(checkpoint)
        own: dict[str, Any] = {"model": self.name}
        if self._loop is not None:
            own |= {"steps": self._loop.steps, "stage_steps": self._loop.stage_steps}
            own |= {"max_epochs": self.trainer.max_epochs}
            own |= {"draws": self._loop.draws.get_state(), "redraws": self._loop.redraws.get_state()}
        checkpoint[_OWN_KEY] = own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise InvalidInput for a checkpoint of another model or of other networks; say which other settings differ."""
        super().on_load_checkpoint(checkpoint)
        own = checkpoint.get(_OWN_KEY, {})
        found = own.get("model", "a model of another package")
        if found != self.name:
            raise InvalidInput(f"The checkpoint holds {found}, not {self.name}. Give the model it was trained as.")
        saved, mine = dict(checkpoint.get("hyper_parameters", {})), dict(self.hparams)
        settings = [k for k in ("image_size", "channels", *asdict(self.recipe)) if k in saved and k in mine]
        differ = ", ".join(f"{k}={saved[k]!r} instead of {mine[k]!r}" for k in settings if saved[k] != mine[k])
        states = checkpoint["state_dict"], self.state_dict()
        theirs, ours = ({k: v.shape for k, v in state.items() if k.startswith("model.")} for state in states)
        if theirs != ours:
            raise InvalidInput(f"The checkpoint's {self.name} has {differ or 'other networks'}. Set the same values.")
        if differ:  # its thresholds may be of another score
            logger.warning("The checkpoint's %s has %s. Set the same values, unless that is meant.", self.name, differ)
        kept = ("steps", "stage_steps", "max_epochs", "draws", "redraws")
        self._resumed = {key: own.get(key) for key in kept} if "draws" in own else None

    def to_onnx(  # type: ignore[override]
        self, export_root: Path | str, model_file_name: str = "model", input_size: tuple[int, int] | None = None, **kwargs: Any
    ) -> Path:
        """Export to ONNX (and on the way to OpenVINO); the batch size stays free.

        Raises:
            InvalidInput: The scores are no function that ONNX can hold.
        """
        if not self.recipe.exportable:
            raise InvalidInput(f"{self.name} scores by a search with gradients, which ONNX and OpenVINO lack. Export to torch.")
        if self.recipe.batchnorm == "batch":
            raise InvalidInput('Scores with batchnorm="batch" depend on their batch; only batchnorm="running" can be exported.')
        kwargs.setdefault("opset_version", 18)  # what the exporter writes; a conversion to anomalib's 14 fails, loudly
        return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the optimisers out of an export to torch."""
        parent = super()
        state = parent.__getstate__() if hasattr(parent, "__getstate__") else self.__dict__
        return {**state, "_loop": None, "_seen": []}  # type: ignore[dict-item]

    def _training(self) -> PlainTrainer:
        if self._loop is None:
            raise InvalidInput(f"{self.name} is not in training. Call Engine.fit.")
        return self._loop
