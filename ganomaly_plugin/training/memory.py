"""How many models of a recipe a device holds at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ganomaly_plugin.recipe import Recipe
from ganomaly_plugin.training.plain import PlainTrainer, build_networks

_SHARE = 0.8  # of the free memory; the rest is for libraries, fragmentation and scoring


def bytes_of_model(recipe: Recipe, chw: tuple[int, int, int]) -> int:
    """Bytes that one model takes in training: weights, gradients, moments, and what a step keeps for its gradients.

    Measured by a step on the CPU, where autograd is asked for every tensor that it saves.
    """
    trainer = PlainTrainer(recipe, build_networks(recipe, chw, seed=0), seed=0, device=torch.device("cpu"))
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.step(torch.zeros(recipe.batch_size, *chw))
    state = sum(t.nbytes for net in trainer.networks.values() for t in (*net.parameters(), *net.buffers()))
    copies = 4 + (recipe.ema_decay is not None)  # itself, gradient, two moments, average
    return copies * state + 2 * sum(saved.values())  # as much again for gradients of what was kept


def models_that_fit(recipe: Recipe, chw: tuple[int, int, int], free: int) -> int:
    """How many models `free` bytes hold at once, at least one."""
    return max(1, int(_SHARE * free / bytes_of_model(recipe, chw)))
