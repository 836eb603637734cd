"""A recipe and a trainer make a detector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.detectors.base import BaseDetector
from ganomaly_plugin.errors import CorruptFile
from ganomaly_plugin.images import to_float
from ganomaly_plugin.recipe import Networks, Recipe
from ganomaly_plugin.training.plain import PlainTrainer, resident, to_device, train

SCORE_CHUNK = 256  # images scored at once when a score does not depend on its batch


class RecipeDetector(BaseDetector):
    """The detector of one recipe.

    Args:
        recipe: The method, with its hyperparameters.

    After `fit`: `networks_` (by name), `history_` (mean losses of each epoch), `device_`.
    """

    has_epochs: ClassVar[bool] = True

    networks_: Networks

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.has_anomaly_map = type(recipe).anomaly_map is not Recipe.anomaly_map  # type: ignore[misc]
        self.conformance_exemptions = recipe.conformance_exemptions  # type: ignore[misc]
        self.conformance_epochs = recipe.conformance_epochs  # type: ignore[misc]
        self.conformance_shape = recipe.conformance_shape  # type: ignore[misc]

    @property
    def hparams(self) -> dict[str, Any]:
        """The recipe's fields; tuples as lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.recipe).items()}

    @property
    def default_epochs(self) -> int:
        """The method's published budget."""
        return self.recipe.default_epochs

    def check_shape(self, chw: tuple[int, int, int]) -> None:
        """Raise InvalidInput when the recipe's networks cannot be built for images of `(c, h, w)`."""
        self.recipe.check_shape(chw)

    def _fit(self, images: Tensor, *, seed: int, epochs: int | None, device: torch.device, on_epoch: OnEpoch | None) -> None:
        self.device_ = device
        self.history_: list[dict[str, float]] = []

        def after_epoch(epoch: int, trainer: PlainTrainer, losses: dict[str, float]) -> None:
            self.history_.append(losses)
            self.networks_ = trainer.scoring_networks()
            self.steps_ = trainer.steps
            if on_epoch is not None:
                on_epoch(epoch, self)

        train(
            self.recipe,
            images,
            seed=seed,
            epochs=self.default_epochs if epochs is None else epochs,
            device=device,
            after_epoch=after_epoch,
        )

    def _score(self, images: Tensor) -> Tensor:
        return self._in_chunks(images, self.recipe.score).double()

    def _anomaly_map(self, images: Tensor) -> Tensor:
        return self._in_chunks(images, self.recipe.anomaly_map)

    def _in_chunks(self, images: Tensor, function: Any) -> Tensor:
        size = self.recipe.batch_size if self.recipe.batchnorm == "batch" else SCORE_CHUNK
        data = resident(images, self.device_)
        with torch.no_grad(), scoring_mode(self.networks_, self.recipe.batchnorm):
            parts = []
            for part in data.split(size):
                x = to_float(part.to(self.device_), self.recipe.input_range)
                parts.append(function(self.networks_, x.contiguous(memory_format=torch.channels_last)))
        return torch.cat(parts).cpu()

    def describe(self) -> dict[str, Any]:
        """Number of trained parameters, in all and of each network; training steps; the trainer."""
        sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in self.networks_.items()}
        return {"parameters": sum(sizes.values()), "parameters_by_network": sizes, "steps": self.steps_, "trainer": "plain"}

    def _state(self) -> dict[str, Any]:
        networks = {
            name: {k: v.cpu().contiguous() for k, v in net.state_dict().items()} for name, net in self.networks_.items()
        }
        return {"networks": networks, "history": self.history_, "steps": self.steps_}

    def _load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.set_networks(state["networks"], self.image_shape_, device)
        self.history_, self.steps_ = state["history"], int(state["steps"])

    def set_networks(
        self, states: Mapping[str, Mapping[str, Tensor]], chw: tuple[int, int, int], device: torch.device
    ) -> RecipeDetector:
        """Take trained weights instead of fitting: a `state_dict` for each network name, for images of `(c, h, w)`."""
        networks = self.recipe.build(chw)
        for name, network in networks.items():
            try:
                network.load_state_dict(states[name])
            except (KeyError, RuntimeError) as error:
                raise CorruptFile(f"The weights do not fit network {name!r} of {self.name}: {error}.") from error
        self.networks_ = {name: to_device(net, device) for name, net in networks.items()}
        self.image_shape_, self.device_, self.history_, self.steps_ = chw, device, [], 0
        return self


@contextmanager
def scoring_mode(networks: Networks, batchnorm: str) -> Iterator[None]:
    """Evaluation mode; with `batchnorm="batch"` BatchNorm uses, but does not remember, the batch's statistics."""
    norms = [m for net in networks.values() for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for network in networks.values():
        network.eval()
    if batchnorm == "running":
        yield
        return
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()
            norm.track_running_stats = True
