"""Networks drawn anew in training, when their loss says that they have collapsed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ganomaly_plugin.recipe import Networks, Phase, Recipe
from ganomaly_plugin.seeding import torch_seeded
from ganomaly_plugin.training.convolutions import in_order


def drawn_anew(recipe: Recipe, phase: Phase, networks: Networks, rng: torch.Generator) -> dict[str, Tensor]:
    """The weights that the recipe's `redraw` sets, of the networks that `phase` trains, by "<network>.<weight>".

    They are drawn on the CPU and in the usual order in memory, so that every device and layout gets the same, with the next
    seed of `rng`; `networks` are left as they are.
    """
    seed = int(torch.randint(2**62, (1,), generator=rng))
    drawn: dict[str, Tensor] = {}
    with torch_seeded(seed), torch.no_grad():
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
_BLOCK = 2048  # numbers that a program copies at once
_PROGRAMS = 1024  # of all models, at most: nearly always they have nothing to do, and more of them would only take longer


@torch.library.custom_op(
    "ganomaly_plugin::renew",
    mutates_args=("weights",),
    schema="(Tensor(a!) weights, Tensor spares, Tensor spent, Tensor below) -> ()",
)
def renew(weights: Tensor, spares: Tensor, spent: Tensor, below: Tensor) -> None:
    """Overwrite the `weights` `(m, k)` of models that are `below` `(m,)` by those of `spares` `(READY · m, k)` that follow.

    All are contiguous. A model that has not collapsed costs no more than a look at `below`. This is an operation of torch so
    that whoever watches operations, or fakes tensors, sees it.
    """
    from ganomaly_plugin.training import redraw_kernels

    models, numbers = weights.shape
    grid = min(-(-numbers // _BLOCK), -(-_PROGRAMS // models)), models
    with torch.cuda.device_of(weights):
        constants, options = (len(spares) // models, _BLOCK), {"num_warps": 4, "enable_fp_fusion": True}
        redraw_kernels.renew[grid](weights, spares, spent, below, numbers, *constants, **options)


def _in_order(spares: Tensor) -> Tensor:
    """Spare weights `(READY, m, ...)` in the order in memory of the stacked weights `(m, ...)`."""
    return in_order(spares.flatten(0, 1)).unflatten(0, spares.shape[:2])


def _runs(weights: Tensor) -> Tensor:
    """Weights `(m, ...)` that are `in_order`, each model's as they lie in memory: `(m, k)`, a view."""
    return (weights.permute(0, 1, 3, 4, 2) if weights.ndim == 5 else weights).view(len(weights), -1)


class Spares:
    """Weights that lie ready on the device for models that collapse, so that no step waits to learn whether one does.

    Args:
        networks: Any model's; they are copied.
        rngs: One a model.
        by_kernels: Whether they are given by a kernel of our own, which reads and writes the weights of collapsed models only.
    """

    def __init__(
        self,
        recipe: Recipe,
        phase: Phase,
        networks: Networks,
        rngs: Sequence[torch.Generator],
        device: torch.device,
        *,
        by_kernels: bool = False,
    ) -> None:
        self._recipe, self._phase, self._rngs, self._by_kernels = recipe, phase, list(rngs), by_kernels
        self._blank = {name: copy.deepcopy(networks[name]).cpu() for name in phase.trains}
        drawn = [self._draw(model) for _ in range(READY) for model in range(len(rngs))]
        self.weights = {
            name: _in_order(torch.stack([one[name] for one in drawn]).to(device).unflatten(0, (READY, len(rngs))))
            for name in drawn[0]
        }
        self.spent = torch.zeros(len(rngs), dtype=torch.int64, device=device)

    def _draw(self, model: int) -> dict[str, Tensor]:
        return drawn_anew(self._recipe, self._phase, self._blank, self._rngs[model])

    def give(self, weights: dict[str, Tensor], below: Tensor) -> None:
        """Overwrite the stacked `weights` of the models that are `below` `(m,)`, in place."""
        with torch.no_grad():
            if self._by_kernels:
                for name, spare in self.weights.items():
                    renew(_runs(weights[name]), _runs(spare.flatten(0, 1)), self.spent, below)
            else:
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
        self.weights = {name: _in_order(spare[:, index]) for name, spare in self.weights.items()}
