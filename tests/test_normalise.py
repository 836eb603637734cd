"""BatchNorm and the activation after it by kernels of our own: what they compute, as Triton interprets them, and for what."""

from __future__ import annotations

import pytest
import torch
from test_implicit import CPU, MODELS, Operations, random
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state

from ganomaly_plugin.detectors.skip_ganomaly import SkipGanomalyRecipe
from ganomaly_plugin.training import normalise
from ganomaly_plugin.training.convolutions import layers_of_all
from ganomaly_plugin.training.joined import _takes_over, activated, joined
from ganomaly_plugin.training.normalise import normalise_all
from ganomaly_plugin.training.plain import PlainTrainer, build_networks
from ganomaly_plugin.training.stack import make_stack

pytest.importorskip("triton")

ACTIVATIONS = {"ReLU": 0.0, "LeakyReLU": 0.2, "none": 1.0}
SHAPES = {
    "one chunk": (2, 3, 4, 2, 16),
    "chunks of unlike lengths": (2, 7, 9, 3, 16),
    "columns past a block": (3, 8, 8, 3, 17),
    "an empty chunk": (1, 9, 29, 1, 8),
    "two rows": (1, 1, 2, 1, 3),
}


def results(run, x, weight, bias, mean, variance, towards) -> list[torch.Tensor]:
    """What `run` answers, the running statistics after it, and the gradients."""
    inputs, running = [each.clone().requires_grad_() for each in (x, weight, bias)], [mean.clone(), variance.clone()]
    y = run(*inputs, *running)
    return [y.detach(), *running, *torch.autograd.grad(y, inputs, towards)]


def both(shape, slope: float, dtype=torch.float32, *, far: float = 0.0, momentum: float = 0.3, eps: float = 1e-3):
    """Errors of the kernels and of torch in the same type, for each result as a share of its largest number."""
    rng = torch.Generator().manual_seed(0)
    x, towards = ((torch.randn(*shape, generator=rng) + at).to(dtype) for at in (far, 0.0))
    weights = [torch.randn(shape[3:], generator=rng) for _ in range(3)] + [torch.rand(shape[3:], generator=rng)]

    def usual(x, weight, bias, *running):
        y = nn.functional.batch_norm(
            x.flatten(0, 2).flatten(1), *(each.view(-1) for each in (*running, weight, bias)), True, momentum, eps
        )
        return activated(y, slope).view(x.shape)

    mine = results(lambda *all_: normalise_all(*all_, momentum, eps, slope), x, *weights, towards)
    theirs = results(usual, x, *weights, towards)
    wanted = results(usual, *(each.double() for each in (x, *weights, towards)))
    errors = [
        [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(each, wanted, strict=True)]
        for each in (mine, theirs)
    ]
    return mine, *errors


@pytest.mark.parametrize("slope", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_compute_what_torch_does(shape, slope):
    mine, errors, of_torch = both(shape, slope)
    assert all(each.dtype == torch.float32 for each in mine)
    assert all(error < 1e-6 or error < 2 * other for error, other in zip(errors, of_torch, strict=True))


@pytest.mark.parametrize("slope", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_bfloat16_is_rounded_at_the_end_only(slope):
    # by a whole unit in the last place, as the interpreter cuts off what a GPU rounds
    mine, errors, _ = both((2, 7, 9, 3, 17), slope, torch.bfloat16)
    assert [each.dtype for each in mine] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, *[torch.float32] * 2]
    assert max(errors[0], errors[3]) < 2**-7 and max(*errors[1:3], *errors[4:]) < 1e-6


def test_a_large_mean_costs_no_more_than_it_costs_torch():
    _, errors, of_torch = both((8, 9, 9, 2, 16), 1.0, far=1e3)
    assert all(error < other + 1e-5 for error, other in zip(errors, of_torch, strict=True))
    assert max(errors[:4]) < 1e-5


def test_an_outlier_spoils_no_statistics():
    x = random(16, 8, 1, 16, seed=0).movedim(0, 3).reshape(16, 8, 1, MODELS, 16)
    x[0, 0] = 1e4
    running = torch.zeros(MODELS, 16), torch.zeros(MODELS, 16)
    normalise.normalise(x, torch.ones(MODELS, 16), torch.zeros(MODELS, 16), *running, 1.0, 1e-5, 1.0, NOTHING)
    flat = x.double().flatten(0, 2)
    torch.testing.assert_close(running, (flat.mean(0).float(), flat.var(0).float()), rtol=1e-6, atol=1e-6)


def test_no_number_stays_none():
    x = torch.zeros(2, 3, 3, 1, 4)
    x[0, 0, 0, 0, 1] = torch.nan
    running = torch.zeros(1, 4), torch.ones(1, 4)
    y = normalise_all(x, torch.ones(1, 4), torch.zeros(1, 4), *running, 0.1, 1e-5, 0.0)
    assert [bool(each.isnan().any()) for each in y.unbind(4)] == [False, True, False, False]


NOTHING = torch.zeros(0, dtype=torch.int32)  # where nothing is noted


def small(*, activation=nn.ReLU, **options) -> nn.Sequential:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), activation(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4, **options)
    return nn.Sequential(*layers)


