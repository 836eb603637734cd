"""Networks drawn anew in training, when their loss says that they have collapsed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ganomaly_plugin.recipe import Networks, Phase, Recipe


def drawn_anew(recipe: Recipe, phase: Phase, networks: Networks, rng: torch.Generator) -> dict[str, Tensor]:
    """The weights that the recipe's `redraw` sets, of the networks that `phase` trains, by "<network>.<weight>".

    They are drawn on the CPU and in the usual order in memory, so that every device and layout gets the same, with the next
    seed of `rng`; `networks` are left as they are.
    """
    seed = int(torch.randint(2**62, (1,), generator=rng))
    drawn: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name in phase.trains:
            network = copy.deepcopy(networks[name]).cpu().to(memory_format=torch.contiguous_format)
            for weight in network.parameters():
                weight.view(-1)[0] = torch.nan
            recipe.redraw(network)
            for own, weight in network.named_parameters():
                if not weight.view(-1)[0].isnan():  # else it is none of those that are drawn anew
                    drawn[f"{name}.{own}"] = weight.detach()
    return drawn


READY = 4  # sets of weights for each model; a model that uses all of them up gets the last one again


class Spares:
    """Weights that lie ready on the device for models that collapse, so that no step waits to learn whether one does.

    Args:
        networks: Any model's; they are copied.
        rngs: One a model.
    """

    def __init__(
        self, recipe: Recipe, phase: Phase, networks: Networks, rngs: Sequence[torch.Generator], device: torch.device
    ) -> None:
        self._recipe, self._phase, self._rngs = recipe, phase, list(rngs)
        self._blank = {name: copy.deepcopy(networks[name]).cpu() for name in phase.trains}
        drawn = [self._draw(model) for _ in range(READY) for model in range(len(rngs))]
        self.weights = {
            name: torch.stack([one[name] for one in drawn]).unflatten(0, (READY, len(rngs))).to(device) for name in drawn[0]
        }
        self.spent = torch.zeros(len(rngs), dtype=torch.int64, device=device)

    def _draw(self, model: int) -> dict[str, Tensor]:
        return drawn_anew(self._recipe, self._phase, self._blank, self._rngs[model])

    def give(self, weights: dict[str, Tensor], below: Tensor) -> None:
        """Overwrite the stacked `weights` of the models that are `below` `(m,)`, in place."""
        with torch.no_grad():
            following = self.spent.clamp(max=READY - 1), torch.arange(len(below), device=below.device)
            for name, spare in self.weights.items():
                weight = weights[name]
                torch.where(below.view(-1, *(1,) * (weight.ndim - 1)), spare[following], weight, out=weight)
            self.spent += below

    def refill(self) -> None:
        """Draw new ones in the place of those that were used up. Waits for the device."""
        for model, spent in enumerate(self.spent.tolist()):
            for _ in range(spent):
                for name, value in self._draw(model).items():
                    mine = self.weights[name][:, model]
                    mine.copy_(torch.cat([mine[1:], value.to(mine.device)[None]]))
        self.spent.zero_()

    def keep(self, models: Sequence[int]) -> None:
        """Go on with these models only."""
        self._rngs = [self._rngs[model] for model in models]
        index = torch.tensor(models, device=self.spent.device)
        self.spent = self.spent[index]
        self.weights = {name: spare[:, index] for name, spare in self.weights.items()}
