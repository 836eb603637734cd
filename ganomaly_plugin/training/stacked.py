"""The stacked trainer: many models of one recipe advance together, as one set of large kernels.

Weights, buffers and optimiser moments of all models lie in tensors with a leading model axis. A phase's loss, written for one
model, is mapped over that axis; the gradient of the sum of the losses is each model's own gradient, and one Adam over the
stacked weights is many Adams. What a model computes depends on no other: one that diverges leaves the rest untouched.

The work of a step changes tensors in place and asks the device nothing, so that it can be recorded and replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves, tree_map_only

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.images import to_float
from ganomaly_plugin.recipe import Networks, Phase, Precision, Recipe, StepInput, Tensors
from ganomaly_plugin.training.captured import Record, Replayed
from ganomaly_plugin.training.convolutions import Convolutions, in_order, layers_of_all
from ganomaly_plugin.training.joined import joined
from ganomaly_plugin.training.plain import make_optimiser, set_gradients, to_device, warmed_average
from ganomaly_plugin.training.precision import networks_in, precision
from ganomaly_plugin.training.redraw import Spares


def why_not_stackable(recipe: Recipe) -> str | None:
    """Why models of `recipe` cannot be trained together; None when they can."""
    if len(recipe.stages) > 1:
        return f"it trains in {len(recipe.stages)} stages"
    if any(phase.every > 1 for phase in recipe.stages[0].phases):
        return "some of its phases do not run at each step"
    return recipe.unstackable


def check_stackable(recipe: Recipe) -> None:
    """Raise InvalidInput when models of `recipe` cannot be trained together."""
    reason = why_not_stackable(recipe)
    if reason is not None:
        raise InvalidInput(f"Models of {type(recipe).__name__} cannot be stacked: {reason}. Use the plain trainer.")


class _Networks(nn.Module):
    """A recipe's networks as one module, so that the weights of all of them can be exchanged at once."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(dict(networks))

    def forward(self, phase: Phase, step: StepInput, precision: Precision) -> tuple[Tensor, dict[str, Tensor]]:
        called = networks_in(precision, {str(name): network for name, network in self.networks.items()})
        before = dict(self.named_buffers())
        computed = phase.loss(called, step)
        for name, buffer in self.named_buffers():
            if name not in before:
                raise InvalidInput(f"the buffer {name} is made in training, and a stack has to know it before")
            if buffer is not before[name]:  # by assignment, which does not outlast this call
                before[name].copy_(buffer.detach())
        return computed


def _held_beside(networks: nn.Module) -> list[tuple[str, Any]]:
    """Tensors and numbers that modules hold beside weights and buffers, those of modules in lists included, and where."""
    found: list[tuple[str, Any]] = []
    hidden: dict[nn.Module, str] = {}  # modules that no module has registered
    waiting = list(networks.modules())
    registered = set(waiting)
    for module in waiting:  # which grows
        own = ("_parameters", "_buffers", "_modules") if module in registered else ()
        for name, value in vars(module).items():
            where = hidden.get(module, f"{type(module).__name__}.{name}")
            for leaf in tree_leaves(value) if name not in own else ():
                if isinstance(leaf, nn.Module) and leaf not in registered and leaf not in hidden:
                    hidden[leaf] = where
                    waiting.append(leaf)
                elif isinstance(leaf, (Tensor, np.ndarray, Number)):
                    found.append((where, leaf))
    return found


def _check_alike(models: Sequence[nn.Module]) -> None:
    """Raise InvalidInput when models differ by more than weights and buffers: of all else a stack has the first one's."""
    first, *others = (_held_beside(model) for model in models)
    for theirs in others:
        for (name, mine), (_, other) in zip(first, theirs, strict=False):
            same = torch.equal if isinstance(mine, Tensor) and isinstance(other, Tensor) else np.array_equal
            if not same(mine, other):
                raise InvalidInput(f"{name} differs from model to model, and is not kept as a parameter or buffer")


