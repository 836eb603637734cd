"""Layers that are carried out together with the activation after them: BatchNorm in training, and convolutions."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

_Module = TypeVar("_Module", bound=nn.Module)


def activated(y: Tensor, slope: float) -> Tensor:
    """LeakyReLU, which for a slope of 0 is ReLU and for a slope of 1 nothing."""
    if slope == 1:
        return y
    return functional.leaky_relu(y, slope) if slope else functional.relu(y)


# Functions of torch, of which a mode for such functions can replace both or either.


def batch_norm_activated(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    slope: float,
) -> Tensor:
    """BatchNorm and LeakyReLU."""
    tensors = x, running_mean, running_var, weight, bias
    if has_torch_function(tensors):
        return handle_torch_function(batch_norm_activated, tensors, *tensors, training, momentum, eps, slope)
    return activated(functional.batch_norm(*tensors, training, momentum, eps), slope)


def conv2d_activated(
    x: Tensor, weight: Tensor, bias: None, stride: Any, padding: Any, dilation: Any, groups: int, slope: float
) -> Tensor:
    """A convolution without bias and LeakyReLU."""
    if has_torch_function((x, weight)):
        return handle_torch_function(conv2d_activated, (x, weight), x, weight, bias, stride, padding, dilation, groups, slope)
    return activated(torch.conv2d(x, weight, bias, stride, padding, dilation, groups), slope)


def _is_hooked(module: nn.Module) -> bool:
    kinds = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(kinds)


def _slope(activation: nn.Module | None) -> float | None:
    """The slope of `activation`; None where it is none that a layer can take over."""
    if activation is None or _is_hooked(activation):
        return None
    if type(activation) is nn.ReLU:
        return 0.0
    return activation.negative_slope if type(activation) is nn.LeakyReLU and activation.negative_slope >= 0 else None


def _takes_over(layer: nn.Module) -> bool:
    """Whether `layer` can be carried out together with an activation."""
    if _is_hooked(layer):
        return False
    if type(layer) is nn.BatchNorm2d:
        return layer.training and layer.affine and layer.track_running_stats and layer.momentum is not None
    return type(layer) is nn.Conv2d and layer.bias is None and layer.padding_mode == "zeros"


def _both(layer: nn.Module, x: Tensor, slope: float) -> Tensor:
    """What `layer` does, and the activation after it."""
    if isinstance(layer, nn.Conv2d):
        return conv2d_activated(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups, slope)
    assert isinstance(layer, nn.BatchNorm2d) and layer.num_batches_tracked is not None and layer.momentum is not None
    layer._check_input_dim(x)
    layer.num_batches_tracked.add_(1)
    state = layer.running_mean, layer.running_var, layer.weight, layer.bias
    return batch_norm_activated(x, *state, True, layer.momentum, layer.eps, slope)


class _Joined(nn.Sequential):
    """A Sequential that carries out layers and the activations after them at once; they stay two."""

    def forward(self, x: Any) -> Any:
        waiting = list(self)[::-1]
        while waiting:
            layer = waiting.pop()
            slope = _slope(waiting[-1]) if waiting and _takes_over(layer) else None
            if slope is None:
                x = layer(x)
            else:
                waiting.pop()
                x = _both(layer, x, slope)
        return x


def joined(network: _Module) -> _Module:
    """A copy of `network`, with the same weights, whose Sequentials carry out layers and the activations after them at once."""
    kept = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    network = copy.deepcopy(network, kept)
    for module in network.modules():
        if type(module) is nn.Sequential:
            module.__class__ = _Joined
    return network
