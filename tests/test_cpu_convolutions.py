"""Convolutions as matrix products are those of the library, with their first and second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ganomaly_plugin.training.cpu_convolutions import cpu_convolutions

CPU = torch.device("cpu")
#: name → (a layer, the shape of its input, what its answer's graph begins with when it is taken over)
LAYERS = {
    "whole map": (torch.nn.Conv2d(3, 5, 4), (2, 3, 4, 4), "UnsqueezeBackward0"),
    "whole map of 3×3, no bias": (torch.nn.Conv2d(6, 1, 3, bias=False), (2, 6, 3, 3), "UnsqueezeBackward0"),
    "from one channel": (torch.nn.Conv2d(1, 6, 4, 2, 1, bias=False), (2, 1, 8, 8), "_FromOneChannelBackward"),
    "from one channel, bias": (torch.nn.Conv2d(1, 6, 5, 2, 2), (2, 1, 8, 8), "AddBackward0"),
    "from 1×1": (torch.nn.ConvTranspose2d(6, 3, 4), (2, 6, 1, 1), "AddBackward0"),
    "to one channel": (torch.nn.ConvTranspose2d(6, 1, 4, 2, 1, bias=False), (2, 6, 4, 4), "Col2ImBackward0"),
    "to one channel, more rows": (torch.nn.ConvTranspose2d(6, 1, 3, 2, 1, 1), (2, 6, 4, 4), "AddBackward0"),
    "usual": (torch.nn.Conv2d(3, 5, 4, 2, 1), (2, 3, 8, 8), "ConvolutionBackward0"),
    "usual, transposed": (torch.nn.ConvTranspose2d(3, 5, 4, 2, 1), (2, 3, 8, 8), "ConvolutionBackward0"),
    "padded by name": (torch.nn.Conv2d(1, 5, 3, padding="same"), (2, 1, 8, 8), "ConvolutionBackward0"),
    "dilated": (torch.nn.Conv2d(1, 5, 3, dilation=2), (2, 1, 8, 8), "ConvolutionBackward0"),
    "grouped": (torch.nn.Conv2d(4, 4, 4, groups=2), (2, 4, 4, 4), "ConvolutionBackward0"),
}


def with_derivatives(layer: Any, x: Tensor) -> list[Tensor]:
    """The answer, its gradients, and those of the squared gradient with respect to the input, as of a gradient penalty."""
    y = torch.nn.functional.leaky_relu_(layer(x), 0.2)
    wanted = [x, *layer.parameters()]
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    return [y, *first, *torch.autograd.grad(first[0].square().sum(), [x, layer.weight])]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_answers_and_derivatives_are_those_of_the_library(name: str, channels_last: bool) -> None:
    layer, shape, taken_over = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    wanted = with_derivatives(layer, x)
    with cpu_convolutions(CPU):
        found = with_derivatives(layer, x)
        assert layer(x).grad_fn.name() == taken_over
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_images_may_be_given_by_name(transposed: bool) -> None:
    function = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 4)
    with cpu_convolutions(CPU):
        found = function(input=x, weight=weight)
    torch.testing.assert_close(found, function(x, weight))


def test_bfloat16_and_other_devices_are_left_to_the_library() -> None:
    layer, shape, _ = LAYERS["whole map"]
    with cpu_convolutions(CPU), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(shape)).grad_fn.name() != "UnsqueezeBackward0"
    with cpu_convolutions(torch.device("cuda")):
        assert layer(torch.ones(shape)).grad_fn.name() == "ConvolutionBackward0"
