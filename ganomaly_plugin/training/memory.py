"""How many models of a recipe a device holds at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ganomaly_plugin.recipe import Recipe
from ganomaly_plugin.training.convolutions import Convolutions
from ganomaly_plugin.training.plain import build_networks
from ganomaly_plugin.training.stack import How
from ganomaly_plugin.training.stacked import StackedTrainer

_SHARE = 0.8  # of the free memory; the rest is for libraries, fragmentation and scoring


def bytes_of_model(recipe: Recipe, chw: tuple[int, int, int], how: How = "grouped") -> int:
    """Bytes that one model of a stack takes at most: weights, gradients, moments, and what a step keeps for its gradients.

    Measured by a step on the CPU in float32, where autograd is asked for every tensor that it saves. ("implicit" saves what
    "grouped" does.)
    """
    recipe = replace(recipe, precision="float32")
    models = [build_networks(recipe, chw, seed=0)]
    convolutions: Convolutions = "matmul" if how == "matmul" else "grouped"
    trainer = StackedTrainer(recipe, models, seeds=[0], device=torch.device("cpu"), convolutions=convolutions)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.step(torch.zeros(1, recipe.batch_size, *chw))
    state = sum(tensor.nbytes for tensor in (*trainer.weights.values(), *trainer.buffers.values()))
    # itself, gradient, two moments, average; and itself and the moments twice while a recorded step is held to the step itself
    copies = 4 + (recipe.ema_decay is not None) + 6
    return copies * state + 2 * sum(saved.values())  # as much again for gradients of what was kept


def models_that_fit(recipe: Recipe, chw: tuple[int, int, int], free: int, how: How = "grouped") -> int:
    """How many models `free` bytes hold at once, at least one."""
    return max(1, int(_SHARE * free / bytes_of_model(recipe, chw, how)))
