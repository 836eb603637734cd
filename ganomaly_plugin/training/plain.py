"""The plain trainer: one model, one loop, eager. Every other trainer is held to what this one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ganomaly_plugin.errors import Diverged
from ganomaly_plugin.images import to_float
from ganomaly_plugin.recipe import Networks, Optimiser, Phase, Recipe, Stage, StepInput, Tensors
from ganomaly_plugin.seeding import torch_seeded
from ganomaly_plugin.training.cpu_convolutions import cpu_convolutions
from ganomaly_plugin.training.precision import networks_in, precision
from ganomaly_plugin.training.redraw import drawn_anew


def build_networks(recipe: Recipe, chw: tuple[int, int, int], seed: int) -> dict[str, nn.Module]:
    """The recipe's networks with initial weights that depend on `seed` alone, on the CPU."""
    with torch_seeded(seed):
        return recipe.build(chw)


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` moved to `device` in place, its kernels in channels-last order, which convolutions run faster on."""
    network.to(device)
    for tensor in chain(network.parameters(), network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)  # `contiguous` leaves single channels as they are
    return network


def make_optimiser(options: Optimiser, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimiser that `options` describe; Adam runs fused."""
    if options.kind == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=options.lr)
    on_gpu = any(parameter.is_cuda for parameter in parameters)  # there its count of steps may lie in a CUDA graph
    return torch.optim.Adam(parameters, lr=options.lr, betas=options.betas, fused=True, capturable=on_gpu)


def trained_parameters(phase: Phase, networks: Networks) -> list[nn.Parameter]:
    """The weights that `phase` updates: none that is frozen, and each once, also where networks share some."""
    return list(dict.fromkeys(p for name in phase.trains for p in networks[name].parameters() if p.requires_grad))


def make_average(recipe: Recipe, networks: Networks) -> AveragedModel | None:
    """A moving average of weights and buffers that starts at `networks`; None when the recipe does not average."""
    if recipe.ema_decay is None:
        return None
    return AveragedModel(nn.ModuleDict(networks), multi_avg_fn=warmed_average(recipe.ema_decay), use_buffers=True)


def warmed_average(decay: float) -> Callable[[Any, Any, Tensor | int], None]:
    """An update of a moving average whose decay is at most (1 + n) / (10 + n) after n updates.

    # Differs: the papers that average keep `decay` from the start, over tens of thousands of steps. In a budget of a
    few hundred, which small data sets bring, the average would still be mostly the initial weights.
    """

    def update(averaged: list[Tensor], current: list[Tensor], n: Tensor | int) -> None:
        get_ema_multi_avg_fn(min(decay, (1 + int(n)) / (10 + int(n))))(averaged, current, n)

    return update


class PlainTrainer:
    """Holds one model in training and advances it a step at a time.

    Args:
        recipe: What to train.
        networks: The recipe's networks; moved to `device` and trained in place.
        seed: Determines the steps' random draws and re-drawn networks.
        device: Where the steps run.
        average: The moving average of the networks to go on with; None starts one, if the recipe averages.
        compiled: Call the networks through `torch.compile`. Gradients of gradients, as in f-AnoGAN, fail then.
    """

    def __init__(
        self,
        recipe: Recipe,
        networks: Networks,
        *,
        seed: int,
        device: torch.device,
        average: AveragedModel | None = None,
        compiled: bool = False,
    ) -> None:
        self.recipe = recipe
        self.device = device
        self.networks = {name: to_device(net, device) for name, net in networks.items()}
        self._compiled = compiled
        called = {name: cast(nn.Module, torch.compile(net)) if compiled else net for name, net in self.networks.items()}
        self._called = networks_in(recipe.precision, called)
        self.draws = torch.Generator().manual_seed(seed)
        self.redraws = torch.Generator().manual_seed(seed)
        self.steps = 0
        self._average = make_average(recipe, self.networks) if average is None else average
        self.begin(recipe.stages[0])

    def begin(self, stage: Stage, optimisers: Sequence[Any] | None = None) -> None:
        """Start `stage` with fresh optimisers: its own, or one a phase from a host that wants a say in their `step()`."""
        self._phases: list[tuple[Phase, list[nn.Parameter], Any]] = []
        for k, phase in enumerate(stage.phases):
            parameters = trained_parameters(phase, self.networks)
            optimiser = make_optimiser(phase.optimiser, parameters) if optimisers is None else optimisers[k]
            self._phases.append((phase, parameters, optimiser))
        self.stage_steps = 0

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """One training step on a batch `(b, c, h, w)`, uint8 or in [-1, 1]; returns its losses as they stood in it."""
        x = to_float(images.to(self.device, non_blocking=True), self.recipe.input_range)
        x = x.contiguous(memory_format=torch.channels_last)
        draws = {name: value.to(self.device) for name, value in self.recipe.draw(len(x), self.draws).items()}
        self._train_mode()
        self.stage_steps += 1
        self.steps += 1
        # An earlier phase's graph is kept for the later ones, so a compiled backward pass may not reuse its buffers.
        kept = functorch_config.patch(donated_buffer=False) if self._compiled else nullcontext()
        with kept, precision(self.recipe.precision), cpu_convolutions(self.device):
            earlier = self._run_phases(x, draws)
        if self._average is not None:
            self._average.update_parameters(nn.ModuleDict(self.networks))
        return {name: value.detach() for name, value in earlier.items() if value.ndim == 0}

    def _run_phases(self, x: Tensor, draws: Tensors) -> dict[str, Tensor]:
        earlier: dict[str, Tensor] = {}
        due = [entry for entry in self._phases if self.stage_steps % entry[0].every == 0]
        for phase, parameters, optimiser in due:
            loss, computed = phase.loss(self._called, StepInput(x, draws, earlier))
            more = phase is not due[-1][0]
            gradients = torch.autograd.grad(loss, parameters, retain_graph=more, allow_unused=True)
            set_gradients(parameters, gradients)
            optimiser.step()
            earlier.update(computed)
            if phase.redraw_below is not None and loss.item() < phase.redraw_below:
                self._redraw(phase)
        return earlier

    def scoring_networks(self) -> Networks:
        """The networks to score with: the averaged ones when the recipe averages, else those in training."""
        return averaged_networks(self._average) if self._average is not None else self.networks

    def _train_mode(self) -> None:
        trained = {name for phase, _, _ in self._phases for name in phase.trains}
        for name, network in self.networks.items():
            network.train(name in trained)

    def _redraw(self, phase: Phase) -> None:
        with torch.no_grad():
            for name, weight in drawn_anew(self.recipe, phase, self.networks, self.redraws).items():
                network, _, own = name.partition(".")
                self.networks[network].get_parameter(own).copy_(weight)


def set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Hand each parameter its gradient, in the parameter's own order in memory: fused Adam takes it to be that."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient


def averaged_networks(average: AveragedModel) -> dict[str, nn.Module]:
    """The networks, by name, that a moving average holds."""
    return {str(name): network for name, network in average.module.named_children()}


def epoch_batches(n: int, batch_size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Index tensors of one epoch: a fresh order, the last short batch dropped (kept when it is the only one)."""
    order = torch.randperm(n, generator=rng)
    size = min(batch_size, n)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]


def train(
    recipe: Recipe,
    images: Tensor,
    *,
    seed: int,
    epochs: int,
    steps: int | None = None,
    device: torch.device,
    compiled: bool = False,
    after_epoch: Callable[[int, PlainTrainer, dict[str, float]], bool | None],
) -> PlainTrainer:
    """Train `recipe` on checked images `(n, c, h, w)` and return the trainer.

    Each stage trains for `epochs`, or, when it is given, for exactly `steps`: its last epoch may then be cut short.
    Calls `after_epoch(epoch, trainer, mean losses)` after each epoch, counted from 1 through all stages; an answer of
    True ends the stage.
    """
    _, c, h, w = images.shape
    trainer = PlainTrainer(recipe, build_networks(recipe, (c, h, w), seed), seed=seed, device=device, compiled=compiled)
    order = order_of(seed)
    data = resident(images, device)
    epoch = 0
    for stage in recipe.stages:
        trainer.begin(stage)
        for batches in stage_epochs(len(data), recipe.batch_size, order, epochs=epochs, steps=steps):
            epoch += 1
            losses = [trainer.step(data[index.to(data.device)]) for index in batches]
            if after_epoch(epoch, trainer, epoch_means(losses, stage, first_step=trainer.steps - len(losses) + 1)):
                break
    return trainer


def order_of(seed: int) -> torch.Generator:
    """What the orders of a model's training images are drawn from."""
    return torch.Generator().manual_seed(seed + 1)


def stage_epochs(
    n: int, batch_size: int, order: torch.Generator, *, epochs: int, steps: int | None
) -> Iterator[Iterator[Tensor]]:
    """The epochs of one stage over `n` images, each the batches of `epoch_batches`; with `steps` the last may be cut short."""
    left = steps
    for _ in range(epochs if steps is None else epochs_of(steps, n, batch_size)):
        yield islice(epoch_batches(n, batch_size, order), left)
        left = None if left is None else left - n // min(batch_size, n)


def epochs_of(steps: int, n: int, batch_size: int) -> int:
    """How many epochs over `n` images hold `steps` steps, the last one begun included."""
    per_epoch = n // min(batch_size, n)
    return -(-steps // per_epoch)


def resident(images: Tensor, device: torch.device) -> Tensor:
    """`images` on `device` when they take less than half of its free memory, else where they are."""
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return images.to(device)
    return images


def epoch_means(losses: list[dict[str, Tensor]], stage: Stage, *, first_step: int) -> dict[str, float]:
    """Mean of each loss over an epoch's steps; raises Diverged, naming loss and step, when one is not finite."""
    means = {}
    for name in dict.fromkeys(name for step in losses for name in step):
        at = [k for k, step in enumerate(losses) if name in step]
        values = torch.stack([losses[k][name] for k in at]).double().cpu()
        means[name] = finite_mean(values, [first_step + k for k in at], name, stage)
    return means


def finite_mean(values: Tensor, steps: Sequence[int], name: str, stage: Stage) -> float:
    """Mean of the values `(n,)` that a loss had at `steps`; raises Diverged when one is not finite."""
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        k = int(bad[0])
        raise Diverged(
            f"Training diverged: loss {name!r} of stage {stage.name!r} is {values[k].item()} at step {steps[k]}. "
            "Lower lr, or check the images."
        )
    return float(values.mean())
