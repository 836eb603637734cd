"""A recipe's networks as one torch module that scores in anomalib's terms: what checkpoints and exports hold."""

from __future__ import annotations

import copy
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.images import to_float
from ganomaly_plugin.recipe import Networks, Recipe
from ganomaly_plugin.training.plain import averaged_networks, make_average
from ganomaly_plugin.training.pre_processing import to_grey
from ganomaly_plugin.training.scoring import scoring_mode


def with_plain_weights(networks: nn.Module) -> nn.Module:
    """`networks`, or a copy whose parametrised weights (spectral normalisation) are the plain tensors that scoring uses."""
    if not any(map(is_parametrized, networks.modules())):
        return networks
    plain = copy.deepcopy(networks).eval()  # in training mode, reading a weight would move the power iteration on
    for module in filter(is_parametrized, list(plain.modules())):
        # Not torch's remove_parametrizations: it takes the weight from the class, which `networks` share with their copy.
        bare = type_before_parametrizations(module)
        parametrised = module._modules.pop("parametrizations")
        weights = {name: parametrised[name]() for name in parametrised}  # type: ignore[index,union-attr]
        module.__class__ = bare
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight.detach()))
    return plain


class RecipeModel(nn.Module):
    """A recipe's networks, and their scores in anomalib's terms.

    Args:
        recipe: The method.
        networks: Its networks.
        chw: What they take: 3 channels, or 1 for which colours are turned grey (anomalib knows images of 3 channels only),
            and the side of the images twice.
    """

    is_whole = True  # whether all is there that training needs, of which `__getstate__` may leave something out

    def __init__(self, recipe: Recipe, networks: dict[str, nn.Module], chw: tuple[int, int, int]) -> None:
        super().__init__()
        self.recipe = recipe
        self.channels, self.size = chw[0], chw[1:]
        self.networks = nn.ModuleDict(networks)
        self.average = make_average(recipe, networks)
        self.has_map = type(recipe).anomaly_map is not Recipe.anomaly_map

    def __getstate__(self) -> dict[str, Any]:
        """The model for scoring alone: an export to torch can pickle neither closures nor spectral normalisation."""
        state = super().__getstate__()
        modules = {"networks": with_plain_weights(self.networks)}
        if self.average is not None:
            average = copy.copy(self.average)
            average.multi_avg_fn = None  # how the average is updated, a closure
            modules["average"] = with_plain_weights(average)
        state["_modules"] = {**state["_modules"], **modules}
        state["is_whole"] = self.is_whole and self.average is None and modules["networks"] is self.networks
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> RecipeModel:
        """All of the model, which can be trained on; without this, what `__getstate__` leaves."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def scoring_networks(self) -> Networks:
        """The networks to score with: the averaged ones when the recipe averages."""
        return averaged_networks(self.average) if self.average is not None else dict(self.networks.items())

    def forward(self, images: Tensor) -> InferenceBatch:
        """Raw scores `(n,)` and, of methods that reconstruct, anomaly maps `(n, h, w)` of images in [-1, 1]."""
        networks = self.scoring_networks()
        if torch.compiler.is_compiling():  # an export, which wants the bare computation
            return self._score(networks, images)
        # Lightning evaluates in inference mode, in which a method that searches by gradient could not.
        with torch.inference_mode(False), torch.no_grad(), scoring_mode(networks, self.recipe.batchnorm):
            return self._score(networks, images.clone())

    def inputs(self, images: Tensor) -> Tensor:
        """Images of anomalib `(b, 3, h, w)` with the channels that the networks take; raises InvalidInput for another size."""
        if not torch.compiler.is_compiling():  # in an export the pre-processor sees to the size
            images = images.as_subclass(Tensor)  # no tv_tensors.Image
            if images.shape[-2:] != self.size:
                name, (h, w), (height, width) = type(self.recipe).__name__, images.shape[-2:], self.size
                raise InvalidInput(
                    f"{name.removesuffix('Recipe')} got images of {h}×{w} and expects {height}×{width}. "
                    "Keep its own pre-processor, or resize in yours."
                )
        return to_grey(images) if self.channels == 1 else images

    def _score(self, networks: Networks, images: Tensor) -> InferenceBatch:
        x = to_float(self.inputs(images), self.recipe.input_range)
        score = self.recipe.score(networks, x)
        return InferenceBatch(pred_score=score, anomaly_map=self.recipe.anomaly_map(networks, x) if self.has_map else None)