def mapped(networks: list[nn.Sequential], images: torch.Tensor, how="implicit"):
    """The answers of all, their buffers after that, and the gradients; and the operations that were ours."""
    weights, buffers = stack_module_state(networks)
    called = joined(networks[0]) if how == "implicit" else networks[0]

    def one(weights, buffers, x):
        return functional_call(called, (weights, buffers), (x,), strict=True)

    with Operations() as operations, layers_of_all(how, "float32"):
        y = torch.vmap(one)(weights, buffers, images)
        gradients = torch.autograd.grad(y.square().mean() + y[..., 0].sum(), list(weights.values()), allow_unused=True)
    return [y.detach(), *buffers.values(), *gradients], operations.ours()


def assert_alike(networks: list[nn.Sequential], ours: dict[str, int], images: torch.Tensor | None = None) -> None:
    images = random(4, 3, 8, 8, seed=0) if images is None else images
    (found, operations), (wanted, _) = (mapped(networks, images, how) for how in ("implicit", "matmul"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert operations == ours


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.2, inplace=True), nn.Tanh, lambda: nn.LeakyReLU(-0.1)])
def test_layers_of_a_network_are_found(activation):
    networks = [small(activation=activation) for _ in range(MODELS)]
    assert_alike(networks, {"normalise": 2, "normalise_backward": 2})


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"dtype": torch.float64}],
    ids=["affine", "running", "double"],
)
def test_what_the_kernels_do_not_take_is_torchs(options):
    networks = [small(**options).to(options.get("dtype")) for _ in range(MODELS)]
    assert_alike(networks, {}, random(4, 3, 8, 8, seed=0).to(options.get("dtype")))


def test_evaluation_is_torchs():
    assert_alike([small().eval() for _ in range(MODELS)], {})


def test_one_pixel_is_refused_as_torch_refuses_it():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        mapped([small() for _ in range(MODELS)], random(1, 3, 3, 3, seed=0))


def test_a_momentum_that_is_none_is_torchs():
    layers = [nn.BatchNorm2d(4, momentum=None), nn.ReLU()]
    network, x = nn.Sequential(*layers), random(3, 4, 5, 5, seed=0)
    assert not _takes_over(layers[0])
    expected = [network(each) for each in x]
    network[0].reset_running_stats()
    assert all(torch.equal(a, b) for a, b in zip(map(joined(network), x), expected, strict=True))


