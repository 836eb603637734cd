"""The kernel that gives collapsed models spare weights, as Triton interprets it: bit for bit what torch's operations do."""

from __future__ import annotations

import pytest
import torch
from tape import record_tape
from test_implicit import Operations
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.recipe import Optimiser, Phase
from ganomaly_plugin.training import convolutions, redraw
from ganomaly_plugin.training.convolutions import in_order
from ganomaly_plugin.training.plain import PlainTrainer, build_networks
from ganomaly_plugin.training.redraw import READY, Spares
from ganomaly_plugin.training.stack import make_stack

pytest.importorskip("triton")

CPU = torch.device("cpu")
MODELS = READY + 2


class Drawing:
    """Of a recipe what draws all weights anew."""

    def redraw(self, network: nn.Module) -> None:
        for weight in network.parameters():
            nn.init.normal_(weight)


def network() -> nn.Module:
    """Its weights have no, one, two and four axes, and sizes from a part of a block to several and a part."""
    layers = nn.ModuleDict({"wide": nn.Conv2d(5, 24, (7, 5)), "grey": nn.Conv2d(1, 8, 4), "flat": nn.Linear(9, 17)})
    layers["point"] = nn.Conv2d(3, 4, 1)
    layers.register_parameter("one", nn.Parameter(torch.zeros(())))
    return layers


def spares(*, by_kernels: bool) -> Spares:
    phase = Phase("net", ("net",), lambda *_: None, Optimiser(1e-3, (0.5, 0.9)), redraw_below=0.1)
    rngs = [torch.Generator().manual_seed(seed) for seed in range(MODELS)]
    return Spares(Drawing(), phase, {"net": network()}, rngs, CPU, by_kernels=by_kernels)


def test_a_kernel_gives_the_weights_that_torch_does():
    kernels, torchs = spares(by_kernels=True), spares(by_kernels=False)
    weights = {f"net.{name}": in_order(torch.zeros(MODELS, *each.shape)) for name, each in network().named_parameters()}
    weights = {name: weight.normal_().requires_grad_() for name, weight in weights.items()}
    weights["net.one"].data[0] = torch.nan
    mine, theirs = ({name: weight.clone() for name, weight in weights.items()} for _ in range(2))

    def give(below: torch.Tensor) -> None:
        with Operations() as operations:
            kernels.give(mine, below)
        assert operations.ours() == {"renew": len(weights)} and operations.names["aten::add_"] == 1
        assert not {"aten::where", "aten::index", "aten::clone", "aten::copy_"} & set(operations.names)
        torchs.give(theirs, below)
        assert torch.equal(kernels.spent, torchs.spent)
        for name, weight in mine.items():
            assert torch.equal(*(each.view(torch.int32) for each in (weight.detach(), theirs[name].detach())))

    for spent in (kernels.spent, torchs.spent):
        spent.copy_(torch.arange(MODELS))
    for below in ([True] * MODELS, [False, True] * (MODELS // 2), [False] * MODELS):
        give(torch.tensor(below))
    assert all((weight != weights[name]).all() for name, weight in mine.items())
    for each in (kernels, torchs):
        each.keep([4, 1, 3])
        each.refill()
    mine, theirs = ({name: in_order(weight[[4, 1, 3]]) for name, weight in given.items()} for given in (mine, theirs))
    assert not kernels.spent.any()
    for below in ([True, False, True], [True, True, False]):
        give(torch.tensor(below))


@pytest.mark.parametrize("models", [1, 3, 2000])
def test_programs_copy_what_is_theirs(models, monkeypatch):
    monkeypatch.setattr(redraw, "_BLOCK", 8)
    monkeypatch.setattr(redraw, "_PROGRAMS", 6)
    rng = torch.Generator().manual_seed(0)
    numbers = 1 if models == 2000 else 69
    weights, spare = (torch.randn(sets * models, numbers, generator=rng, dtype=torch.float64) for sets in (1, READY))
    below = torch.rand(models, generator=rng) < (0.002 if models == 2000 else 1)
    spent = torch.randint(READY + 2, (models,), generator=rng)
    following = spare.unflatten(0, (READY, models))[spent.clamp(max=READY - 1), torch.arange(models)]
    wanted = torch.where(below[:, None], following, weights)
    redraw.renew(weights, spare, spent, below)
    assert torch.equal(weights, wanted)


def test_fake_tensors_take_it():
    with FakeTensorMode():
        weights, spare = torch.empty(3, 5), torch.empty(READY * 3, 5)
        redraw.renew(weights, spare, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))


def trained(record) -> tuple[list[dict[str, list[float]]], list[list[int]]]:
    """The losses of steps of models, and which of them collapsed; they are held to the plain trainer's."""
    recipe, seeds = GanomalyRecipe(features=4, latent_dim=8, batch_size=4, redraw_below=0.68), [3, 4, 5]
    models = [build_networks(recipe, (1, 16, 16), seed) for seed in seeds]
    stack = make_stack(recipe, models, seeds=seeds, device=CPU, how="implicit", record=record)
    plain = [PlainTrainer(recipe, networks, seed=seed, device=CPU) for networks, seed in zip(models, seeds, strict=True)]
    images = torch.randn(6, 3, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    losses, drawn = [], []
    for batch in images:
        losses.append({name: value.tolist() for name, value in stack.step(batch).items()})
        for model, trainer in enumerate(plain):
            for name, value in trainer.step(batch[model]).items():
                assert losses[-1][name][model] == pytest.approx(float(value), rel=1e-4)
        drawn.append([loss < recipe.redraw_below for loss in losses[-1]["discriminator"]])
    for model, trainer in enumerate(plain):
        mine = stack.scoring_networks(model)["discriminator"].state_dict()
        for name, weight in trainer.networks["discriminator"].state_dict().items():
            assert (mine[name] - weight).abs().max() < 1e-3
    return losses, drawn


def test_a_stack_of_implicit_products_draws_the_networks_that_the_plain_trainer_does(monkeypatch):
    monkeypatch.setattr(convolutions, "suits", lambda *_: False)  # BatchNorm by torch, which takes less time
    losses, drawn = trained(None)
    assert any(any(row) and not all(row) for row in drawn)
    assert trained(record_tape) == (losses, drawn)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ganomaly_plugin.training.redraw_kernels import renew

names = renew.arg_names
for aligned in (0, 1):
    constants = dict(READY=4, BLOCK=2048)
    types = dict(weights="*fp32", spares="*fp32", spent="*i64", below="*i1", numbers="i32")
    types |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    divisible = {(k,): [["tt.divisibility", 16]] for k in range(4 + aligned)}
    source = ASTSource(renew, types, values, divisible)
    options = dict(num_warps=4, enable_fp_fusion=True)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(made.metadata.shared, made.asm["ptx"].count("st.global.v4"))
"""


def test_it_compiles_for_a_gpu(compiled):
    """Of its compute capability 9.0, where threads write 16 bytes at a time if each model's numbers are a multiple of those."""
    (_, narrow), (shared, wide) = (map(int, words) for words in compiled(COMPILE))
    assert shared == 0 and narrow == 0 and wide == 4
