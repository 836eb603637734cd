"""The layers of many models at once are those of each model alone, whatever their shapes, and so are their gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ganomaly_plugin.training.convolutions import in_order, layers_of_all

MODELS = 3
CONVOLUTIONS = {
    "halving": (functional.conv2d, (2, 5, 8, 6), (4, 5, 4, 4), {"stride": 2, "padding": 1}),
    "of an odd map": (functional.conv2d, (2, 5, 7, 9), (4, 5, 3, 3), {"stride": 2, "padding": 1}),
    "of a map that its kernel covers": (functional.conv2d, (2, 5, 4, 4), (4, 5, 4, 4), {}),
    "at one place with a border": (functional.conv2d, (2, 5, 2, 2), (4, 5, 4, 4), {"padding": 1}),
    "same size": (functional.conv2d, (2, 5, 6, 6), (4, 5, 3, 3), {"padding": 1}),
    "steps past pixels": (functional.conv2d, (2, 5, 9, 9), (4, 5, 2, 2), {"stride": 3}),
    "pixel by pixel": (functional.conv2d, (2, 5, 6, 6), (4, 5, 1, 1), {}),
    "oblong": (functional.conv2d, (2, 5, 8, 9), (4, 5, 2, 5), {"stride": (1, 2), "padding": (0, 2)}),
    "dilated": (functional.conv2d, (2, 5, 8, 8), (4, 5, 3, 3), {"dilation": 2}),
    "in groups": (functional.conv2d, (2, 6, 8, 8), (4, 3, 3, 3), {"groups": 2}),
    "padded by name": (functional.conv2d, (2, 5, 6, 6), (4, 5, 3, 3), {"padding": "same"}),
    "doubling": (functional.conv_transpose2d, (2, 4, 4, 3), (4, 5, 4, 4), {"stride": 2, "padding": 1}),
    "from one pixel": (functional.conv_transpose2d, (2, 4, 1, 1), (4, 5, 4, 4), {}),
    "to an odd map": (functional.conv_transpose2d, (2, 4, 4, 4), (4, 5, 3, 3), {"stride": 2, "padding": 1}),
    "with more pixels at the end": (
        functional.conv_transpose2d,
        (2, 4, 4, 4),
        (4, 5, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1},
    ),
    "with pixels between": (functional.conv_transpose2d, (2, 4, 3, 3), (4, 5, 2, 2), {"stride": 3}),
    "transposed in groups": (functional.conv_transpose2d, (2, 4, 4, 4), (4, 3, 3, 3), {"groups": 2}),
}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(MODELS, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def results(run, inputs: list[torch.Tensor], towards: torch.Tensor | None = None) -> list[torch.Tensor]:
    """What `run` answers, and the gradients of a weighted sum of it."""
    inputs = [value.detach().requires_grad_() for value in inputs]
    answer = run(*inputs)
    towards = torch.linspace(-1, 1, answer.numel(), dtype=answer.dtype).view(answer.shape)
    return [answer.detach(), *torch.autograd.grad((answer * towards).sum(), inputs)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("how", ["grouped", "matmul"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_all_models_are_each_ones_own(name, how, biased):
    layer, image, kernel, options = CONVOLUTIONS[name]
    transposed = layer is functional.conv_transpose2d
    out = (kernel[1] if transposed else kernel[0]) * (options.get("groups", 1) if transposed else 1)
    inputs = [random(*image, seed=0), in_order(random(*kernel, seed=1))] + [random(out, seed=2)] * biased

    def one(*tensors):
        return layer(*tensors, **options)

    def of_all(*tensors):
        with layers_of_all(how, "float32"):
            return torch.vmap(one)(*tensors)

    wanted = results(lambda *tensors: torch.stack([one(*each) for each in zip(*tensors, strict=True)]), inputs)
    for mine, theirs in zip(results(of_all, inputs), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7, 5, 4, 3), (7, 5, 1, 1), (7, 5)])
def test_batchnorm_of_all_models_is_each_ones_own(shape, training):
    inputs = [random(*shape, seed=0), random(5, seed=1), random(5, seed=2)]
    statistics = [random(5, seed=3), random(5, seed=4).abs()]
    mine, theirs = ([value.clone() for value in statistics] for _ in range(2))

    def one(x, weight, bias, mean, variance):
        return functional.batch_norm(x, mean, variance, weight, bias, training, 0.3)

    def of_all(*tensors):
        with layers_of_all("grouped", "float32"):
            return torch.vmap(one)(*tensors, *mine)

    wanted = results(lambda *tensors: torch.stack([one(*each) for each in zip(*tensors, *theirs, strict=True)]), inputs)
    for value, expected in zip(results(of_all, inputs) + mine, wanted + theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(mine[0], statistics[0]) is not training


def test_what_all_models_share_need_not_be_mapped():
    x, kernel, mean = random(2, 5, 6, 6, seed=0), random(4, 5, 3, 3, seed=1)[0], torch.zeros(4, dtype=torch.float64)

    def one(image):
        shared = functional.batch_norm(functional.conv2d(x[0], kernel), mean, mean + 1)
        return functional.conv2d(image, kernel) + shared

    wanted = torch.stack([one(image) for image in x])
    with layers_of_all("matmul", "float32"):
        torch.testing.assert_close(torch.vmap(one)(x), wanted, rtol=1e-5, atol=1e-12)


class Places(TorchDispatchMode):
    """Notes whether products of matrices answer right where the next layer wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [1, 2])
def test_products_copy_no_factor_and_no_answer(stride):
    x, kernel = random(2, 4, 6, 6, seed=0), in_order(random(4, 4, 4, 4, seed=1))

    def of_all(x, kernel):
        with layers_of_all("matmul", "float32"):
            y = torch.vmap(
                lambda image, weight: functional.leaky_relu(functional.conv2d(image, weight, stride=stride), 0.2, True)
            )(x, kernel)
            return torch.vmap(lambda image, weight: functional.conv_transpose2d(image, weight, stride=stride))(y, kernel)

    with Places() as places:
        y = of_all(x, kernel)
    assert places.names.count("bmm") == 2 and places.names.count("clone") == 1  # the patches of the one convolution
    assert "copy_" not in places.names and y.shape == x.shape