class Sliced(nn.Module):
    """Reads what BatchNorm answers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small()

    def forward(self, x):
        between = self.layers[:2](x)
        return self.layers[2:](between), between


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_only_what_nobody_looks_at_is_left_out():
    seen: list[torch.Tensor] = []
    x = random(4, 3, 8, 8, seed=0)[0]
    hooked, sliced = small(), Sliced()
    hooked[1].register_forward_hook(lambda module, given, answer: seen.append(answer.detach().clone()))
    for network in (hooked, sliced):
        assert all(torch.equal(*pair) for pair in zip(joined(network)(x), network(x), strict=True))
    assert torch.equal(*seen) and bool((seen[0] < 0).any())
    assert type(joined(Doubled(*small()))) is Doubled


def test_a_copy_shares_the_weights_and_leaves_the_network_as_it_is():
    network = nn.ModuleList([small()])
    copy = joined(network)
    assert type(network[0]) is nn.Sequential and type(copy[0]) is not nn.Sequential
    mine, theirs = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (copy, network))
    assert mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)
    assert copy.state_dict().keys() == network.state_dict().keys()


@pytest.mark.slow
def test_stacked_networks_are_those_of_the_plain_trainer():
    recipe = SkipGanomalyRecipe(features=2, latent_dim=4, batch_size=3)
    models = [build_networks(recipe, (1, 32, 32), seed) for seed in (0, 1)]
    stack = make_stack(recipe, models, seeds=[0, 1], device=CPU, how="implicit")
    plain = PlainTrainer(recipe, models[1], seed=1, device=CPU)
    images = random(3, 1, 32, 32, seed=0)[:2]
    for _ in range(2):
        with Operations() as operations:
            stack.step(images)
        plain.step(images[1])
        assert operations.ours()["normalise"] > 0 and not operations.names["aten::native_batch_norm"]
    for name, network in stack.scoring_networks(1).items():
        own = plain.networks[name]
        assert [type(each) for each in network.modules()] == [type(each) for each in own.modules()]
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value, own.state_dict()[key], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_the_shapes_that_it_expects(dtype):
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    with FakeTensorMode():
        x, weights = torch.empty(4, 5, 5, MODELS, 8, device="cuda", dtype=dtype), torch.empty(4, MODELS, 8, device="cuda")
        nothing = x.new_zeros(0, dtype=torch.int32)
        for noted, halves in (
            (nothing, torch.empty(0, device="cuda", dtype=torch.float16)),
            (nothing.new_zeros(MODELS), x.half()),
        ):
            y, mean, scale, first = normalise.normalise(x, *weights, 0.1, 1e-5, 0.2, noted)
            *gradients, second = normalise.normalise_backward(x, y, *weights[:2], mean, scale, 0.2, noted, noted)
            found += [y, mean, scale, first, *gradients, second]
            expected += [x, *weights[:2], halves, x, *weights[:2], halves]
    assert all(a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in zip(found, expected, strict=True))


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ganomaly_plugin.training import normalise_kernels as kernels

for number, across, halved in (("fp32", 32, False), ("fp32", 32, True), ("bf16", 64, False)):
    for kernel in (kernels.measure, kernels.normalise, kernels.measure_gradients, kernels.differentiate):
        names = kernel.arg_names
        constants = dict(HALVED=halved, CHUNKS=16, ROWS=32, COLUMNS=across, STAGES=3)
        kinds = dict.fromkeys(("x", "y", "gradient", "to_x"), "*" + number) | dict.fromkeys(constants, "constexpr")
        kinds |= dict.fromkeys(("rows", "columns", "chunk", "models"), "i32") | {"largest": "*i32", "halves": "*fp16"}
        kinds |= dict.fromkeys(("momentum", "eps", "slope", "reach"), "fp32")
        types = {name: kinds.get(name, "*fp32") for name in names}
        odd = {"models", *(name for name in names if types[name] in ("constexpr", "fp32"))}
        aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name not in odd}
        values = {(names.index(name),): value for name, value in constants.items()}
        options = {"num_warps": 4, "enable_fp_fusion": True}
        made = triton.compile(ASTSource(kernel, types, values, aligned), target=GPUTarget("cuda", 90, 32), options=options)
        ptx = made.asm["ptx"]
        copies = re.findall(r"cp.async.cg.shared.global .*", ptx)
        whole = sum("0x10" in copy for copy in copies)
        print(kernel.__name__, number, made.metadata.shared, len(copies), whole)
"""


@pytest.mark.slow
def test_they_compile_for_a_gpu(compiled):
    """Of its compute capability 9.0, where each thread reads 16 bytes at a time, several reads ahead."""
    kernels = compiled(COMPILE)
    assert len(kernels) == 12
    assert all(int(shared) < 40_000 and int(copies) == int(whole) > 0 for *_, shared, copies, whole in kernels)
