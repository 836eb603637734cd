"""A recipe and a trainer make a detector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import shorten
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ganomaly_plugin.core import OnEpoch
from ganomaly_plugin.detectors.base import BaseDetector
from ganomaly_plugin.errors import CorruptFile
from ganomaly_plugin.recipe import Networks, Recipe, recipe_hparams
from ganomaly_plugin.training.fitting import Fitting
from ganomaly_plugin.training.plain import PlainTrainer, build_networks, to_device, train
from ganomaly_plugin.training.scoring import in_chunks
from ganomaly_plugin.training.validation import check_choice


class RecipeDetector(BaseDetector):
    """The detector of one recipe.

    Args:
        recipe: The method, with its hyperparameters.

    After `fit`: `networks_` (by name), `history_` (mean losses of each epoch), `device_`.
    """

    has_epochs: ClassVar[bool] = True
    has_steps: ClassVar[bool] = True

    networks_: Networks
    device_: torch.device
    history_: list[dict[str, float]]
    steps_: int
    facts_: dict[str, Any]

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.compiled = False  # whether `fit` calls the networks through torch.compile
        self.has_anomaly_map = type(recipe).anomaly_map is not Recipe.anomaly_map  # type: ignore[misc]
        self.has_reconstruction = type(recipe).reconstruct is not Recipe.reconstruct  # type: ignore[misc]
        self.conformance_exemptions = recipe.conformance_exemptions  # type: ignore[misc]
        self.conformance_epochs = recipe.conformance_epochs  # type: ignore[misc]
        self.conformance_shape = recipe.conformance_shape  # type: ignore[misc]

    @property
    def hparams(self) -> dict[str, Any]:
        """The recipe's fields; tuples as lists. Late-coming fields are left out while they have their defaults."""
        return recipe_hparams(self.recipe)

    @property
    def _made_from(self) -> type[Recipe]:
        """The recipe's class."""
        return type(self.recipe)

    @property
    def default_epochs(self) -> int:
        """The method's published budget."""
        return self.recipe.default_epochs

    def budget(self, epochs: int | None, steps: int | None) -> tuple[int, int | None]:
        """The epochs, or the steps, to train for: the method's published ones where neither is given."""
        if epochs is None and steps is None:
            steps = self.recipe.default_steps
        return (self.default_epochs if epochs is None else epochs), steps

    def check_shape(self, chw: tuple[int, int, int]) -> None:
        """Raise InvalidInput when the recipe's networks cannot be built for images of `(c, h, w)`, or no epoch be chosen."""
        self.recipe.check_shape(chw)
        check_choice(self.recipe, chw)

    def _fit(
        self,
        images: Tensor,
        *,
        seed: int,
        epochs: int | None,
        device: torch.device,
        on_epoch: OnEpoch | None,
        steps: int | None = None,
    ) -> None:
        epochs, steps = self.budget(epochs, steps)
        fitting = Fitting(self, images, seed=seed, device=device, on_epoch=on_epoch)

        def after_epoch(epoch: int, trainer: PlainTrainer, losses: dict[str, float]) -> bool:
            return fitting.after_epoch(epoch, trainer.scoring_networks(), trainer.steps, losses)

        train(
            self.recipe,
            fitting.images,
            seed=seed,
            epochs=epochs,
            steps=steps,
            device=device,
            compiled=self.compiled,
            after_epoch=after_epoch,
        )
        fitting.finish("compiled" if self.compiled else "plain")

    def _score(self, images: Tensor) -> Tensor:
        return self._in_chunks(images, self.recipe.score).double()

    def _anomaly_map(self, images: Tensor) -> Tensor:
        return self._in_chunks(images, self.recipe.anomaly_map)

    def _in_chunks(self, images: Tensor, function: Callable[[Networks, Tensor], Tensor]) -> Tensor:
        return in_chunks(self.recipe, self.networks_, images, function, self.device_)

    def named_scores(self, images: Any) -> dict[str, np.ndarray]:
        """Every score that the method offers, by name: float64 `(n,)` each; {} for a method with one score only."""
        names = self.recipe.score_names
        if not names:
            return {}

        def stacked(networks: Networks, chunk: Tensor) -> Tensor:
            scores = self.recipe.scores(networks, chunk)
            return torch.stack([scores[name] for name in names], 1)

        found = self._in_chunks(self._check(images), stacked)
        return {name: column.double().numpy() for name, column in zip(names, found.unbind(1), strict=True)}

    def _reconstruct(self, images: Tensor) -> Tensor:
        low, high = self.recipe.input_range
        return 2 * (self._in_chunks(images, self.recipe.reconstruct) - low) / (high - low) - 1

    def describe(self) -> dict[str, Any]:
        """Number of trained parameters, in all and of each network; training steps and images seen; the trainer."""
        sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in self.networks_.items()}
        facts = {"parameters": sum(sizes.values()), "parameters_by_network": sizes, "steps": self.steps_}
        return facts | self.facts_

    def _state(self) -> dict[str, Any]:
        networks = {
            name: {k: v.cpu().contiguous() for k, v in net.state_dict().items()} for name, net in self.networks_.items()
        }
        return {"networks": networks, "history": self.history_, "steps": self.steps_, "facts": self.facts_}

    def _load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.set_networks(state["networks"], self.image_shape_, device)
        self.history_, self.steps_, self.facts_ = state["history"], int(state["steps"]), state.get("facts", {})

    def set_networks(
        self, states: Mapping[str, Mapping[str, Tensor]], chw: tuple[int, int, int], device: torch.device
    ) -> RecipeDetector:
        """Take trained weights instead of fitting: a `state_dict` for each network name, for images of `(c, h, w)`."""
        networks = build_networks(self.recipe, chw, seed=0)  # leaves torch's own generator alone
        for name, network in networks.items():
            try:
                network.load_state_dict(states[name])
            except (KeyError, RuntimeError) as error:
                raise CorruptFile(
                    f"The weights do not fit network {name!r} of {self.name}: they are of other hyperparameters or of another "
                    f"version. Load them with that one, or train anew ({shorten(str(error), 200, placeholder=' …')})."
                ) from error
        self.networks_ = {name: to_device(net, device) for name, net in networks.items()}
        self.image_shape_, self.device_, self.history_, self.steps_ = chw, device, [], 0
        self.facts_ = {}
        return self
