"""A stack whose models each have kernels of their own, on streams of a GPU that run at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ganomaly_plugin.recipe import Networks, Recipe, Tensors
from ganomaly_plugin.training.captured import Record, Replayed
from ganomaly_plugin.training.stacked import StackedTrainer

STREAMS = 8  # that models take in turn


class OnStreams:
    """Models that are each a stack of their own, with kernels for one model, on streams of a GPU that run at the same time.

    Launched one by one, kernels of small models come too slowly to overlap: it is for steps that are recorded. On a CPU the
    streams are one.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: Sequence[Networks],
        *,
        seeds: Sequence[int],
        device: torch.device,
        record: Record | None = None,
    ) -> None:
        self._trainers = [
            StackedTrainer(recipe, [networks], seeds=[seed], device=device)
            for networks, seed in zip(models, seeds, strict=True)
        ]
        self._device, self._record, self.steps = device, record, 0
        self._streams: list[Any] = [torch.cuda.Stream(device) for _ in range(STREAMS)] if device.type == "cuda" else []
        self._run = Replayed(self._work, self._state, record)

    def __len__(self) -> int:
        return len(self._trainers)

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed by now."""
        return self._run.is_recorded

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """One step of every model; see `Stack`."""
        each = [trainer.inputs(batch[None]) for trainer, batch in zip(self._trainers, images, strict=True)]
        losses = self._run(each)
        self.steps += 1
        for trainer in self._trainers:
            trainer.after_step()
        return losses

    def _work(self, inputs: Sequence[tuple[Tensor, Tensors]]) -> dict[str, Tensor]:
        each = []
        here: Any = torch.cuda.current_stream(self._device) if self._streams else None
        for stream in self._streams:
            stream.wait_stream(here)
        for k, (trainer, own) in enumerate(zip(self._trainers, inputs, strict=True)):
            with torch.cuda.stream(self._streams[k % STREAMS] if self._streams else None):
                each.append(trainer.work(own))
        for stream in self._streams:
            here.wait_stream(stream)
        return {name: torch.cat([losses[name] for losses in each]) for name in each[0]}

    def _state(self) -> list[Tensor]:
        return [tensor for trainer in self._trainers for tensor in trainer.state()]

    def scoring_networks(self, model: int) -> Networks:
        """A copy of one model's networks."""
        return self._trainers[model].scoring_networks(0)

    def keep(self, models: Sequence[int]) -> None:
        """Go on with these models only."""
        self._trainers = [self._trainers[model] for model in models]
        self._run = Replayed(self._work, self._state, self._record)

    def refill(self) -> None:
        """Draw new spare weights; see `StackedTrainer`."""
        for trainer in self._trainers:
            trainer.refill()