class StackedTrainer:
    """Holds several models in training and advances all of them by a step at a time.

    Args:
        recipe: What to train; `why_not_stackable` must have nothing against it.
        models: The networks of each model at their initial weights; they are copied.
        seeds: One a model: determines its random draws and re-drawn networks, as in the plain trainer.
        device: Where the steps run.
        convolutions: How the convolutions of all models are carried out.
        record: How the work of a step is recorded; None: it is not, and its kernels are launched one by one.

    Raises:
        InvalidInput: The recipe cannot be stacked.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: Sequence[Networks],
        *,
        seeds: Sequence[int],
        device: torch.device,
        convolutions: Convolutions = "grouped",
        record: Record | None = None,
    ) -> None:
        check_stackable(recipe)
        self.recipe, self.device, self.convolutions, self._record = recipe, device, convolutions, record
        self.phases = recipe.stages[0].phases
        self._template = _Networks(copy.deepcopy(dict(models[0]))).to(device)
        trained = {name for phase in self.phases for name in phase.trains}
        for name, network in self._template.networks.items():
            network.train(name in trained)
        self._called = joined(self._template) if convolutions == "implicit" else self._template
        wrapped = [_Networks(networks) for networks in models]
        if any(
            len(list(named(remove_duplicate=False))) > len(list(named()))
            for named in (wrapped[0].named_parameters, wrapped[0].named_buffers)
        ):
            raise InvalidInput("networks that share weights or buffers are not trained as one set of kernels")
        _check_alike(wrapped)
        self._frozen = {name for name, weight in wrapped[0].named_parameters() if not weight.requires_grad}
        weights = [dict(each.named_parameters()) for each in wrapped]
        buffers = [dict(each.named_buffers()) for each in wrapped]
        self.weights = {
            name: self._weight(name, torch.stack([each[name].detach() for each in weights]).to(device)) for name in weights[0]
        }
        self.buffers = {name: torch.stack([each[name] for each in buffers]).to(device) for name in buffers[0]}
        self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._optimisers = [make_optimiser(phase.optimiser, self._trained(phase)) for phase in self.phases]
        self._average = None if recipe.ema_decay is None else {k: v.detach().clone() for k, v in self._tensors().items()}
        self.steps = 0
        self._spares = {
            phase.name: Spares(
                recipe,
                phase,
                models[0],
                [torch.Generator().manual_seed(seed) for seed in seeds],
                device,
                by_kernels=convolutions == "implicit",
            )
            for phase in self.phases
            if phase.redraw_below is not None
        }
        self._run = Replayed(self.work, self.state, record)

    def __len__(self) -> int:
        return len(self._draws)

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed by now."""
        return self._run.is_recorded

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """One step of every model on its own batch.

        Args:
            images: `(m, b, c, h, w)` for m models, uint8 or in [-1, 1].

        Returns:
            The losses as they stood in the step, `(m,)` each.
        """
        losses = self._run(self.inputs(images))
        self.after_step()
        return losses

    def inputs(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the work of a step on `images` reads: them, and every model's random draws, on the device."""
        drawn = [self.recipe.draw(images.shape[1], rng) for rng in self._draws]
        return self._sent(images), {name: self._sent(torch.stack([each[name] for each in drawn])) for name in drawn[0]}

    def _sent(self, value: Tensor) -> Tensor:
        if self.device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # else the copy would be waited for
        return value.to(self.device, non_blocking=True)

    def work(self, inputs: tuple[Tensor, Tensors]) -> dict[str, Tensor]:
        """What a step does on the device, weights and optimisers moved in place: its losses `(m,)`, from `inputs`."""
        images, draws = inputs
        x = to_float(images, self.recipe.input_range)
        earlier: dict[str, Tensor] = {}
        with precision(self.recipe.precision):
            for phase, optimiser in zip(self.phases, self._optimisers, strict=True):
                loss, computed = self._mapped(phase)(self.weights, self.buffers, x, draws, earlier)
                weights = self._trained(phase)
                more = phase is not self.phases[-1]
                gradients = torch.autograd.grad(loss.sum(), weights, retain_graph=more, allow_unused=True)
                set_gradients(weights, gradients)
                optimiser.step()
                earlier.update(computed)
                if phase.redraw_below is not None:
                    own = {name.removeprefix("networks."): weight for name, weight in self.weights.items()}
                    self._spares[phase.name].give(own, loss.detach() < phase.redraw_below)
        return {name: value.detach() for name, value in earlier.items() if value.ndim == 1}

    def after_step(self) -> None:
        """What Python has to do with a step: count it, and move averages by a share that depends on the count."""
        self.steps += 1
        if self.device.type == "cpu":  # which nobody waits for
            self.refill()
        if self._average is not None:
            self._update_average()

    def state(self) -> list[Tensor]:
        """Every tensor that the work of a step changes in place."""
        moments = [value for optimiser in self._optimisers for state in optimiser.state.values() for value in state.values()]
        spent = [spares.spent for spares in self._spares.values()]
        return [*self.weights.values(), *self.buffers.values(), *moments, *spent]

    def scoring_networks(self, model: int) -> dict[str, nn.Module]:
        """The networks of one model to score with: the averaged ones when the recipe averages."""
        state = self._tensors() if self._average is None else self._average
        networks = copy.deepcopy(self._template.networks)
        with torch.no_grad():
            for name, tensor in chain(networks.named_parameters(), networks.named_buffers()):
                tensor.copy_(state[f"networks.{name}"][model])
        return {str(name): to_device(network, self.device) for name, network in networks.items()}

    def keep(self, models: Sequence[int]) -> None:
        """Go on with these models only, in this order."""
        index = torch.tensor(models, device=self.device)
        old = dict(self.weights)
        self.weights = {name: self._weight(name, weight.detach()[index]) for name, weight in old.items()}
        self.buffers = {name: buffer[index] for name, buffer in self.buffers.items()}
        for k, phase in enumerate(self.phases):
            before, self._optimisers[k] = self._optimisers[k], make_optimiser(phase.optimiser, self._trained(phase))
            for name in self._trained_names(phase):
                state = {
                    key: in_order(value[index]) if value.ndim and value.shape == old[name].shape else value
                    for key, value in before.state.get(old[name], {}).items()
                }
                if state:
                    self._optimisers[k].state[self.weights[name]] = state
        if self._average is not None:
            self._average = {name: value[index] for name, value in self._average.items()}
        self._draws = [self._draws[model] for model in models]
        for spares in self._spares.values():
            spares.keep(models)
        self._run = Replayed(self.work, self.state, self._record)

    def refill(self) -> None:
        """Draw new spare weights for models that used theirs up. Waits for the device: call it between epochs."""
        for spares in self._spares.values():
            spares.refill()

    def _weight(self, name: str, values: Tensor) -> Tensor:
        return in_order(values).requires_grad_(name not in self._frozen)

    def _mapped(self, phase: Phase) -> Any:
        def one(weights: Any, buffers: Any, images: Tensor, draws: Any, earlier: Any) -> Any:
            step = StepInput(images, draws, earlier)
            return functional_call(self._called, (weights, buffers), (phase, step, self.recipe.precision), strict=True)

        def all_(*arguments: Any) -> Any:
            mapped = len(self) > 1 or self.convolutions != "grouped"  # mapping a single model would only cost
            with layers_of_all(self.convolutions, self.recipe.precision, mapped=mapped):
                if not mapped:
                    only = tree_map_only(Tensor, lambda tensor: tensor[0], arguments)
                    return tree_map_only(Tensor, lambda tensor: tensor.unsqueeze(0), one(*only))
                return vmap(one, randomness="error")(*arguments)

        return all_

    def _trained_names(self, phase: Phase) -> list[str]:
        return [name for name in self.weights if name.split(".")[1] in phase.trains and name not in self._frozen]

    def _trained(self, phase: Phase) -> list[Any]:
        return [self.weights[name] for name in self._trained_names(phase)]

    def _tensors(self) -> dict[str, Tensor]:
        """Weights and buffers of all models by their names in the template, also buffers that a `state_dict` leaves out."""
        return {**self.weights, **self.buffers}

    def _update_average(self) -> None:
        assert self._average is not None and self.recipe.ema_decay is not None
        update, current = warmed_average(self.recipe.ema_decay), self._tensors()
        for floating in (True, False):
            names = [name for name, value in current.items() if value.is_floating_point() is floating]
            averaged, now = [self._average[name] for name in names], [current[name].detach() for name in names]
            if self.steps == 1:
                for mine, theirs in zip(averaged, now, strict=True):
                    mine.copy_(theirs)
            elif names:
                update(averaged, now, self.steps - 1)
